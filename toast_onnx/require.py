"""PyTorch is an optional dependency: imported when needed, and missed with a clear word; its gradients, when needed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from toast_onnx.errors import BackendError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def require_torch(what: str = "fine-tuning needs", instead: str = "") -> Any:
    """The torch package.

    Args:
        what: needs it, and the verb.
        instead: how to do without, continuing the sentence.

    Raises:
        BackendError: it is not installed, or its installation is broken.
    """
    try:
        import torch
    except ImportError as e:
        raise BackendError(f"{what} PyTorch: pip install 'toast-onnx[torch]'{instead}") from e
    return torch


def with_gradients(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with gradients on while it runs, also under a caller's `torch.no_grad` or `torch.inference_mode`."""

    @functools.wraps(work)
    def guarded(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        torch = sys.modules.get("torch")
        if torch is None:  # nobody can have switched them off, and the work says what it needs PyTorch for
            return work(*args, **options)
        with torch.inference_mode(False), torch.enable_grad():
            return work(*args, **options)

    return guarded
