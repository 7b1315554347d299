"""Learned queries: constants in the place of Q, spelled as a layer whose weights they are.

Q (rows, heads x dim) = I Q: a layer that reads an identity matrix makes one query of each of its rows. So learned
queries lose dimensions together with their keys like any other layer's; `toast_onnx.rewriting.learned` makes them
constants again. What an exporter left in front of them (a class token through a linear layer) is folded into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from toast_onnx.matching.cores import is_product, leads_to_softmax
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import LEARNED, ROWS, GraphView, attribute, rewired
from toast_onnx.matching.layout import HEAD, Factor, read_layout
from toast_onnx.matching.linear import Linear, find_linears
from toast_onnx.matching.operators import ATTENTIONS
from toast_onnx.matching.probe import propagate, walk_back
from toast_onnx.matching.respelling import Respelling, free_prefix
from toast_onnx.model import Model, stub
from toast_onnx.reasons import Decline

#: More queries than these are left alone: their identity matrix is as large as their number squared.
MOST = 2048
#: Last part of an initializer's name -> what marks it.
_MARKS = {"rows": ROWS, "weight": LEARNED}


@dataclass(frozen=True)
class LearnedQueries:
    """Constant queries that are spelled as a layer.

    Attributes:
        tensor: the constant, as the graph had it.
        layer: what the layer makes.
        reader: first output of the node that reads it.
    """

    tensor: str
    layer: str
    reader: str


def spell_learned(view: GraphView, facts: Facts) -> tuple[Model, tuple[LearnedQueries, ...]]:
    """Write constant queries as MatMul of an identity matrix and their values.

    Args:
        view: the graph; it is not changed.
        facts: its facts.

    Returns:
        The model (the very same one where there are none), and what was spelled.
    """
    linears = find_linears(view, facts)
    found = {i: spelled for i in range(len(view.nodes)) if (spelled := _spelled(view, facts, linears, i)) is not None}
    if not found:
        return view.model, ()
    model = rewired(view, {i: write.nodes for i, (write, _) in found.items()})  # the constants stay, to be put back
    for name, value in (item for write, _ in found.values() for item in write.arrays.items()):
        tensor = stub(name, value)
        tensor.doc_string = _MARKS.get(name.rpartition("/")[2], "")
        model.proto.graph.initializer.append(tensor)
        model.arrays[name] = value
    return model, tuple(queries for _, queries in found.values())


def _spelled(
    view: GraphView, facts: Facts, linears: Mapping[str, Linear], i: int
) -> tuple[Respelling, LearnedQueries] | None:
    """What stands in place of an attention's first node where its queries are constant; None for any other node."""
    node = view.nodes[i]
    if len(node.input) < 2 or not facts.is_constant(node.input[0]) or facts.is_constant(node.input[1]):
        return None
    shape = facts.shape(node.input[0]) or ()
    if node.op_type in ATTENTIONS and len(shape) == 3:
        axes: list[tuple[Factor, ...]] | None = [(Factor(0, 1, shape[0]),)]
    elif node.op_type in ATTENTIONS or is_product(view, facts, i, learned=True):
        axes = _as_keys(view, facts, linears, i) if len(shape) > 1 else None
    else:
        return None
    if axes is None or not (node.op_type in ATTENTIONS or leads_to_softmax(view, facts, i)):
        return None
    return _layer(view, facts, i, [list(factors) for factors in axes])


def _as_keys(view: GraphView, facts: Facts, linears: Mapping[str, Linear], i: int) -> list[tuple[Factor, ...]] | None:
    """Heads and positions on every leading axis of the queries, as the keys have them; None where they do not fit."""
    node = view.nodes[i]
    q, k = (facts.shape(name) or () for name in node.input[:2])
    last = node.op_type in ATTENTIONS or bool(attribute(node, "transB", 0))
    try:
        walk = walk_back(view, facts, linears, node.input[1], "K")
        source = facts.shape(walk.linear.output) or ()
        labels = propagate(view, facts, walk.nodes, walk.linear.output).get(node.input[1])
        if walk.ends_early or labels is None:
            return None
        channel = walk.linear.channel_axis % len(source)
        layout = read_layout(labels, source, source, k, channel, -1 if last else -2, "K")
    except Decline:
        return None
    axes: list[tuple[Factor, ...]] = []
    for axis, extent in enumerate(q[:-2], len(k) - len(q)):
        factors = layout.axes[axis] if axis >= 0 else ()
        if extent != 1 and (axis < 0 or extent != k[axis]):
            return None
        if extent == 1 and any(f.source == HEAD for f in factors):
            return None  # the same queries for all heads
        axes.append(() if extent == 1 else factors)
    return axes


def _layer(view: GraphView, facts: Facts, i: int, axes: list[list[Factor]]) -> tuple[Respelling, LearnedQueries] | None:
    """The layer and the data movement behind it, in front of the node as it was.

    queries (leading axes, queries, dim) -> (positions, queries, heads, dim) -> weights (rows, heads x dim)
    """
    node, value = view.nodes[i], facts.array(view.nodes[i].input[0])
    every = [f for factors in axes for f in factors]
    shape = [*(f.size for f in every), *value.shape[-2:]]
    heads = [k for k, f in enumerate(every) if f.source == HEAD]
    order = [*(k for k in range(len(every) + 1) if k not in heads), *heads, len(every) + 1]
    moved = value.reshape(shape).transpose(order)
    rows = int(np.prod(moved.shape[: len(order) - len(heads) - 1]))
    if rows > MOST or value.dtype.kind == "i":
        return None
    write = Respelling(view, free_prefix(view, f"{node.output[0]}/queries"))
    eye = write.constant(np.eye(rows, dtype=value.dtype), "rows")
    layer = write.one("MatMul", [eye, write.constant(moved.reshape(rows, -1), "weight")])
    split = write.reshape(layer, moved.shape, called="split")
    turned = write.one("Transpose", [split], perm=np.argsort(order).tolist())
    whole = write.numbers(value.shape, "shape")
    operand = write.one("Reshape", [turned, whole], outputs=[f"{write.tensors}/values"])
    for k, made in enumerate(write.nodes):  # the path in a name, and the metadata, tell the block that a node is in
        made.name = f"{node.name or node.output[0]}_queries_{k}"
        made.metadata_props.extend(node.metadata_props)
    core = onnx.NodeProto()
    core.CopyFrom(node)
    core.input[0] = operand
    write.nodes.append(core)
    return write, LearnedQueries(node.input[0], layer, node.output[0])
