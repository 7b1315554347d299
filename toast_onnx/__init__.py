"""toast-onnx: structured pruning of exported Vision Transformers, graph in, graph out.

Names are loaded when they are first asked for, so that `import toast_onnx` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toast_onnx.errors import (
        BackendError,
        ConfigError,
        DataError,
        MatchError,
        ModelError,
        ToastError,
        TwinError,
    )
    from toast_onnx.front import Pruned, Study, load, prune
    from toast_onnx.planning.schema import Ratios

__version__ = "0.1.0"

__all__ = [
    "load",
    "prune",
    "Ratios",
    "Study",
    "Pruned",
    "ToastError",
    "ModelError",
    "ConfigError",
    "MatchError",
    "TwinError",
    "DataError",
    "BackendError",
]

_HOMES = {"load": "front", "prune": "front", "Study": "front", "Pruned": "front", "Ratios": "planning.schema"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
