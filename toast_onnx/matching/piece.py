"""A piece of a graph as a model of its own: from one tensor (and masks) to another, all else frozen as far as known."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from toast_onnx.errors import MatchError
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView


def cut_piece(view: GraphView, facts: Facts, start: str, end: str, beside: Collection[str] = ()) -> onnx.ModelProto:
    """The nodes that compute `end` from `start`, at the facts' shapes.

    Args:
        view: the graph.
        facts: its facts; shape operands take their values from here.
        start: tensor that becomes the first input.
        end: tensor that becomes the only output.
        beside: tensors that become inputs, too, where they are read.

    Raises:
        MatchError: `end` depends on other activations, too.
    """
    nodes: set[int] = set()
    frozen: dict[str, np.ndarray] = {}
    pending, read = [end], set[str]()
    while pending:
        name = pending.pop()
        if name == start or name in frozen:
            continue
        if facts.value(name) is not None or facts.is_constant(name):
            frozen[name] = facts.array(name)
            continue
        if name in beside:
            read.add(name)
            continue
        i = view.producer.get(name)
        if i is None:
            raise MatchError(f"'{end}' depends on '{name}' besides '{start}'")
        if i not in nodes:
            nodes.add(i)
            pending.extend(n for n in view.nodes[i].input if n)
    source = view.model.proto
    inputs = [start, *sorted(read)]
    graph = onnx.helper.make_graph(
        [view.nodes[i] for i in sorted(nodes)],
        "piece",
        [onnx.helper.make_tensor_value_info(name, facts.elem_type(name), facts.shape(name)) for name in inputs],
        [onnx.ValueInfoProto(name=end)],
        [onnx.numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in sorted(frozen.items())],
    )
    return onnx.helper.make_model(graph, opset_imports=source.opset_import, ir_version=source.ir_version)
