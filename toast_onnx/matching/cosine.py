"""Cosine attention (Swin v2): queries and keys divided by their own length before the scores.

Lengths survive any orthogonal change of basis and any zero padding, so Q and K stay prunable, with one basis for both.
"""

from __future__ import annotations

from typing import Any

import onnx

from toast_onnx.matching.facts import Facts, reduced_axes
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.matching.operators import PASSING, Trait, having


def length_division(view: GraphView, facts: Facts, tensor: str, operand: str) -> tuple[int | None, int] | None:
    """Recognise operand = moved(tensor / max(||tensor||_2, eps)), the length taken over the last axis.

    ONNX Runtime's optimizer moves a Transpose behind the length: then both sides of the division are transposed alike.

    Args:
        view: the graph.
        facts: its facts.
        tensor: queries or keys by head, dimensions last.
        operand: operand of the score product.

    Returns:
        (position of the Expand that spreads the length, None when there is none; position of the Div), or None when
        something else happens between the two tensors.
    """
    readers, rank = _readers(view, tensor), len(facts.shape(tensor) or ())
    norm = readers.pop("ReduceL2", None)
    if norm is None or tensor in view.outputs or not _over_last_axis(facts, norm, rank):
        return None
    name, expand = norm.output[0], None
    if list(readers) == ["Transpose"]:
        moved, turned = readers["Transpose"], _readers(view, name)
        perm: Any = attribute(moved, "perm")
        if list(turned) != ["Transpose"] or perm != attribute(turned["Transpose"], "perm") or perm[-1] != rank - 1:
            return None
        tensor, name = moved.output[0], turned["Transpose"].output[0]
        readers = _readers(view, tensor)
    if list(readers) != ["Div"]:
        return None
    division = readers["Div"]
    while name != division.input[1]:
        following = view.consumers.get(name, [])
        if len(following) != 1:
            return None
        node = view.nodes[following[0]]
        if node.op_type == "Expand":
            expand = following[0]
        elif node.op_type not in having(Trait.GUARDS):
            return None
        name = node.output[0]
    if division.input[0] != tensor or not _moved(view, division.output[0], operand):
        return None
    return expand, view.producer[division.output[0]]


def _readers(view: GraphView, tensor: str) -> dict[str, onnx.NodeProto]:
    """The nodes that read a tensor's values, not just its shape, by operator; none where two are of one kind."""
    nodes = [view.nodes[i] for i in view.readers(tensor)]
    found = {node.op_type: node for node in nodes}
    return found if len(found) == len(nodes) else {}


def _over_last_axis(facts: Facts, norm: onnx.NodeProto, rank: int) -> bool:
    keeps = attribute(norm, "keepdims", 1)
    return bool(keeps) and reduced_axes(facts, norm, rank) == [rank - 1]


def _moved(view: GraphView, source: str, target: str) -> bool:
    """Whether `target` is `source`, transposed at most."""
    while target != source:
        node = view.producer_of(target)
        if node is None or node.op_type not in PASSING | {"Transpose"}:
            return False
        target = node.input[0]
    return True
