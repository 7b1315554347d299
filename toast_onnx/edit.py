"""A graph under the knife: nodes replaced or removed at their places, everything else byte for byte as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx.helper

from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.linear import Linear
from toast_onnx.model import Model, reads, stub
from toast_onnx.nodes import NodeWriter


@dataclass(frozen=True)
class OldShape:
    """Where the extents that a tensor had before pruning can be read in the new graph.

    Attributes:
        tensor: a tensor of the new graph.
        origins: for every axis of the old tensor its fixed extent, or (axis of `tensor`, factor).
    """

    tensor: str
    origins: tuple[int | tuple[int, int], ...]


class GraphEdit:
    """Collects changes to a graph and applies them to a copy."""

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self._removed: set[int] = set()
        self._inserted: dict[int, list[onnx.NodeProto]] = {}
        self._arrays: dict[str, np.ndarray] = {}
        #: Shrunken or replaced tensors, and where their old extents can be read.
        self.changed: dict[str, OldShape] = {}
        self._names = set(view.initializers) | set(view.producer) | {n.name for n in view.nodes if n.name}
        self._names |= {i.name for i in view.model.proto.graph.input}

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return self._view.model.opset

    def fresh(self, wanted: str) -> str:
        """A name not used in the graph, `wanted` if it is free."""
        name, k = wanted, 1
        while name in self._names:
            name, k = f"{wanted}_{k}", k + 1
        self._names.add(name)
        return name

    def remove(self, nodes: Sequence[int]) -> None:
        """Remove nodes by position."""
        self._removed.update(nodes)

    def is_removed(self, i: int) -> bool:
        """Whether the node at a position was removed."""
        return i in self._removed

    def insert(self, at: int, node: onnx.NodeProto) -> None:
        """Put a node before the node at position `at` (after earlier insertions there)."""
        self._inserted.setdefault(at, []).append(node)

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer under a fresh name; returns the name."""
        name = self.fresh(name)
        self._arrays[name] = np.asarray(value, order="C")
        return name

    def replace_initializer(self, name: str, value: np.ndarray) -> None:
        """Give an existing initializer a new value (all its readers see it)."""
        self._arrays[name] = np.asarray(value, order="C")

    def emit(self, at: int, op: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> str:
        """Insert a node with one output; returns the output's name."""
        self.insert(at, onnx.helper.make_node(op, list(inputs), [output], name=self.fresh(name), **attributes))
        return output

    def rename(self, at: int, tensor: str, name: str) -> None:
        """Give the tensor made by a node inserted at `at` another name; its inserted readers follow."""
        for node in self._inserted.get(at, ()):
            for names in (node.input, node.output):
                for k, old in enumerate(names):
                    if old == tensor:
                        names[k] = name
        self.changed.update({k: replace(v, tensor=name) for k, v in self.changed.items() if v.tensor == tensor})

    def copy(self, i: int) -> onnx.NodeProto:
        """A copy of the node at a position, to be changed and given to `replace`."""
        node = onnx.NodeProto()
        node.CopyFrom(self._view.nodes[i])
        return node

    def replace(self, i: int, node: onnx.NodeProto) -> None:
        """Put a node in the place of the one at a position, behind what was inserted before it."""
        self.remove([i])
        self.insert(i, node)

    def set_attribute(self, i: int, name: str, value: object) -> None:
        """Set one attribute of the node at a position, everything else as it was."""
        node = self.copy(i)
        drop_attributes(node, name)
        node.attribute.append(onnx.helper.make_attribute(name, value))
        self.replace(i, node)

    def linear(
        self, at: int, like: Linear, x: str, w: np.ndarray, b: np.ndarray | None, output: str, name: str
    ) -> None:
        """Insert y = x @ W + b in the spelling of the layer `like`.

        Args:
            at: position to insert at.
            like: layer whose kind (MatMul + Add, Gemm, Conv) is followed.
            x: input tensor.
            w: (in_features, out_features).
            b: (out_features,), None for no bias.
            output: name of the output tensor.
            name: module path for the new names.
        """
        op = self._view.nodes[like.node].op_type
        stored = w.T.reshape(w.shape[1], w.shape[0], *[1] * like.kernel) if op == "Conv" else w
        weight = self._weight(like.weight, like.node, stored, f"{name}.weight")
        bias = None if b is None else self._weight(like.bias, like.nodes[-1], b, f"{name}.bias")
        if op in ("Gemm", "Conv"):
            inputs = [x, weight] if bias is None else [x, weight, bias]
            self.emit(at, op, inputs, output, f"{name}/{op}")
        elif bias is None:
            self.emit(at, "MatMul", [x, weight], output, f"{name}/MatMul")
        else:
            product = self.emit(at, "MatMul", [x, weight], self.fresh(f"{name}/MatMul_output"), f"{name}/MatMul")
            self.emit(at, "Add", [product, bias], output, f"{name}/Add")

    def _weight(self, old: str | None, reader: int, value: np.ndarray, name: str) -> str:
        """Store a new weight: under the old initializer's name when this layer is its only reader."""
        if old in self._view.initializers and self._view.consumers.get(old) == [reader] and old not in self._arrays:
            self.replace_initializer(old, value)
            return old
        return self.constant(name, value)

    def apply(self) -> Model:
        """The edited model: a copy without what nothing needs any more."""
        source = self._view.model
        proto = onnx.ModelProto()
        proto.CopyFrom(source.proto)
        graph = proto.graph
        nodes: list[onnx.NodeProto] = []
        for i, node in enumerate(self._view.nodes):
            nodes.extend(self._inserted.get(i, ()))
            if i not in self._removed:
                nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
        known = {t.name: t for t in graph.initializer}
        arrays = dict(source.arrays)
        for name, value in self._arrays.items():
            if name in known:
                known[name].CopyFrom(stub(name, value))
            else:
                graph.initializer.append(stub(name, value))
            arrays[name] = value
        model = Model(proto, source.path, arrays)
        tidy(model)
        return model


class PlaceWriter(NodeWriter):
    """Writes nodes at one place of a graph under one prefix.

    Attributes:
        edit: the graph's edit.
        at: position to insert at.
        name: prefix of the new names.
    """

    def __init__(self, edit: GraphEdit, at: int, name: str, numbered: bool = False) -> None:
        """Prepare.

        Args:
            edit: the graph's edit.
            at: position to insert at.
            name: prefix of the new names.
            numbered: whether tensors are called by their node and their number in it, rather than by what it does.
        """
        self.edit, self.at, self.name, self.opset = edit, at, name, edit.opset
        self._numbered = numbered

    def node(
        self, op: str, inputs: Sequence[str], what: str = "", outputs: int | Sequence[str] = 1, **attributes: Any
    ) -> list[str]:
        """Insert a node; returns the names of what it makes."""
        called = f"{self.name}/{what or op}"
        count = outputs if isinstance(outputs, int) else 0
        made = [] if isinstance(outputs, int) else list(outputs)
        if not self._numbered:
            made += [self.edit.fresh(f"{called}_output") for _ in range(count)]
        called = self.edit.fresh(called)
        if self._numbered:
            made += [self.edit.fresh(f"{called}_output_{k}") for k in range(count)]
        self.edit.insert(self.at, onnx.helper.make_node(op, list(inputs), made, name=called, **attributes))
        return made

    def constant(self, value: Any, what: str = "", dtype: Any = None) -> str:
        """Add an initializer."""
        return self.edit.constant(f"{self.name}/{what}", np.asarray(value, dtype))


def drop_attributes(node: onnx.NodeProto, *names: str) -> None:
    """Take attributes of some names from a node."""
    for a in [a for a in node.attribute if a.name in names]:
        node.attribute.remove(a)


def tidy(model: Model) -> None:
    """Drop nodes and initializers that no output needs, and value_info that may be stale; keep the rest as it is."""
    graph = model.proto.graph
    nodes = list(graph.node)
    producer = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    alive: set[int] = set()
    pending = [o.name for o in graph.output]
    while pending:
        k = producer.get(pending.pop())
        if k is not None and k not in alive:
            alive.add(k)
            pending.extend(reads(nodes[k]))
    kept = [nodes[k] for k in sorted(alive)]
    # an initializer that is an input, too, is part of what the graph promises
    used = {name for node in kept for name in reads(node)}
    used |= {value.name for values in (graph.input, graph.output) for value in values}
    initializers = [t for t in graph.initializer if t.name in used]
    if len(kept) < len(nodes):
        del graph.node[:]
        graph.node.extend(kept)
    if len(initializers) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(initializers)
    names = {t.name for t in initializers}
    model.arrays = {name: value for name, value in model.arrays.items() if name in names}
    del graph.value_info[:]
