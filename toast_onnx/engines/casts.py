"""Tidying a graph after casts were put into it: needless pairs removed, float16 made bfloat16."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from toast_onnx.model import reads


def _read_names(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node for name in reads(node)} | {o.name for o in graph.output}


def _cast_type(node: NodeProto) -> int:
    """The type a Cast node casts to; 0 for other nodes."""
    return next((a.i for a in node.attribute if a.name == "to"), 0) if node.op_type == "Cast" else 0


def join_casts(graph: onnx.GraphProto, known: set[str]) -> None:
    """Remove casts that cancel: float32 -> float16 -> float32 between two nodes that both stay in float32.

    A second cast of one tensor to one type is removed too. Only casts added by the converter are touched.

    Args:
        graph: the graph, changed in place.
        known: names of the tensors that were there before the conversion; casts that make them are left alone.
    """
    kept: dict[str, NodeProto] = {}
    for node in graph.node:
        kept.setdefault(node.output[0], node)
    down = {o: n.input[0] for o, n in kept.items() if _cast_type(n) == TensorProto.FLOAT16 and n.name.endswith("_node")}
    up = {o: n.input[0] for o, n in kept.items() if _cast_type(n) == TensorProto.FLOAT and o not in known}
    source = {out: down[middle] for out, middle in up.items() if middle in down}
    nodes = list(kept.values())
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = source.get(name, name)
    _replace_nodes(graph, nodes)
    added = set(down) | set(up)
    while True:
        read = _read_names(graph)
        alive = [n for n in graph.node if n.output[0] not in added or n.output[0] in read]
        if len(alive) == len(graph.node):
            return
        _replace_nodes(graph, alive)


def _replace_nodes(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    nodes = list(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def unique_value_info(graph: onnx.GraphProto) -> None:
    """Keep one value_info a tensor, of tensors that the graph still makes and that are no input or output."""
    made = {name for n in graph.node for name in n.output} - {o.name for o in graph.output}
    kept = {v.name: v for v in graph.value_info if v.name in made}
    values = list(kept.values())
    del graph.value_info[:]
    graph.value_info.extend(values)


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    """Remove weights that no node reads."""
    read = _read_names(graph)
    kept = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def retype_bfloat16(graph: onnx.GraphProto, exact: Mapping[str, np.ndarray]) -> None:
    """Make bfloat16 of everything that is float16.

    Args:
        graph: the graph, changed in place; it held no float16 before its conversion.
        exact: float32 values of its weights by name, so that each is rounded once.
    """
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            value = exact[tensor.name] if tensor.name in exact else numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(value.astype(ml_dtypes.bfloat16), tensor.name))
    for value_info in (*graph.input, *graph.output, *graph.value_info):
        if value_info.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value_info.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.BFLOAT16
        elif attribute.t.data_type == TensorProto.FLOAT16:
            half = numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(numpy_helper.from_array(half.astype(ml_dtypes.bfloat16), attribute.t.name))
        for inner in (attribute.g, *attribute.graphs):
            if inner.node:
                retype_bfloat16(inner, exact)
