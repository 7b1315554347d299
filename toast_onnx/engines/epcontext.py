"""A model that carries its engine: ONNX Runtime's EPContext node, written by the TensorRT providers.

An application that runs ONNX Runtime opens the file as any other model, and the provider takes the engine out of it
instead of building one. Unlike `tensorrt_rtx` itself, the providers build on the GPU that they find.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from toast_onnx.engines.build import precise_file, write_with_record
from toast_onnx.engines.profiles import Shape, build_profile, graph_inputs
from toast_onnx.engines.providers import profile_settings
from toast_onnx.engines.record import described
from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.files import files_read
from toast_onnx.model import load_model
from toast_onnx.providers import installed_providers, open_on

#: Backends with a provider of the same name that writes engines.
BACKENDS = ("tensorrt", "tensorrt-rtx")


def build_ep_context(
    model_path: Path,
    output: Path,
    *,
    backend: str = "auto",
    precision: str = "fp32",
    fp16_io: bool = False,
    batch: tuple[int, int, int] | None = None,
    shapes: tuple[Mapping[str, Shape], Mapping[str, Shape], Mapping[str, Shape]] = ({}, {}, {}),
) -> dict[str, Any]:
    """Write a model with its engine inside, and a JSON beside it.

    Args:
        model_path: the ONNX file.
        output: the ONNX file to write.
        backend: `tensorrt` or `tensorrt-rtx`; `auto` takes the provider that is installed.
        precision: `fp32`, `tf32`, `fp16` or `bf16`.
        fp16_io: float16 inputs and outputs too (with `fp16`).
        batch: (min, opt, max) of an open first dimension.
        shapes: smallest, usual and largest shapes by input name.

    Returns:
        What the JSON holds, as for `build`.

    Raises:
        ConfigError: an option or a shape that contradicts the graph.
        BackendError: the provider is not installed, finds no GPU, or left no engine.
        ModelError: the model cannot be read, or the result cannot be written.
    """
    from toast_onnx.ort import ort, session_options

    if output.suffix != ".onnx":
        raise ConfigError(f"{output.name}: --format ep-context writes .onnx files; choose such a name with -o")
    if output.resolve() == model_path.resolve():
        raise ConfigError(f"{output} is the model itself; choose another name with -o")
    model = load_model(model_path)
    profile = build_profile(graph_inputs(model.proto), batch, *shapes)
    here = installed_providers()
    provider = next((p for p in BACKENDS if p in here), "tensorrt") if backend == "auto" else backend
    settings = profile_settings(provider, profile)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="toast-onnx-") as folder:
        source, notes = precise_file(model, precision, Path(folder), fp16_io=fp16_io)
        draft = Path(folder) / "context.onnx"
        options = session_options()
        for key, value in {"enable": "1", "embed_mode": "1", "file_path": str(draft)}.items():
            options.add_session_config_entry(f"ep.context_{key}", value)
        if provider == "tensorrt":  # releases before 1.23 read these instead
            settings |= {
                "trt_dump_ep_context_model": "1",
                "trt_ep_context_embed_mode": "1",
                "trt_ep_context_file_path": str(draft),
            }
        try:
            open_on(str(source), provider, options, settings, str(model_path))
        except BackendError as e:
            raise BackendError(
                f"--format ep-context builds on a GPU, by ONNX Runtime's provider {provider}, which does not start "
                "here: run this where it does, or use --format engine --backend tensorrt-rtx, which needs no GPU"
            ) from e
        if not draft.is_file():
            raise BackendError(f"provider {provider} wrote no engine for {model_path}; build --format engine instead")
        inside = sum(node.op_type == "EPContext" for node in onnx.load(draft).graph.node)
        if not inside:
            raise BackendError(f"provider {provider} took no node of {model_path}; build --format engine instead")
        written = draft.read_bytes()
    record = {
        **described(output, len(written), model_path, provider, f"in ONNX Runtime {ort.__version__}"),
        "precision": precision,
        "converted": precision in ("fp16", "bf16") and not notes,
        "fp16_io": fp16_io,
        "profile": {name: ranges.as_dict() for name, ranges in profile.items()},
        "engines_inside": inside,
        "build_seconds": round(time.perf_counter() - started, 3),
        "notes": notes,
        "read": files_read(),
    }
    write_with_record(output, written, record)
    return record
