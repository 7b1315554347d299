"""From a dense model to a checked engine in one go: a file of settings, the steps it asks for, and what each one gave.

Every step is a `toast-onnx` command that a person could type. This room decides which commands, in which order, and
whether a step was done before; who calls says how a command is run.
"""
