"""A read-only view of an ONNX graph by tensor names: who makes a tensor, who reads it, which are weights."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx

from toast_onnx.matching.operators import MEASURING
from toast_onnx.model import Model, reads, stub
from toast_onnx.reasons import Decline, Kind

#: Floating-point element types.
FLOATS = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
)
#: `doc_string` of initializers that only a spelling for matching has (see `toast_onnx.matching.learned`): the identity
#: matrix that stands for the positions of learned queries and counts as data, and the queries themselves.
ROWS, LEARNED = "toast-onnx: positions of learned queries", "toast-onnx: learned queries"


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

    def only_reader(self, tensor: str) -> int | None:
        """Position of the one node that reads a tensor; None where several do, none, or the graph gives it out."""
        readers = self.consumers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def label(self, i: int) -> str:
        """How a node is called in messages: its name, or its first output when it has none."""
        node = self.nodes[i]
        return f"'{node.name or node.output[0]}' ({node.op_type})"

    def decline(self, i: int, kind: Kind, text: str, *, part: str | None = None, **values: object) -> Decline:
        """Why something is not done, at one node: `{node}` in the text is its label."""
        return kind.decline(text, node=self.label(i), part=part, **values)


def rewired(
    view: GraphView,
    made: Mapping[int, Iterable[onnx.NodeProto]],
    gone: Collection[int] = (),
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """A model with other nodes in the places of some.

    Args:
        view: the graph; it is not changed.
        made: position -> nodes in place of the one there.
        gone: positions of nodes that go besides.
        arrays: initializers to add; those that only the old nodes read then go.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(view.model.proto)
    graph = proto.graph
    del graph.node[:]
    for i, node in enumerate(view.nodes):
        if i in made or i not in gone:
            graph.node.extend(made.get(i, [node]))
    kept = dict(view.model.arrays)
    if arrays is not None:
        read = {*view.outputs, *(name for node in graph.node for name in reads(node))}
        unread = {name for i in (*made, *gone) for name in view.nodes[i].input} - read
        left = [tensor for tensor in graph.initializer if tensor.name not in unread]
        del graph.initializer[:]
        graph.initializer.extend([*left, *(stub(name, value) for name, value in arrays.items())])
        kept = {name: value for name, value in kept.items() if name not in unread} | dict(arrays)
    return Model(proto, view.model.path, kept)


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether a node's operator is one of ONNX's own."""
    return node.domain in ("", "ai.onnx")


def scopes_of(node: onnx.NodeProto) -> list[str]:
    """Module paths that PyTorch's exporter left on a node, outermost first and its operation last; mostly empty."""
    text = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    try:
        return [str(scope) for scope in ast.literal_eval(text)]
    except (ValueError, SyntaxError):
        return []


def other_input(node: onnx.NodeProto, tensor: str) -> str:
    """Of a node's two inputs the one that a tensor is not."""
    return str(node.input[1] if node.input[0] == tensor else node.input[0])


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """Value of a node's attribute, or `default` when it is absent."""
    for a in node.attribute:
        if a.name == name:
            value: object = onnx.helper.get_attribute_value(a)
            return value
    return default
