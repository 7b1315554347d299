"""A model repository for NVIDIA's Triton Inference Server: `NAME/config.pbtxt` and `NAME/1/model.plan` or `.onnx`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from toast_onnx.engines.profiles import DEFAULT_BATCH, ShapeRange, graph_inputs
from toast_onnx.errors import ConfigError, ModelError
from toast_onnx.files import drafts, place, write_bytes
from toast_onnx.model import load_model, save_model

#: How long a request waits for others to share a batch with, in microseconds.
QUEUE_DELAY = 100
#: ONNX's element types by Triton's name for them.
TYPES: dict[int, str] = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.UINT32: "TYPE_UINT32",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.STRING: "TYPE_STRING",
    TensorProto.BFLOAT16: "TYPE_BF16",
}
_Tensor = tuple[str, int, tuple[int, ...]]


def repository_files(folder: Path, artifact: Path) -> tuple[Path, Path]:
    """Where a repository holds the configuration and the model of an engine or ONNX file.

    Args:
        folder: the repository.
        artifact: the `.onnx` file or the engine.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", artifact.stem)
    inside = "model.onnx" if artifact.suffix == ".onnx" else "model.plan"
    return folder / name / "config.pbtxt", folder / name / "1" / inside


def write_repository(
    folder: Path, artifact: Path, graph: onnx.ModelProto, profile: Mapping[str, ShapeRange] | None = None
) -> Path:
    """Add a model to a repository: the model first, then the configuration that names it.

    Args:
        folder: the repository; it is made where there is none.
        artifact: the `.onnx` file or the TensorRT engine to serve; it is copied.
        graph: the graph whose inputs and outputs the artifact has.
        profile: shapes an engine takes, by input; of an ONNX file None.

    Returns:
        The configuration's file.

    Raises:
        ConfigError: an input or output has no shape in the graph, or a type that Triton has no name for.
        ModelError: the repository cannot be written.
    """
    config, model = repository_files(folder, artifact)
    text = configuration(config.parent.name, model.name, graph, profile)
    try:
        model.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ModelError(f"{model.parent} cannot be made: {e.strerror or e}; choose another place with --triton") from e
    if model.suffix == ".onnx":
        save_model(load_model(artifact), model)
    else:
        with drafts(model) as draft:
            shutil.copyfile(artifact, draft / model.name)
            place(draft / model.name, model)
    write_bytes(config, text.encode())
    return config


def configuration(
    name: str, model: str, graph: onnx.ModelProto, profile: Mapping[str, ShapeRange] | None = None
) -> str:
    """A model's configuration in protobuf's text form.

    Where every input and output begins with an open axis, that is the batch: requests are put together up to the
    largest size the engine takes (of an ONNX file, 32). Elsewhere shapes are as the graph has them.

    Args:
        name: of the model, which is its folder's.
        model: name of its file.
        graph: the graph that was built.
        profile: shapes the engine takes, by input.
    """
    inputs = [(s.name, s.elem_type, tuple(-1 if d is None else d for d in s.dims)) for s in graph_inputs(graph)]
    outputs = [_output(value) for value in graph.graph.output]
    batched = all(dims[:1] == (-1,) for _, _, dims in (*inputs, *outputs))
    lines = [
        f"name: {_text(name)}",
        f'backend: "{"onnxruntime" if model.endswith(".onnx") else "tensorrt"}"',
        f"default_model_filename: {_text(model)}",
    ]
    usual, most = DEFAULT_BATCH[1:]
    if profile:
        usual, most = (min(getattr(shapes, kind)[0] for shapes in profile.values()) for kind in ("opt", "max"))
    lines.append(f"max_batch_size: {most if batched else 0}")
    for kind, tensors in (("input", inputs), ("output", outputs)):
        lines += [_tensor(kind, *tensor, batched=batched) for tensor in tensors]
    if batched and most > 1:
        sizes = ", ".join(str(size) for size in sorted({usual, most} - {1}))
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: [ {sizes} ] max_queue_delay_microseconds: {QUEUE_DELAY} }}"
        )
    lines.append("instance_group [ { count: 1 kind: KIND_GPU } ]")
    return "\n".join(lines) + "\n"


def _output(value: onnx.ValueInfoProto) -> _Tensor:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise ConfigError(f"output '{value.name}' has no rank in the graph; export it with a shape")
    dims = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1 for d in tensor.shape.dim)
    return value.name, tensor.elem_type, dims


def _tensor(kind: str, name: str, elem_type: int, dims: Sequence[int], *, batched: bool) -> str:
    if elem_type not in TYPES:
        raise ConfigError(f"{kind} '{name}' has a type that Triton does not serve; export it with another one")
    shape = ", ".join(map(str, dims[1:] if batched else dims))
    # A tensor of no axis but the batch has one entry an item.
    reshape = "" if shape else " reshape: { shape: [ ] }"
    return f"{kind} [ {{ name: {_text(name)} data_type: {TYPES[elem_type]} dims: [ {shape or 1} ]{reshape} }} ]"


def _text(value: str) -> str:
    """A string as protobuf's text form writes it, which escapes as JSON does."""
    return json.dumps(value, ensure_ascii=False)
