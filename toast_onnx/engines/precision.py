"""Precision in the graph's own types: float32 weights and activations become float16 or bfloat16.

TensorRT 11 and TensorRT-RTX read precision from the graph alone, so it is put there before a build. ONNX Runtime's
`float16` converter decides where casts go; around it this module makes the conversion safe:

- Normalisations (the operators, and chains of ReduceMean, Pow, Sqrt, Div in older graphs) and Softmax stay in float32.
  A fused Attention node (opset 23) goes to 16 bits whole: TensorRT-RTX 1.7 refuses its `softmax_precision`.
- Casts down and up again between two neighbours that both stay in float32 are removed. The converter leaves them in,
  and a square above 65504 would become infinite on the way.
- Values written as Constant nodes become initializers first, so that an epsilon of 1e-12 is not lifted to 6e-8.
- Nodes come back in topological order.

bfloat16 takes the same route: what the converter made float16 is retyped, with weights rounded once, from their float32
values. NVIDIA ModelOpt's AutoCast also writes bfloat16, but its ONNX extra pins other releases of onnx and ONNX Runtime
than this package runs on.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import onnx
import onnx.external_data_helper
import onnx.shape_inference
from onnx import TensorProto, numpy_helper

from toast_onnx.engines.casts import (
    drop_unused_initializers,
    join_casts,
    retype_bfloat16,
    unique_value_info,
)
from toast_onnx.engines.sensitive import SENSITIVE_OPS, clipped_weights, nodes_at, ops_without, spelled_out_norms
from toast_onnx.errors import BackendError, ConfigError, ModelError
from toast_onnx.matching.operators import Trait, having
from toast_onnx.model import sort_nodes

#: Precisions a build can be asked for. `tf32` is float32 storage with 10-bit mantissas inside matrix products.
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
#: The largest number of float16, and how far the largest magnitude seen on samples has to stay below it.
FLOAT16_MAX, HEADROOM = 65504.0, 2.0
#: Metadata key that a converted model carries, with its precision as the value: nobody converts it twice.
MARK = "toast_onnx.precision"
#: Weights above this many elements never decide a shape, so shape inference need not see their values.
_SHAPE_SIZED = 1024


def why_not_converted(proto: onnx.ModelProto) -> str | None:
    """Why a graph's types stay as they are whatever 16-bit precision is asked for; None where they can change."""
    if any(n.op_type in having(Trait.ROUNDS) for n in proto.graph.node):
        return "the graph is quantized (it has QuantizeLinear or DequantizeLinear nodes)"
    if not any(t.data_type == TensorProto.FLOAT for t in proto.graph.initializer):
        return "the graph has no float32 weights"
    return None


def stated_precision(proto: onnx.ModelProto) -> str | None:
    """The precision `convert_precision` put into a graph's types before; None for a graph it never saw."""
    return next((entry.value for entry in proto.metadata_props if entry.key == MARK), None)


def _check_stated(proto: onnx.ModelProto, stated: str, precision: str, fp16_io: bool) -> None:
    """Refuse another precision than the one a graph was converted to."""
    if stated != precision:
        raise ConfigError(
            f"the model was converted to {stated} before: use --precision {stated}, or give the float32 model"
        )
    if fp16_io and any(i.type.tensor_type.elem_type == TensorProto.FLOAT for i in proto.graph.input):
        raise ConfigError("the model was converted with float32 inputs: leave --fp16-io out, or convert it again")


def _check_in_memory(proto: onnx.ModelProto) -> None:
    """Refuse references to weights in files: the converter would look for their values in vain."""
    outside = (t for t in proto.graph.initializer if onnx.external_data_helper.uses_external_data(t))
    first = next(outside, None)
    if first is not None:
        raise ModelError(
            f"the weight '{first.name}' lies in a file: give convert_precision with_weights(model), "
            "of toast_onnx.engines.build, instead of model.proto"
        )


