"""Softmax as people write it by hand: exp(x - max x) / sum of it, or the exponential of a LogSoftmax.

In an attention it becomes the operator that it is: exact, as a softmax does not change with what is subtracted from all
of its inputs, and the operator guards itself against overflow.
"""

from __future__ import annotations

from toast_onnx.matching.cores import weighs_values
from toast_onnx.matching.facts import Facts, reduced_axes
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.respelling import Respelling, respelled
from toast_onnx.model import Model


def spell_softmaxes(view: GraphView, facts: Facts) -> Model:
    """Write softmaxes over the last axis that weigh values as the operator.

    Args:
        view: the graph; it is not changed.
        facts: its facts.

    Returns:
        A model that computes the same under the same names; the same model where there is nothing to write.
    """
    found = {i: spelled for i in range(len(view.nodes)) if (spelled := _spelled(view, facts, i)) is not None}
    return respelled(view, found)


def _spelled(view: GraphView, facts: Facts, i: int) -> Respelling | None:
    """The operator in place of a node that ends a softmax; None for any other node."""
    node = view.nodes[i]
    if not is_standard(node) or node.op_type not in ("Exp", "Div"):
        return None
    found = _exponential(view, facts, i) if node.op_type == "Exp" else _quotient(view, facts, i)
    if found is None or not weighs_values(view, facts, node.output[0]):
        return None
    scores, gone = found
    write = Respelling(view, node.name)
    write.node("Softmax", [scores], outputs=[node.output[0]], axis=len(facts.shape(scores) or ()) - 1)
    write.nodes[-1].name = node.name
    write.nodes[-1].metadata_props.extend(node.metadata_props)
    write.gone = gone
    return write


def _exponential(view: GraphView, facts: Facts, i: int) -> tuple[str, set[int]] | None:
    """x, and the nodes besides the last one, of exp(LogSoftmax(x))."""
    inner = view.producer.get(view.nodes[i].input[0])
    if inner is None or view.nodes[inner].op_type != "LogSoftmax" or not _read_by(view, inner, i):
        return None
    rank = len(facts.shape(view.nodes[inner].input[0]) or ())
    default = -1 if view.model.opset >= 13 else 1
    axis = int(attribute(view.nodes[inner], "axis", default))  # type: ignore[call-overload]
    return (view.nodes[inner].input[0], {inner}) if rank and axis % rank == rank - 1 else None


def _quotient(view: GraphView, facts: Facts, i: int) -> tuple[str, set[int]] | None:
    """x, and the nodes besides the last one, of exp(x) / sum(exp(x)); y where x is what is left of y - max(y)."""
    above, below = (view.producer.get(name) for name in view.nodes[i].input)
    if above is None or below is None or view.nodes[above].op_type != "Exp":
        return None
    if not _reduces(view, facts, below, "ReduceSum", view.nodes[above].output[0]):
        return None
    if not (_read_by(view, above, below, i) and _read_by(view, below, i)):
        return None
    x = view.nodes[above].input[0]
    shift = view.producer.get(x)
    if shift is None or view.nodes[shift].op_type != "Sub" or not _read_by(view, shift, above):
        return x, {above, below}
    y, most = view.nodes[shift].input[0], view.producer.get(view.nodes[shift].input[1])
    if most is None or not _reduces(view, facts, most, "ReduceMax", y) or not _read_by(view, most, shift):
        return x, {above, below}
    return y, {above, below, shift, most}


def _reduces(view: GraphView, facts: Facts, i: int, op: str, tensor: str) -> bool:
    """Whether a node reduces a tensor along its last axis, which stays as one."""
    node, rank = view.nodes[i], len(facts.shape(tensor) or ())
    if node.op_type != op or node.input[0] != tensor or not rank:
        return False
    return attribute(node, "keepdims", 1) == 1 and reduced_axes(facts, node, rank) == [rank - 1]


def _read_by(view: GraphView, i: int, *readers: int) -> bool:
    """Whether these nodes, and nothing else, read what a node makes."""
    (made,) = view.nodes[i].output
    return made not in view.outputs and sorted(view.consumers.get(made, [])) == sorted(readers)
