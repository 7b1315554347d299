"""From a dense model to a checked engine in one go: a file of settings, the steps it asks for, and what each one gave.

Every step is a `toast-onnx` command that a person could type. This room decides which commands, in which order, and
whether a step was done before; who calls says how a command is run.
"""

from __future__ import annotations

from toast_onnx.deploy.config import Deployment, load_deployment
from toast_onnx.deploy.run import Finished, deploy
from toast_onnx.deploy.steps import Step, plan_steps

__all__ = ["Deployment", "Finished", "Step", "deploy", "load_deployment", "plan_steps"]