def convert_precision(
    proto: onnx.ModelProto, precision: str, *, fp16_io: bool = False, large: Collection[str] = ()
) -> tuple[onnx.ModelProto, list[str]]:
    """Put a precision into a graph's types.

    Args:
        proto: a model with its weights in memory; it is not changed. `load_model` leaves those of a large file there:
            `toast_onnx.engines.build.with_weights` reads them.
        precision: one of `PRECISIONS`; `fp32` and `tf32` return the model as it is.
        fp16_io: make float inputs and outputs float16 too (for `fp16` only).
        large: tensors that float16 cannot hold; the nodes that make or read them stay in float32 (for `fp16` only).

    Returns:
        The converted model, marked as such, and sentences about what was not done as asked. A model that was
        converted to this precision before comes back as it is.

    Raises:
        ConfigError: an unknown precision, `fp16_io` without `fp16`, or a model converted to another precision before.
        ModelError: a weight that has to be converted is not in memory.
        BackendError: the converter failed on this graph.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision '{precision}' is unknown; use one of {', '.join(PRECISIONS)}")
    if fp16_io and precision != "fp16":
        raise ConfigError("--fp16-io goes with --precision fp16 only; change one of them")
    stated = stated_precision(proto)
    if stated is not None:
        _check_stated(proto, stated, precision, fp16_io)
    if stated is not None or precision in ("fp32", "tf32"):
        return proto, []
    reason = why_not_converted(proto)
    if reason is not None:
        return proto, [f"{reason}: its types stay as they are, --precision {precision} changes nothing"]
    _check_in_memory(proto)
    draft = onnx.ModelProto()
    draft.CopyFrom(proto)
    name_nodes(draft.graph)
    _constants_to_initializers(draft.graph)
    floats = [t for t in draft.graph.initializer if t.data_type == TensorProto.FLOAT]
    exact = {t.name: numpy_helper.to_array(t) for t in floats} if precision == "bf16" else {}
    known = {name for n in draft.graph.node for name in n.output}
    converted = _to_float16(draft, "tensor(float16)" if precision == "fp16" else "tensor(bfloat16)", fp16_io, large)
    join_casts(converted.graph, known)
    if precision == "bf16":
        retype_bfloat16(converted.graph, exact)
    drop_unused_initializers(converted.graph)
    unique_value_info(converted.graph)
    sort_nodes(converted.graph)
    converted.metadata_props.add(key=MARK, value=precision)
    return converted, []


def _to_float16(draft: onnx.ModelProto, type_name: str, fp16_io: bool, large: Collection[str] = ()) -> onnx.ModelProto:
    """Run the converter with everything sensitive, and everything the wanted type does not exist for, left out."""
    from onnxruntime.transformers import float16

    blocked_ops = set(float16.DEFAULT_OP_BLOCK_LIST) | SENSITIVE_OPS | ops_without(draft, type_name)
    half = type_name == "tensor(float16)"  # bfloat16 holds what float32 does, and its weights are not the converter's
    kept = {*large, *clipped_weights(draft.graph)} if half else set()
    blocked_nodes = spelled_out_norms(draft.graph) | nodes_at(draft.graph, kept)
    try:
        infer_types(draft)
        converted: onnx.ModelProto = float16.convert_float_to_float16(
            draft,
            keep_io_types=not fp16_io,
            disable_shape_infer=True,
            op_block_list=sorted(blocked_ops),
            node_block_list=sorted(blocked_nodes),
        )
    except (AssertionError, ValueError, RuntimeError, onnx.shape_inference.InferenceError) as e:
        raise BackendError(f"the graph could not be converted to 16 bits ({e}); build with --precision tf32") from e
    return converted


def infer_types(proto: onnx.ModelProto) -> None:
    """Add value_info for every tensor, without serialising large weights: inference takes 2 GB of bytes at most."""
    shell = onnx.ModelProto()
    shell.CopyFrom(proto)
    del shell.graph.initializer[:]
    inputs = {i.name for i in shell.graph.input}
    for t in proto.graph.initializer:
        if math.prod(t.dims) <= _SHAPE_SIZED:
            shell.graph.initializer.append(t)
        elif t.name not in inputs:
            shell.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
    inferred = onnx.shape_inference.infer_shapes(shell, data_prop=True)
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(inferred.graph.value_info)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own, by which converters pick nodes (in place)."""
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_n{number}"
        seen.add(node.name)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes that hold a tensor into initializers: the converter keeps those in float32 where it must."""
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            value.name = node.output[0]
            graph.initializer.append(value)
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
