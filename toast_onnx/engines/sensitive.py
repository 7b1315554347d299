"""Nodes that stay in float32 when a graph goes to 16 bits: normalisations, Softmax, operators without such a type."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from toast_onnx.matching.operators import NORMS, PASSING, RESHAPING, Effect, operators

#: Operators whose sums, squares or exponentials leave float16's range or lose its 11 bits.
SENSITIVE_OPS = NORMS | operators(Effect.NORMS_IMAGES, Effect.NORMS_CHANNELS, Effect.SHARES)
#: What lies between a sum and the division it is for; movement, where the summed axis goes and comes back.
_STEPS = PASSING | RESHAPING | {"Add", "Clip", "Expand", "Max", "Pow", "Sqrt", "Sub", "Transpose"}
#: Where the converter clips weights, and from where on a number in a mask only means "very small".
CLIPPED_AT, STANDS_FOR_INFINITY = 1e4, 1e30
_ENDS = frozenset({"Div", "Reciprocal"})


def ops_without(proto: onnx.ModelProto, type_name: str) -> set[str]:
    """Operators of a graph whose definition at its opset takes float32 but not another type.

    Conv, for one, takes bfloat16 from opset 22 on.

    Args:
        proto: the model.
        type_name: the type as ONNX schemas spell it, such as `tensor(bfloat16)`.
    """
    versions = {o.domain or "ai.onnx": o.version for o in proto.opset_import}
    found = set()
    for op_type, domain in {(n.op_type, n.domain) for n in proto.graph.node} - {("Cast", "")}:
        try:
            schema = onnx.defs.get_schema(op_type, versions.get(domain or "ai.onnx", 1), domain)
        except onnx.defs.SchemaError:
            continue
        taken = (set(c.allowed_type_strs) for c in schema.type_constraints)
        if any("tensor(float)" in types and type_name not in types for types in taken):
            found.add(op_type)
    return found


def clipped_weights(graph: onnx.GraphProto) -> set[str]:
    """Names of float32 weights that ONNX Runtime's converter would clip, where that would change a result.

    It clips at 10,000, for the sake of masks whose entries stand for minus infinity; those may be clipped.
    """
    found = set()
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            sizes = np.abs(numpy_helper.to_array(tensor))
            if ((sizes > CLIPPED_AT) & (sizes < STANDS_FOR_INFINITY)).any():
                found.add(tensor.name)
    return found


def nodes_at(graph: onnx.GraphProto, tensors: Collection[str]) -> set[str]:
    """Names of the nodes that make or read one of some tensors."""
    wanted = set(tensors)
    return {node.name for node in graph.node if not wanted.isdisjoint((*node.input, *node.output))}


def spelled_out_norms(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes that make up normalisations written node by node, as exports up to opset 16 write LayerNorm.

    The anchor is a reduction whose result reaches a division through nothing but differences, squares, roots and an
    epsilon. That covers LayerNorm, RMSNorm and the L2 norm of cosine attention, and leaves mean pooling alone.
    """
    producers = {name: n for n in graph.node for name in n.output}
    constants = {t.name for t in graph.initializer}
    consumers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    found: set[str] = set()
    for reduction in (n for n in graph.node if n.op_type in operators(Effect.SUMS)):
        below = list(_steps_below(reduction, consumers, constants))
        if any(n.op_type in _ENDS for n in below):
            above = producers.get(reduction.input[0])
            squares = [above] if above is not None and _is_square(above) else []
            found.update(n.name for n in (reduction, *below, *squares))
    return found


def _is_square(node: NodeProto) -> bool:
    return node.op_type == "Pow" or (node.op_type == "Mul" and node.input[0] == node.input[1])


def _steps_below(node: NodeProto, consumers: dict[str, list[NodeProto]], constants: set[str]) -> Iterator[NodeProto]:
    """Nodes below a reduction up to and with the division; an Add counts only where it adds a constant."""
    for reader in (r for name in node.output for r in consumers[name]):
        if reader.op_type in _ENDS:
            yield reader
        elif reader.op_type in _STEPS and (reader.op_type != "Add" or not constants.isdisjoint(reader.input)):
            yield reader
            yield from _steps_below(reader, consumers, constants)
