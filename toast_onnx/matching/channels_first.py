"""Attention over images with channels first, turned to the common order: V P^T becomes (P V^T)^T.

CoAtNet and SHViT weight values (..., head_dim, tokens) by transposed
probabilities. (A B)^T = B^T A^T, and the transposes are data movement that the matching follows anywhere.
"""

from __future__ import annotations

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.operators import PASSING
from toast_onnx.matching.respelling import Respelling, respelled
from toast_onnx.model import Model


def turn_products(view: GraphView, facts: Facts) -> Model:
    """Turn every product of values with transposed probabilities.

    Args:
        view: the graph; it is not changed.
        facts: its facts.

    Returns:
        A model that computes the same under the same names; the same model where there is nothing to turn.
    """
    found = {i: turned for i in range(len(view.nodes)) if (turned := _turned(view, facts, i)) is not None}
    return respelled(view, found)


def _turned(view: GraphView, facts: Facts, i: int) -> Respelling | None:
    """The nodes in place of a product of values with transposed probabilities; None for any other node."""
    node = view.nodes[i]
    transpose = view.producer_of(node.input[1]) if node.op_type == "MatMul" and is_standard(node) else None
    if transpose is None or transpose.op_type != "Transpose":
        return None
    perm = list(attribute(transpose, "perm", []))  # type: ignore[call-overload]
    swapped = [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
    ranks = {len(facts.shape(tensor) or ()) for tensor in node.input}
    if len(perm) < 3 or perm != swapped or ranks != {len(perm)} or not from_softmax(view, transpose.input[0]):
        return None
    write = Respelling(view, node.name or node.output[0])
    values, context = f"{node.output[0]}/values", f"{node.output[0]}/context"
    if {values, context} & {*view.producer, *view.initializers}:
        return None
    write.node("Transpose", [node.input[0]], "values/Transpose", [values], perm=perm)
    write.node("MatMul", [transpose.input[0], values], "", [context])
    write.nodes[-1].name = write.name  # the product keeps its name
    write.node("Transpose", [context], "context/Transpose", [node.output[0]], perm=perm)
    if view.only_reader(node.input[1]) is not None:
        write.gone.add(view.producer[node.input[1]])
    return write


def from_softmax(view: GraphView, tensor: str) -> bool:
    """Whether a tensor holds the probabilities of a Softmax as they are."""
    node = view.producer_of(tensor)
    while node is not None and node.op_type in PASSING:
        node = view.producer_of(node.input[0])
    return node is not None and node.op_type == "Softmax"
