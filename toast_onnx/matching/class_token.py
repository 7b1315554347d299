"""Does the output read the class token alone? Proven on the graph, by walking back from every output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.walks import upstream


@dataclass(frozen=True)
class ClassToken:
    """The one place where tokens are selected.

    Attributes:
        tensor: the token sequence, (batch, tokens, channels).
        tokens: its number of tokens at the facts' shapes, the class token included.
    """

    tensor: str
    tokens: int


def class_token(view: GraphView, facts: Facts) -> ClassToken | None:
    """The class token that all outputs depend on through token 0 alone; None where that cannot be shown.

    Every path from an output back to an input must pass the same selection of index 0 on axis 1 of one (batch, tokens,
    channels) tensor. A model that also returns its tokens, or averages them, has a path around it.
    """
    found: set[str] = set()
    for i in upstream(view, facts, view.outputs, stop=lambda i: selects_first_token(view, facts, i)):
        if i is None:
            return None  # an input reached around the selection
        if selects_first_token(view, facts, i):
            found.add(view.nodes[i].input[0])
    if len(found) != 1:
        return None
    (source,) = found
    shape = facts.shape(source)
    return None if shape is None else ClassToken(source, shape[1])


def selects_first_token(view: GraphView, facts: Facts, i: int) -> bool:
    """Whether a node takes index 0, and nothing else, from axis 1 of a (batch, tokens, channels) tensor."""
    node = view.nodes[i]
    if not is_standard(node) or node.op_type not in ("Gather", "Slice"):
        return False
    shape = facts.shape(node.input[0])
    if shape is None or len(shape) != 3 or shape[1] < 2:
        return False
    if node.op_type == "Gather":
        indices = facts.value(node.input[1])
        axis = int(attribute(node, "axis", 0))  # type: ignore[call-overload]
        return axis % 3 == 1 and indices is not None and bool((np.asarray(indices) == 0).all())
    out = facts.shape(node.output[0])
    operands = [facts.value(name) if name else None for name in node.input[1:]]
    if out != (shape[0], 1, shape[2]) or len(operands) < 3 or operands[0] is None or operands[2] is None:
        return False
    starts = dict(zip(np.asarray(operands[2]).reshape(-1) % 3, np.asarray(operands[0]).reshape(-1), strict=True))
    return int(starts.get(1, -1)) == 0
