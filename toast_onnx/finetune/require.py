"""PyTorch is an optional dependency: imported when needed, and missed with a clear word."""

from __future__ import annotations

from typing import Any

from toast_onnx.errors import BackendError


def require_torch() -> Any:
    """The torch package.

    Raises:
        BackendError: it is not installed, or its installation is broken.
    """
    try:
        import torch
    except ImportError as e:
        raise BackendError("fine-tuning needs PyTorch: pip install 'toast-onnx[torch]'") from e
    return torch
