"""Which tokens of a sequence are not made of the image: class token, distillation token, registers, queries."""

from __future__ import annotations

import numpy as np
import onnx

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.matching.operators import ELEMENTWISE, MOVEMENT, NORMS, PASSING

#: Operators between a sequence's making and its first block that act on every token alone.
_ALONE = ELEMENTWISE | NORMS


def learned_tokens(view: GraphView, facts: Facts, tensor: str) -> np.ndarray:
    """(tokens,) whether a token is not made of the image; all False where that cannot be told.

    Args:
        view: the graph.
        facts: its facts.
        tensor: a sequence (batch, tokens, channels).
    """
    try:
        return _learned(view, facts, tensor, {})
    except RecursionError:  # thousands of nodes in front of the first block
        return np.zeros((facts.shape(tensor) or (0, 0))[1], bool)


def _learned(view: GraphView, facts: Facts, tensor: str, known: dict[str, np.ndarray]) -> np.ndarray:
    """The same for tables (tokens, channels), too; every tensor is looked at once."""
    if tensor not in known:
        shape = facts.shape(tensor) or ()
        nothing: np.ndarray = np.zeros(shape[-2] if len(shape) > 1 else 1, bool)
        known[tensor] = ~nothing if facts.is_constant(tensor) else nothing
        node = view.producer_of(tensor)
        if node is not None and len(shape) == 3 and not facts.is_constant(tensor):
            known[tensor] = _learned_at(view, facts, node, shape, known)
    return known[tensor]


def _learned_at(
    view: GraphView, facts: Facts, node: onnx.NodeProto, shape: tuple[int, ...], known: dict[str, np.ndarray]
) -> np.ndarray:
    nothing: np.ndarray = np.zeros(shape[1], bool)
    data, op = [name for name in node.input if name], node.op_type
    if op in _ALONE:
        whole = [_learned(view, facts, n, known) for n in data if (facts.shape(n) or ())[-2:] == shape[-2:]]
        return np.logical_and.reduce(whole) if whole else nothing
    if op == "Concat" and int(attribute(node, "axis", 0)) % 3 == 1:  # type: ignore[call-overload]
        parts = [_learned(view, facts, n, known) for n in data]
        # one token beside a sequence is none of the image's, learned or made of another input
        return np.concatenate([p | (p.size == 1) for p in parts])
    if op in ("Slice", "Gather") and (facts.shape(data[0]) or ())[2:] == shape[2:]:
        source = facts.shape(data[0]) or ()
        operands = [facts.value(n) for n in data[1:]]
        if len(source) != 3 or any(v is None for v in operands):
            return nothing
        index = np.broadcast_to(np.arange(source[1])[None, :, None], source)
        (taken,) = facts.evaluate(node, [index, *operands])
        chosen: np.ndarray = _learned(view, facts, data[0], known)[np.asarray(taken)[0, :, 0]]
        return chosen
    if op in MOVEMENT and _repeats_constant(view, facts, node.output[0]):
        return ~nothing
    if op == "Expand" and len(facts.shape(data[0]) or ()) == 3:
        return nothing | bool(_learned(view, facts, data[0], known).all())
    return nothing


def _repeats_constant(view: GraphView, facts: Facts, tensor: str) -> bool:
    """Whether movement alone leads from a tensor back to a constant (a token repeated for the batch)."""
    node = view.producer_of(tensor)
    while node is not None and node.op_type in MOVEMENT | PASSING and node.op_type != "Concat":
        if facts.is_constant(node.input[0]):
            return True
        node = view.producer_of(node.input[0])
    return False
