"""Choices that a graph makes between numbers: the twin takes over those of the pruned graph.

A detector picks its queries by TopK and its boxes by NonMaxSuppression. Where two scores are close, rounding alone
decides, and everything behind differs. So both graphs go on with one choice, and the scores it was made from are
compared instead: the operator that chooses is the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx.helper

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import FLOATS, attribute, is_standard
from toast_onnx.matching.operators import POSITIONS
from toast_onnx.model import Model


@dataclass(frozen=True)
class Decision:
    """One choice.

    Attributes:
        made: tensor of the chosen positions in the pruned graph.
        given: the twin's input for it.
        scores: what the positions were chosen by, and for TopK the values there.
    """

    made: str
    given: str
    scores: tuple[str, ...]


def follow_decisions(twin: Model, pruned: Model, facts: Facts) -> tuple[Model, tuple[Decision, ...]]:
    """Turn the positions that a twin would choose into inputs, wherever the pruned graph chooses by the same node.

    Args:
        twin: the padded twin; it is not changed.
        pruned: the graph whose choices it takes over.
        facts: facts of the original graph, whose tensors keep their names in the twin.

    Returns:
        The twin with an input for every choice (the very same one where there is none), and the choices.
    """
    opset = next(o.version for o in twin.proto.opset_import if o.domain in ("", "ai.onnx"))
    theirs = {tuple(node.output): node for node in pruned.proto.graph.node if node.op_type in POSITIONS}
    taken = {name for node in twin.proto.graph.node for name in node.output} | {i.name for i in twin.proto.graph.input}
    decisions: list[Decision] = []
    nodes: list[onnx.NodeProto] = []
    for node in twin.proto.graph.node:
        alike = opset >= 11 and theirs.get(tuple(node.output)) == node  # GatherElements came with opset 11
        decision = _decision(node, facts) if alike else None
        if decision is None or decision.given in taken:
            nodes.append(node)
            continue
        decisions.append(decision)
        nodes.append(onnx.helper.make_node("Identity", [decision.given], [decision.made], name=decision.given))
        if node.op_type == "TopK" and node.output[0]:
            axis, operands = attribute(node, "axis", -1), [node.input[0], decision.given]
            name = f"{decision.made}/values"
            nodes.append(onnx.helper.make_node("GatherElements", operands, [node.output[0]], name=name, axis=axis))
    if not decisions:
        return twin, ()
    proto = onnx.ModelProto()
    proto.CopyFrom(twin.proto)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(d.given, onnx.TensorProto.INT64, None) for d in decisions
    )
    return Model(proto, twin.path, twin.arrays), tuple(decisions)


def _decision(node: onnx.NodeProto, facts: Facts) -> Decision | None:
    position = POSITIONS.get(node.op_type) if is_standard(node) else None
    if position is None or len(node.output) <= position or not node.output[position]:
        return None
    made = [name for name in node.input if name and not facts.is_constant(name)]
    if not any(facts.elem_type(name) in FLOATS for name in made):
        return None
    # Scores that are masked by huge numbers tell little of the others; those that were chosen do.
    values = [node.output[0]] if node.op_type == "TopK" and node.output[0] else []
    return Decision(node.output[position], f"{node.output[position]}/given", (*made, *values))
