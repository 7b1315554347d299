"""Parallel blocks whose attention and network share one layer in front, or one behind: each gets a layer of its own.

ViT-22B computes queries, keys, values and the hidden activation in one product, and so does timm's
ParallelScalingBlock; others read both branches' ends, put side by side, in one product. x [A | B] = [x A | x B] and
[a | b] [A; B] = a A + b B hold exactly, at the same cost, and every branch then looks as it does anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from toast_onnx.matching.cores import is_meeting
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.matching.linear import Linear, bias, find_linears, weights
from toast_onnx.matching.operators import MEASURING
from toast_onnx.matching.probe import is_plain
from toast_onnx.matching.respelling import Respelling, respelled
from toast_onnx.matching.walks import downstream
from toast_onnx.model import Model


@dataclass(frozen=True)
class _Slice:
    """Consecutive channels of a packed layer under a name of their own, and whether an attention reads them."""

    tensor: str
    start: int
    end: int
    attends: bool


def part_layers(view: GraphView, facts: Facts) -> Model:
    """Give the attention and the network of parallel blocks layers of their own.

    Args:
        view: the graph; it is not changed.
        facts: its facts.

    Returns:
        A model that computes the same under the same names; the same model where there is nothing to part.
    """
    parted: dict[int, Respelling] = {}
    linears = find_linears(view, facts)
    readers = {linear.node for linear in linears.values()}
    for linear in linears.values():
        if linear.channel_axis != -1 or linear.small is not None or not _alone(view, linear):
            continue
        found = _entrance(view, facts, linear, readers) or _exit(view, facts, linear)
        if found is not None and _is_free(view, found):
            parted[linear.node] = found
    return respelled(view, parted)


def _is_free(view: GraphView, parted: Respelling) -> bool:
    """Whether no tensor that stays is called as what stands in place of a packed layer."""
    made = {*parted.arrays, *(name for node in parted.nodes for name in node.output)}
    old = {name for i in parted.gone for name in view.nodes[i].output}
    return not made & {*view.producer, *view.initializers} - old


def _layer(parted: Respelling, x: str, w: np.ndarray, b: np.ndarray | None, output: str) -> None:
    """y = x W + b as MatMul and Add."""
    write, product = parted.within(output), output if b is None else f"{output}/product"
    write.node("MatMul", [x, write.constant(w, "weight")], outputs=[product])
    if b is not None:
        write.node("Add", [product, write.constant(b, "bias")], outputs=[output])


def _alone(view: GraphView, linear: Linear) -> bool:
    """Whether no other place reads the layer's weights."""
    names = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    return all(len(view.consumers.get(name, [])) == 1 for name in names)


def _entrance(view: GraphView, facts: Facts, linear: Linear, readers: set[int]) -> Respelling | None:
    """A layer that makes the operands of an attention and the hidden activation of a network."""
    found = _slices(view, facts, linear)
    if found is None:
        return None
    nodes, ranges = found
    slices = [
        _Slice(name, start, end, attends)
        for name, start, end in ranges
        if (attends := _reaches_attention(view, facts, name, readers)) is not None
    ]
    if len(slices) < len(ranges) or len({each.attends for each in slices}) < 2:
        return None
    w, b = weights(view, facts, linear), bias(view, facts, linear)
    parted = Respelling(view, linear.output, inline="Constant")
    parted.gone = {*linear.nodes, *nodes}
    runs: list[list[_Slice]] = []
    for each in slices:
        if runs and runs[-1][0].attends == each.attends:
            runs[-1].append(each)
        else:
            runs.append([each])
    for run in runs:
        start, end = run[0].start, run[-1].end
        output = run[0].tensor if len(run) == 1 else f"{run[0].tensor}/packed"
        _layer(parted, linear.input, w[:, start:end], None if b is None else b[start:end], output)
        if len(run) > 1:
            sizes, axis = [each.end - each.start for each in run], len(facts.shape(linear.output) or ()) - 1
            parted.within(output).split(output, sizes, axis, [each.tensor for each in run])
    return parted


