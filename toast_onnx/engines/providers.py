"""ONNX Runtime sessions of model files for timing and checking, on a named execution provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toast_onnx.engines.profiles import ShapeRange
from toast_onnx.providers import known_provider, open_on


def open_session(
    path: Path, provider: str = "cpu", threads: int | None = None, profile: Mapping[str, ShapeRange] | None = None
) -> Any:
    """Open a model on one execution provider; nodes it cannot run go to its helpers, as ONNX Runtime does.

    Args:
        path: an `.onnx` or `.ort` file.
        provider: a key of `toast_onnx.providers.PROVIDERS`.
        threads: threads inside one operator on the CPU; None leaves ONNX Runtime's default.
        profile: shapes that will be fed; the TensorRT providers then build one engine for all of them.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ConfigError: an unknown provider.
        BackendError: the provider is not installed or does not work here.
        ModelError: the model does not load.
    """
    from toast_onnx.ort import session_options

    options = session_options(timed=True)
    options.intra_op_num_threads = threads or 0
    return open_on(str(path), provider, options, profile_settings(provider, profile or {}))


def profile_settings(provider: str, profile: Mapping[str, ShapeRange]) -> dict[str, str]:
    """Explicit shape ranges in the TensorRT providers' spelling: `x:1x3x224x224,y:1x10`."""
    prefix = known_provider(provider).shape_prefix
    if prefix is None or not profile:
        return {}
    return {
        f"{prefix}_profile_{kind}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, getattr(shapes, kind)))}" for name, shapes in profile.items()
        )
        for kind in ("min", "opt", "max")
    }
