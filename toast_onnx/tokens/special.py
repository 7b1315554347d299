"""Which tokens of a sequence are not made of the image: class token, distillation token, registers, queries."""

from __future__ import annotations

import numpy as np

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.matching.probe import MOVEMENT, PASSING

#: Operators between a sequence's making and its first block that act on every token alone.
_ALONE = PASSING | {
    "Add", "Mul", "Sub", "Div", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"
}  # fmt: skip


def learned_tokens(view: GraphView, facts: Facts, tensor: str) -> np.ndarray:
    """(tokens,) whether a token is made of weights alone; all False where that cannot be told.

    Args:
        view: the graph.
        facts: its facts.
        tensor: a sequence (batch, tokens, channels).
    """
    shape = facts.shape(tensor) or (0, 0, 0)
    learned: np.ndarray = np.zeros(shape[1], bool)
    if facts.is_constant(tensor):
        return ~learned
    node = view.producer_of(tensor)
    if node is None or len(shape) != 3:
        return learned
    data = [name for name in node.input if name]
    op = node.op_type
    if op in _ALONE:
        sequences = [n for n in data if (facts.shape(n) or ())[-2:] == shape[-2:] and not facts.is_constant(n)]
        if len(sequences) != 1:
            return learned
        alone: np.ndarray = learned_tokens(view, facts, sequences[0])
        return alone
    if op == "SkipLayerNormalization":
        first, second = (learned_tokens(view, facts, name) for name in node.input[:2])
        both: np.ndarray = first & second
        return both
    if op == "Concat" and int(attribute(node, "axis", 0)) % 3 == 1:  # type: ignore[call-overload]
        parts = [learned_tokens(view, facts, n) for n in data]
        return np.concatenate(parts)
    if op == "Expand":
        source = facts.shape(data[0]) or ()
        repeated = facts.is_constant(data[0]) or (len(source) == 3 and learned_tokens(view, facts, data[0]).all())
        return learned | bool(repeated)
    if op in ("Slice", "Gather") and (facts.shape(data[0]) or ())[2:] == shape[2:]:
        source = facts.shape(data[0]) or ()
        operands = [facts.value(n) for n in data[1:]]
        if len(source) != 3 or any(v is None for v in operands):
            return learned
        index = np.broadcast_to(np.arange(source[1])[None, :, None], source)
        (taken,) = facts.evaluate(node, [index, *operands])
        chosen: np.ndarray = learned_tokens(view, facts, data[0])[np.asarray(taken)[0, :, 0]]
        return chosen
    if op in MOVEMENT and _repeats_constant(view, facts, tensor):
        return ~learned
    return learned


def _repeats_constant(view: GraphView, facts: Facts, tensor: str) -> bool:
    """Whether movement alone leads from a tensor back to a constant (a token repeated for the batch)."""
    node = view.producer_of(tensor)
    while node is not None and node.op_type in MOVEMENT | PASSING and node.op_type != "Concat":
        if facts.is_constant(node.input[0]):
            return True
        node = view.producer_of(node.input[0])
    return False
