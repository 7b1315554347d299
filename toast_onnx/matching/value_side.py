"""Values that are also convolved, each channel for itself, and added to the weighted sum.

YOLO11 and YOLO12 do so (position-sensitive attention), CSWin calls it a locally enhanced position encoding. A channel
of the convolution reads one dimension of one head and is read by one input of the output projection, so V's dimensions,
the kernels and the projection's inputs can go together, by index: a basis would mix what is convolved apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from toast_onnx.matching.blocks import Branch, ValueSide
from toast_onnx.matching.facts import Facts, Probe
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.layout import Layout, check_spelling, read_layout
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.probe import check_readers, data_inputs, is_plain, passes, propagate
from toast_onnx.matching.walks import downstream
from toast_onnx.reasons import Kind

_WHAT = "the part of V that is convolved"
_AXIS = 1  # of the channels, in what a convolution reads


@dataclass(frozen=True)
class SidePath:
    """The nodes of a side, in graph order; see `ValueSide`."""

    enter: tuple[int, ...]
    start: str
    nodes: tuple[int, ...]
    end: str
    leave: tuple[int, ...]
    total: int

    @property
    def readers(self) -> frozenset[int]:
        """The nodes that may read V's layer because of it."""
        return frozenset((*self.enter, *self.nodes))


def find_side(view: GraphView, facts: Facts, linear: Linear, context: str) -> SidePath | None:
    """The way from V's layer around the attention to a sum with the weighted sum; None where there is none.

    Args:
        view: the graph.
        facts: its facts.
        linear: V's layer.
        context: the weighted sum.
    """
    for i, tensor in downstream(view, [context], lambda i: passes(view, facts, i)):
        node = view.nodes[i]
        if node.op_type == "Add" and not passes(view, facts, i):
            others = [name for name in node.input if name != tensor]
            shapes = {facts.shape(name) for name in (*node.input, *node.output)}
            path = _around(view, facts, linear, others[0], i) if len(others) == 1 and len(shapes) == 1 else None
            if path is not None:
                return path
    return None


def _around(view: GraphView, facts: Facts, linear: Linear, end: str, total: int) -> SidePath | None:
    """The way back from an addend to V's layer: movement, channels for themselves, movement."""
    end, leave = _moved_from(view, end, linear.output)
    start, nodes = end, list[int]()
    while (i := view.producer.get(start)) is not None and _acts_per_channel(view, facts, i):
        nodes.append(i)
        start = view.nodes[i].input[0]
    source, enter = _moved_from(view, start, linear.output)
    if source != linear.output or not nodes:
        return None
    ordered = (tuple(sorted(each)) for each in (enter, nodes, leave))
    before, between, behind = ordered
    return SidePath(before, start, between, end, behind, total)


def _moved_from(view: GraphView, tensor: str, goal: str) -> tuple[str, list[int]]:
    """The first tensor backwards that a node made which does more than move one tensor, and the nodes behind it."""
    nodes: list[int] = []
    while tensor != goal and (i := view.producer.get(tensor)) is not None and is_plain(view, i):
        if len(data_inputs(view, i)) != 1:
            break
        nodes.append(i)
        (tensor,) = data_inputs(view, i)
    return tensor, nodes


def _acts_per_channel(view: GraphView, facts: Facts, i: int) -> bool:
    node = view.nodes[i]
    if not is_standard(node):
        return False
    if node.op_type == "Conv":
        weight = facts.shape(node.input[1]) if facts.is_constant(node.input[1]) else None
        return weight is not None and attribute(node, "group", 1) == weight[0] and weight[1] == 1
    return node.op_type == "BatchNormalization" and len(node.output) == 1


def match_side(probe: Probe, path: SidePath, v: Branch, proj: Branch, allowed: Iterable[int]) -> ValueSide:
    """Read off where the channels of a side lie.

    Args:
        probe: the graph and its facts.
        path: its nodes.
        v: V's layer.
        proj: the output projection, reached through the sum.
        allowed: nodes that may read what V's layer makes.

    Raises:
        Decline: a channel does not meet the dimension that it is made of.
    """
    view, facts = probe.view, probe.facts
    kinds = {facts.elem_type(name) for name in (v.linear.output, path.start, path.end, proj.linear.input)}
    if len(kinds) > 1:
        raise Kind.CONVOLVED.decline("{part} changes its precision on the way", part=_WHAT)
    entered = propagate(view, facts, path.enter, v.linear.output)
    check_readers(view, [name for name in entered if name != v.linear.output], allowed, "V")
    made = [name for i in path.nodes for name in view.nodes[i].output]
    moved = [name for i in path.leave for name in view.nodes[i].output if name]
    check_readers(view, [*made, *moved], [*path.nodes, *path.leave, path.total], _WHAT)
    heads, dim = v.layout.channels.shape
    enter = _layout(probe, entered[path.start], v.linear.output, path.start, v.linear.channel_axis, _AXIS, heads)
    left = propagate(view, facts, [*path.leave, *proj.walk.nodes], path.end)
    target, axis = proj.linear.input, proj.linear.channel_axis
    leave = _layout(probe, left[target], path.end, target, _AXIS, axis, heads)
    if not np.array_equal(enter.channels, v.layout.channels):
        raise Kind.CONVOLVED.decline("{part} has its heads in another order than the attention", part=_WHAT)
    arrived = leave.channels.reshape(-1)[proj.layout.channels]  # (heads, dim) channel of the convolution
    if not np.array_equal(arrived.reshape(-1), np.arange(heads * dim)):
        raise Kind.CONVOLVED.decline(
            "{part} is added to other dimensions of the weighted sum than it is made of", part=_WHAT
        )
    return ValueSide(path.enter, path.start, path.nodes, path.end, path.leave, enter, leave)


def _layout(
    probe: Probe,
    labels: np.ndarray,
    source: str,
    target: str,
    channel_axis: int,
    dim_axis: int,
    heads: int,
) -> Layout:
    facts, other = probe.facts, probe.other
    shape, other_shape, other_target = facts.shape(source), other.shape(source), other.shape(target)
    if shape is None or other_shape is None or other_target is None:
        raise Kind.SHAPE.decline("the shape of {part} cannot be inferred", part=_WHAT)
    layout = read_layout(
        labels, shape, other_shape, other_target, channel_axis % len(shape), dim_axis, _WHAT, heads=heads
    )
    check_spelling(layout, _WHAT)
    return layout
