"""PyTorch is an optional dependency: imported when needed, and missed with a clear word."""

from __future__ import annotations

from typing import Any

from toast_onnx.errors import BackendError


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
