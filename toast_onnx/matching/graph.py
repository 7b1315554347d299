"""A read-only view of an ONNX graph by tensor names: who makes a tensor, who reads it, which are weights."""

from __future__ import annotations

import onnx

from toast_onnx.matching.operators import MEASURING
from toast_onnx.model import Model, reads

#: Floating-point element types.
FLOATS = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
)


class GraphView:
    """Index over the nodes of a model's main graph. Nodes are named by their position.

    Attributes:
        nodes: the nodes, in the graph's (topological) order.
        producer: tensor name -> position of the node that makes it.
        consumers: tensor name -> positions of the nodes that read it, subgraph reads counted for the owning node.
        initializers: tensor name -> initializer.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: Model) -> None:
        graph = model.proto.graph
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.initializers: dict[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        self.outputs: frozenset[str] = frozenset(o.name for o in graph.output)
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.output:
                if name:
                    self.producer[name] = i
            for name in dict.fromkeys(reads(node)):
                self.consumers.setdefault(name, []).append(i)

    def producer_of(self, tensor: str) -> onnx.NodeProto | None:
        """The node that makes a tensor; None for graph inputs and initializers."""
        i = self.producer.get(tensor)
        return None if i is None else self.nodes[i]

    def readers(self, tensor: str) -> list[int]:
        """Positions of the nodes that read what a tensor holds, and not its shape alone."""
        return [i for i in self.consumers.get(tensor, []) if self.nodes[i].op_type not in MEASURING]

    def label(self, i: int) -> str:
        """How a node is called in messages: its name, or its first output when it has none."""
        node = self.nodes[i]
        return f"'{node.name or node.output[0]}' ({node.op_type})"


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether a node's operator is one of ONNX's own."""
    return node.domain in ("", "ai.onnx")


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """Value of a node's attribute, or `default` when it is absent."""
    for a in node.attribute:
        if a.name == name:
            value: object = onnx.helper.get_attribute_value(a)
            return value
    return default
