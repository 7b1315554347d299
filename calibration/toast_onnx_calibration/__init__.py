"""Runs models on samples: statistics for pruning, damages for planning, accuracies and comparisons."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toast_onnx_calibration.comparing import compare
    from toast_onnx_calibration.evaluating import evaluate
    from toast_onnx_calibration.front import calibrate, plan, sensitivity
    from toast_onnx_calibration.looking import look

__all__ = ["calibrate", "plan", "sensitivity", "compare", "evaluate", "look"]

_HOMES = {"compare": "comparing", "evaluate": "evaluating", "look": "looking"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'front')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
