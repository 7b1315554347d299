"""ONNX Runtime sessions on a named execution provider, or an error: never on another provider in silence.

ONNX Runtime falls back to the CPU when a provider's libraries are missing, and a benchmark of the fallback would be a
benchmark of the wrong thing. TensorRT comes in two forms: `tensorrt`, built into `onnxruntime-gpu`, and
`tensorrt-rtx`, a plugin in the package `onnxruntime-ep-nv-tensorrt-rtx`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toast_onnx.engines.profiles import ShapeRange
from toast_onnx.errors import BackendError, ConfigError

#: Short name to ONNX Runtime's name.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_PROFILE_PREFIX = {"tensorrt": "trt", "tensorrt-rtx": "nv"}
_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


def open_session(
    path: Path, provider: str = "cpu", threads: int | None = None, profile: Mapping[str, ShapeRange] | None = None
) -> Any:
    """Open a model on one execution provider; nodes it cannot run go to the CPU, as ONNX Runtime does.

    Args:
        path: an `.onnx` or `.ort` file.
        provider: a key of `PROVIDERS`.
        threads: threads inside one operator on the CPU; None leaves ONNX Runtime's default.
        profile: shapes that will be fed; the TensorRT providers then build one engine for all of them.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ConfigError: an unknown provider.
        BackendError: the provider is not installed or does not work here, or the model does not load.
    """
    from toast_onnx.ort import ort, quiet, session_options

    if provider not in PROVIDERS:
        raise ConfigError(f"provider '{provider}' is unknown; use one of {', '.join(PROVIDERS)}")
    full_name = PROVIDERS[provider]
    options = session_options()
    options.intra_op_num_threads = threads or 0
    settings = _profile_settings(provider, profile or {})
    try:
        with quiet():
            if full_name in ort.get_available_providers():
                chosen = [(full_name, settings)] if provider == "cpu" else [(full_name, settings), PROVIDERS["cpu"]]
                session = ort.InferenceSession(str(path), options, providers=chosen, enable_fallback=0)
            elif provider == "tensorrt-rtx":
                options.add_provider_for_devices(_rtx_devices(ort), settings)
                session = ort.InferenceSession(str(path), options, enable_fallback=0)
            else:
                raise BackendError(
                    f"this ONNX Runtime has no {full_name} (it has {', '.join(ort.get_available_providers())}); "
                    "install onnxruntime-gpu"
                )
    except BackendError:
        raise
    except Exception as e:
        raise BackendError(f"ONNX Runtime could not open {path} on {full_name}: {_first_line(e)}") from e
    if session.get_providers()[0] != full_name:
        raise BackendError(
            f"{full_name} does not work here (its libraries or a GPU are missing), so {path} would run on "
            f"{session.get_providers()[0]}; install them or use --provider cpu"
        )
    return session


def _profile_settings(provider: str, profile: Mapping[str, ShapeRange]) -> dict[str, str]:
    """Explicit shape ranges in the TensorRT providers' spelling: `x:1x3x224x224,y:1x10`."""
    prefix = _PROFILE_PREFIX.get(provider)
    if prefix is None or not profile:
        return {}
    return {
        f"{prefix}_profile_{kind}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, getattr(shapes, kind)))}" for name, shapes in profile.items()
        )
        for kind in ("min", "opt", "max")
    }


def _rtx_devices(ort: Any) -> list[Any]:
    """The GPUs that the TensorRT-RTX plugin offers."""
    try:
        plugin: Any = importlib.import_module(_RTX_PLUGIN)
    except ImportError as e:
        raise BackendError(
            f"the TensorRT-RTX provider is not installed; install it with: pip install {_RTX_PLUGIN.replace('_', '-')}"
        ) from e
    name = PROVIDERS["tensorrt-rtx"]
    if all(device.ep_name != name for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(name, plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise BackendError("the TensorRT-RTX provider found no GPU; use --provider cpu or run where one is")
    return devices


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
