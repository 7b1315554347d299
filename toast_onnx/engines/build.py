"""From a model file to an engine file, with a JSON beside it that says how it was made."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from toast_onnx.engines.backend import EngineOptions, Progress, load
from toast_onnx.engines.backends import choose
from toast_onnx.engines.cuda import gpu_name
from toast_onnx.engines.engine import build_engine
from toast_onnx.engines.heads import attention_entry, fused_notes, settle_heads
from toast_onnx.engines.layers import count_fused_attention
from toast_onnx.engines.precision import PRECISIONS, convert_precision, stated_precision, why_not_converted
from toast_onnx.engines.profiles import Shape, ShapeRange, build_profile, graph_inputs
from toast_onnx.engines.record import described, read_record, record_path
from toast_onnx.errors import ConfigError
from toast_onnx.files import check_place, drafts, exchange, files_read, settle, write_beside, write_synced
from toast_onnx.model import Model, file_hash, load_model, write_draft


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        backend: `auto`, `tensorrt` or `tensorrt-rtx`.
        precision: `fp32`, `tf32`, `fp16` or `bf16`.
        fp16_io: float16 inputs and outputs too (with `fp16`).
        batch: (min, opt, max) of an open first dimension; None takes the default where one is needed.
        min_shapes: smallest shape by input name; the three mappings name the same inputs.
        opt_shapes: usual shape by input name.
        max_shapes: largest shape by input name.
        uneven_heads: what to do with attention whose Q/K and V have different widths: `auto`, `pad` or `write-out`.
        baseline: the dense model's engine, to hold the number of fused attentions against.
        large: tensors that float16 cannot hold; the nodes around them stay in float32.
        options: everything else; its profile and tf32 are filled in from the fields above.
    """

    backend: str = "auto"
    precision: str = "fp32"
    fp16_io: bool = False
    batch: tuple[int, int, int] | None = None
    min_shapes: dict[str, Shape] = field(default_factory=dict)
    opt_shapes: dict[str, Shape] = field(default_factory=dict)
    max_shapes: dict[str, Shape] = field(default_factory=dict)
    uneven_heads: str = "auto"
    baseline: Path | None = None
    large: Collection[str] = ()
    options: EngineOptions = field(default_factory=EngineOptions)


def model_hash(path: Path) -> str | None:
    """SHA-256 of the ONNX model that a file holds or was made from; None where nothing says which.

    Args:
        path: an ONNX file, or an engine or `.ort` file, of which the JSON beside it tells.
    """
    if path.suffix == ".onnx":
        return file_hash(path)
    record = read_record(path)
    return None if record is None else record.model_sha256


