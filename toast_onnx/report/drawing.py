"""Drawing with matplotlib, which is optional.

Figures are made without pyplot: they need no display, and the caller's backend stays as it is.
"""

from __future__ import annotations

from typing import Any

from toast_onnx.errors import BackendError


def require_matplotlib(otherwise: str = "") -> Any:
    """The matplotlib module.

    Args:
        otherwise: what else the user can do, for the end of the message.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise BackendError(f"figures need matplotlib: pip install 'toast-onnx[report]'{otherwise}") from e
    return matplotlib
