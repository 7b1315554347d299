"""Learned queries made constants again that were spelled as layers for matching (`toast_onnx.matching.learned`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from toast_onnx.edit import GraphEdit, tidy
from toast_onnx.matching.facts import evaluate_node
from toast_onnx.matching.graph import ROWS, GraphView
from toast_onnx.matching.learned import LearnedQueries
from toast_onnx.model import Model, stub


def put_back(edit: GraphEdit, view: GraphView, learned: Sequence[LearnedQueries]) -> None:
    """Let attentions whose queries were not written anew read them as the graph had them.

    Args:
        edit: the graph's edit, complete but for this.
        view: the graph.
        learned: what is spelled in it.
    """
    for each in learned:
        reader = view.producer[each.reader]
        if not edit.is_removed(view.producer[each.layer]) and not edit.is_removed(reader):
            node = edit.copy(reader)
            node.input[0] = each.tensor
            edit.replace(reader, node)


def fold_learned(model: Model) -> Model:
    """Evaluate the layers that read an identity matrix, and the data movement behind them (in place).

    Args:
        model: the edited model.

    Returns:
        The model.
    """
    graph = model.proto.graph
    marked = {t.name: t for t in graph.initializer if t.doc_string == ROWS}
    if not marked:
        return model
    view = GraphView(model)
    opsets = {o.domain: o.version for o in model.proto.opset_import}
    values: dict[str, np.ndarray] = {name: model.array(tensor) for name, tensor in marked.items()}
    left = []
    for node in graph.node:
        inputs = _inputs(view, node, values, opsets) if any(n in values for n in node.input) else None
        if inputs is None:
            left.append(node)
        else:
            values.update(zip(node.output, evaluate_node(node, inputs, opsets), strict=True))
    read = {name for node in left for name in node.input}
    del graph.node[:]
    graph.node.extend(left)
    for name in values.keys() & read - marked.keys():
        model.arrays[name] = np.ascontiguousarray(values[name])
        graph.initializer.append(stub(name, model.arrays[name]))
    tidy(model)
    return model


def _inputs(
    view: GraphView, node: onnx.NodeProto, values: Mapping[str, np.ndarray], opsets: Mapping[str, int]
) -> list[np.ndarray] | None:
    """Values of all inputs of a node; None where one follows from the graph's inputs."""
    found = []
    for name in node.input:
        made = view.producer_of(name)
        if name in values:
            found.append(values[name])
        elif name in view.initializers:
            found.append(view.model.array(view.initializers[name]))
        elif made is not None and made.op_type == "Constant":
            found.append(evaluate_node(made, [], opsets)[0])
        else:
            return None
    return found
