"""Whether a tensor holds one value everywhere: masks that mask nothing, repeated for the batch."""

from __future__ import annotations

import numpy as np

from toast_onnx.errors import ModelError
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.operators import ELEMENTWISE, Effect, operators

#: Operators whose first operand's values are all that their outputs hold.
_MOVES = operators(Effect.RESHAPES, Effect.MOVES)


def uniform_value(view: GraphView, facts: Facts, tensor: str) -> np.ndarray | None:
    """The one value () that all elements of a tensor have, whatever the input holds; None where they differ.

    Args:
        view: the graph.
        facts: its facts.
        tensor: the tensor.
    """
    try:
        return _uniform(view, facts, tensor, {})
    except RecursionError:
        return None


def _uniform(view: GraphView, facts: Facts, tensor: str, known: dict[str, np.ndarray | None]) -> np.ndarray | None:
    """The same; every tensor is looked at once."""
    if tensor not in known:
        known[tensor] = _uniform_at(view, facts, tensor, known)
    return known[tensor]


def _uniform_at(view: GraphView, facts: Facts, tensor: str, known: dict[str, np.ndarray | None]) -> np.ndarray | None:
    if facts.is_constant(tensor) or (small := facts.value(tensor)) is not None:
        value = facts.array(tensor) if facts.is_constant(tensor) else np.asarray(small)
        same = value.size > 0 and bool((value == value.reshape(-1)[0]).all())
        return value.reshape(-1)[0].reshape(()) if same else None
    node = view.producer_of(tensor)
    if node is None or not is_standard(node):
        return None
    if node.op_type == "ConstantOfShape":
        if attribute(node, "value") is None:
            return np.asarray(0, np.float32)
        return np.asarray(facts.evaluate(node, [np.ones(1, np.int64)])[0][0])
    if node.op_type in _MOVES:
        return _uniform(view, facts, node.input[0], known)
    if node.op_type in ELEMENTWISE:
        operands = [_uniform(view, facts, name, known) for name in node.input]
        if any(v is None for v in operands):
            return None
        try:
            return np.asarray(facts.evaluate(node, operands)[0]).reshape(())
        except ModelError:
            return None
    return None
