"""The TensorRT backends side by side, and which one to take."""

from __future__ import annotations

import importlib.util

from toast_onnx.engines._rtx import TensorRTRTX
from toast_onnx.engines._trt import TensorRT
from toast_onnx.engines.backend import Backend
from toast_onnx.engines.cuda import gpu_name
from toast_onnx.errors import BackendError, ConfigError

_BACKENDS: dict[str, Backend] = {"tensorrt": TensorRT(), "tensorrt-rtx": TensorRTRTX()}
BACKENDS = tuple(_BACKENDS)


def choose(name: str = "auto") -> Backend:
    """The backend of that name; `auto` takes the one installed, and of two `tensorrt` where a GPU is.

    `tensorrt` needs a GPU to build at all, `tensorrt-rtx` builds without one.

    Raises:
        ConfigError: an unknown name.
        BackendError: the package asked for, or for `auto` either, is not installed.
    """
    if name not in ("auto", *_BACKENDS):
        raise ConfigError(f"backend '{name}' is unknown; use one of auto, {', '.join(BACKENDS)}")
    installed = [n for n, b in _BACKENDS.items() if importlib.util.find_spec(b.module_name) is not None]
    if name != "auto":
        if name not in installed:
            module = _BACKENDS[name].module_name
            raise BackendError(f"backend {name} is not installed; install it with: pip install {module}")
        return _BACKENDS[name]
    if not installed:
        raise BackendError(
            "no TensorRT is installed; install one with: pip install tensorrt_rtx (builds without a GPU) or "
            "pip install tensorrt"
        )
    if len(installed) == 2:
        return _BACKENDS["tensorrt" if gpu_name() is not None else "tensorrt-rtx"]
    return _BACKENDS[installed[0]]
