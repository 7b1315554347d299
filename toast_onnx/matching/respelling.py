"""Writing what stands in place of nodes before anything is matched: the same, spelled as the matching knows it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from toast_onnx.matching.graph import GraphView, rewired
from toast_onnx.model import Model
from toast_onnx.nodes import NodeWriter


class Respelling(NodeWriter):
    """Writes nodes, and weights that they read, in place of one node.

    Attributes:
        name: prefix of the new nodes' names.
        tensors: prefix of the new tensors' names.
        nodes: what was written.
        arrays: initializers that were written.
        gone: positions of nodes that go besides.
    """

    def __init__(self, view: GraphView, name: str, tensors: str = "", inline: str = "") -> None:
        """Start with nothing.

        Args:
            view: the graph.
            name: prefix of the new nodes' names.
            tensors: prefix of the new tensors' names, where it is another.
            inline: how Constant nodes are called that hold numbers; without it numbers become initializers.
        """
        self.opset, self.name, self.tensors, self._inline = view.model.opset, name, tensors or name, inline
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.gone: set[int] = set()

    def within(self, name: str) -> Respelling:
        """A writer of the same nodes and weights under another prefix."""
        inside = copy.copy(self)
        inside.name = inside.tensors = name
        return inside

    def node(
        self, op: str, inputs: Sequence[str], what: str = "", outputs: int | Sequence[str] = 1, **attributes: Any
    ) -> list[str]:
        """Write a node; what it makes is numbered unless it is named."""
        if isinstance(outputs, int):
            outputs = [f"{self.tensors}/{len(self.nodes)}_{k}" for k in range(outputs)]
        called = f"{self.name}/{what or op}"
        self.nodes.append(onnx.helper.make_node(op, list(inputs), list(outputs), name=called, **attributes))
        return list(outputs)

    def constant(self, value: Any, what: str = "", dtype: Any = None) -> str:
        """Write an initializer."""
        self.arrays[f"{self.tensors}/{what}"] = np.asarray(value, dtype, order="C")
        return f"{self.tensors}/{what}"

    def numbers(self, values: Sequence[int], what: str = "numbers") -> str:
        """An int64 constant."""
        if not self._inline:
            return super().numbers(values, what)
        value = onnx.numpy_helper.from_array(np.asarray(values, np.int64))
        return self.node("Constant", [], self._inline.format(what), [f"{self.tensors}/{what}"], value=value)[0]


def free_prefix(view: GraphView, wanted: str) -> str:
    """A prefix that no tensor and no node has."""
    taken = {*view.producer, *view.initializers, *(node.name for node in view.nodes)}
    while any(name.startswith(f"{wanted}/") for name in taken):
        wanted += "_spelled"
    return wanted


def respelled(view: GraphView, found: Mapping[int, Respelling]) -> Model:
    """The model with nodes respelled, by their position; the very same one where there are none."""
    if not found:
        return view.model
    arrays = {name: value for each in found.values() for name, value in each.arrays.items()}
    gone = {i for each in found.values() for i in each.gone}
    return rewired(view, {i: each.nodes for i, each in found.items()}, gone, arrays or None)
