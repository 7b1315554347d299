"""Engines from ONNX graphs: TensorRT and TensorRT-RTX builds, precision, shape profiles, benchmarks and checks.

The two TensorRT packages are imported when a build or a check asks for one, never before.
"""