def build(model_path: Path, output: Path, request: BuildRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Build an engine and the JSON beside it.

    Shapes and options are checked against the graph before TensorRT is started.

    Args:
        model_path: the ONNX file.
        output: the engine file to write; `record_path(output)` gets the JSON.
        request: what to build.
        progress: told about the builder's phases.

    Returns:
        What the JSON holds: `model`, `model_sha256`, `precision`, `profile`, `build_seconds`, `notes` and more.

    Raises:
        ModelError: the model cannot be read, or the engine cannot be written.
        ConfigError: an option or a shape that contradicts the graph or the backend.
        UnsupportedGraphError: TensorRT does not take some nodes; the error lists them.
        BackendError: no backend, or its builder failed.
    """
    if request.precision not in PRECISIONS:
        raise ConfigError(f"precision '{request.precision}' is unknown; use one of {', '.join(PRECISIONS)}")
    model = load_model(model_path)
    profile = build_profile(
        graph_inputs(model.proto), request.batch, request.min_shapes, request.opt_shapes, request.max_shapes
    )
    options = replace(request.options, profile=profile, tf32=request.precision != "fp32")
    backend = choose(request.backend)
    notes = backend.check(options)
    dense = None if request.baseline is None else _fused_in(request.baseline)
    sixteen_bits = (stated_precision(model.proto) or request.precision) in ("fp16", "bf16")
    with tempfile.TemporaryDirectory(prefix="toast-onnx-") as folder:
        settled = settle_heads(
            model, request.uneven_heads, sixteen_bits=sixteen_bits, given=_single_shapes(model.proto, profile)
        )
        spelled = settled.model
        if spelled is not model:
            spelled = load_model(write_draft(spelled, Path(folder), model.path.name))
        source, said = precise_file(
            spelled, request.precision, Path(folder), fp16_io=request.fp16_io, large=request.large
        )
        started = time.perf_counter()
        engine = build_engine(backend, source, options, progress)
        seconds = time.perf_counter() - started
    fused = None if engine.layers is None else count_fused_attention(engine.layers)
    attention = attention_entry(settled, fused)
    if settled.attentions and fused is not None:
        said = [*said, *fused_notes(settled.attentions, fused, dense, sixteen_bits=sixteen_bits)]
    record = {
        **described(output, len(engine.plan), model_path, backend.name, str(load(backend).__version__)),
        "precision": request.precision,
        "converted": request.precision in ("fp16", "bf16") and not said,
        "fp16_io": request.fp16_io,
        "kept_fp32": sorted(request.large),
        "profile": {name: shapes.as_dict() for name, shapes in profile.items()},
        "fixed_shapes": _fixed_shapes(model.proto),
        "compute_capabilities": list(options.compute_capabilities),
        "hardware_compatible": options.hardware_compatible,
        "version_compatible": options.version_compatible,
        "workspace": options.workspace,
        "optimization_level": options.optimization_level,
        "build_seconds": round(seconds, 3),
        "device": gpu_name(),
        "attention": attention,
        "notes": [*notes, *settled.notes, *said],
        "read": files_read(),
    }
    write_with_record(output, engine.plan, record)
    return record


def _fused_in(engine: Path) -> tuple[int, int] | None:
    """(attentions, those that are one kernel) of an engine, as the JSON beside it says; None where it does not.

    Raises:
        ConfigError: there is no such JSON.
    """
    record = read_record(engine)
    if record is None:
        raise ConfigError(f"{record_path(engine)} is missing or not readable: build {engine} again, or drop --baseline")
    entry = record.attention
    return None if entry is None or entry.fused is None else (entry.found, entry.fused)


def _single_shapes(proto: onnx.ModelProto, profile: Mapping[str, ShapeRange]) -> dict[str, Shape]:
    """The shapes to tune for with one item in the batch, of inputs with open dimensions."""
    dims = {spec.name: spec.dims for spec in graph_inputs(proto)}
    return {
        name: (1, *shapes.opt[1:]) if dims[name][0] is None else shapes.opt
        for name, shapes in profile.items()
        if dims[name]
    }


def write_with_record(output: Path, engine: bytes, record: dict[str, Any]) -> None:
    """Write an engine and the JSON beside it together.

    Raises:
        ModelError: they cannot be written.
    """
    beside = record_path(output)
    check_place(beside)
    with drafts(output) as folder:
        settle(output, beside)
        write_synced(folder / output.name, engine)
        write_beside(folder, beside, record_bytes(record))
        exchange(folder, output, beside)


def record_bytes(record: dict[str, Any]) -> bytes:
    """The JSON beside an engine as it is written."""
    return (json.dumps(record, indent=2) + "\n").encode()


def precise_file(
    model: Model, precision: str, folder: Path, *, fp16_io: bool = False, large: Collection[str] = ()
) -> tuple[Path, list[str]]:
    """The file a build should read: the model itself, or a 16-bit copy of it in `folder`.

    Returns:
        The file, and sentences about what was not done as asked.

    Raises:
        ConfigError: `fp16_io` without `fp16`.
        ModelError: an external weight cannot be read.
        BackendError: the conversion failed.
    """
    as_it_is = stated_precision(model.proto) is not None or why_not_converted(model.proto) is not None
    if as_it_is or precision in ("fp32", "tf32"):
        _, notes = convert_precision(model.proto, precision, fp16_io=fp16_io)
        return model.path, notes
    converted, notes = convert_precision(with_weights(model), precision, fp16_io=fp16_io, large=large)
    return write_draft(Model(converted, folder / model.path.name), folder, f"{precision}.onnx"), notes


def with_weights(model: Model) -> onnx.ModelProto:
    """A copy of a model's graph with all weights in memory, as `convert_precision` takes it.

    Args:
        model: the model; its `arrays` replace the weights of the same name. It is not changed.

    Raises:
        ModelError: an external weight cannot be read.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model.proto)
    for tensor in whole.graph.initializer:
        model.inline(tensor)
    return whole


def _fixed_shapes(proto: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of the inputs that a profile says nothing about."""
    specs = graph_inputs(proto)
    return {s.name: [d for d in s.dims if d is not None] for s in specs if not s.is_dynamic}