def _slices(view: GraphView, facts: Facts, linear: Linear) -> tuple[list[int], list[tuple[str, int, int]]] | None:
    """What takes a layer's channels apart, in order; None unless all are taken once and by nothing else."""
    nodes, ranges = [], []
    axis = len(facts.shape(linear.output) or ()) - 1
    if linear.output in view.outputs:
        return None
    for i in view.consumers.get(linear.output, []):
        node = view.nodes[i]
        if node.op_type in MEASURING:
            return None
        taken = _taken(facts, node, axis, linear.out_features)
        if taken is None:
            return None
        nodes.append(i)
        ranges += taken
    ranges.sort(key=lambda each: each[1])
    bounds = [0, *(end for _, _, end in ranges)]
    if len(ranges) < 2 or [start for _, start, _ in ranges] != bounds[:-1] or bounds[-1] != linear.out_features:
        return None
    return nodes, ranges


def _taken(facts: Facts, node: onnx.NodeProto, axis: int, width: int) -> list[tuple[str, int, int]] | None:
    """(tensor, start, end) of channels that a Split or a Slice along one axis takes; None of anything else."""
    if node.op_type == "Split" and int(attribute(node, "axis", 0)) in (axis, -1):  # type: ignore[call-overload]
        extents = [(facts.shape(name) or (0,))[-1] for name in node.output]
        ends = np.cumsum(extents).tolist()
        return [(name, end - extent, end) for name, extent, end in zip(node.output, extents, ends, strict=True)]
    if node.op_type == "Slice" and len(node.input) > 3:
        values = [facts.value(name) if name else None for name in node.input[1:]]
        if any(value is None or value.size != 1 for value in values[:3]):
            return None
        start, end, along = (int(value.reshape(())) for value in values[:3] if value is not None)
        step = values[3] if len(values) > 3 else None
        if along in (axis, -1) and (step is None or int(step.reshape(())) == 1):
            start, end, _ = slice(start, end).indices(width)
            return [(node.output[0], start, end)]
    return None


def _reaches_attention(view: GraphView, facts: Facts, tensor: str, readers: set[int]) -> bool | None:
    """Whether a product of activations is met before the next layer; None where neither is."""
    layer = False
    for i, _ in downstream(view, [tensor], lambda i: i not in readers):
        if is_meeting(view, facts, i):
            return True
        layer = layer or i in readers
    return False if layer else None


def _exit(view: GraphView, facts: Facts, linear: Linear) -> Respelling | None:
    """A layer that reads the end of an attention beside the hidden activation of a network."""
    node = view.producer_of(linear.input)
    if node is None or node.op_type != "Concat" or view.only_reader(linear.input) is None:
        return None
    rank = len(facts.shape(linear.input) or ())
    extents = [(facts.shape(name) or (0,))[-1] for name in node.input]
    if int(attribute(node, "axis", 0)) % rank != rank - 1 or sum(extents) != linear.in_features:  # type: ignore[call-overload]
        return None
    attends = [_from_attention(view, facts, name) for name in node.input]
    if attends.count(True) != 1 or len(attends) != 2:
        return None
    w, b = weights(view, facts, linear), bias(view, facts, linear)
    parted = Respelling(view, linear.output)
    parted.gone = {*linear.nodes, view.producer[linear.input]}
    ends, names = np.cumsum(extents), [f"{linear.output}/{'attention' if a else 'network'}" for a in attends]
    for name, x, end, extent, a in zip(names, node.input, ends, extents, attends, strict=True):
        _layer(parted, x, w[end - extent : end], None if a else b, name)
    parted.node("Add", names, outputs=[linear.output])
    return parted


def _from_attention(view: GraphView, facts: Facts, tensor: str) -> bool:
    """Whether a tensor is a product of activations, moved at most."""
    while (i := view.producer.get(tensor)) is not None and is_plain(view, i) and view.nodes[i].op_type != "Concat":
        tensor = view.nodes[i].input[0]
    return i is not None and is_meeting(view, facts, i)
