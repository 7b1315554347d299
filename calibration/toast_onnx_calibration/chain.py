"""Passes over the samples that continue one another.

A pass ends where few activations are alive and leaves them in files; the next one starts from there. Together the
passes run every node once, and none holds more of the model than its own part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
from numpy.typing import NDArray

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.study import Study
from toast_onnx.model import reads

Array = NDArray[Any]


@dataclass(frozen=True)
class Link:
    """One pass of a chain.

    Attributes:
        takes: activations that it starts from, left by earlier passes; empty for the first, which reads samples.
        leaves: activations that later passes start from.
    """

    takes: tuple[str, ...]
    leaves: tuple[str, ...]


def chain(study: Study, watched: Sequence[Collection[str]]) -> list[Link]:
    """Where passes hand over to each other.

    Args:
        study: the model.
        watched: for every pass, the activations that it measures.
    """
    view = study.view
    varying = _varying(view)
    sights = [{name for name in names if name in varying} for names in watched]
    read_last = _last_readings(view, set().union(*sights))
    last = [max((view.producer.get(name, -1) for name in names), default=-1) + 1 for names in sights]
    alive_at: list[set[str]] = []
    at = 0
    for number in range(len(sights) - 1):
        later = set().union(*sights[number + 1 :])

        def alive(position: int, later: set[str] = later) -> set[str]:
            """Activations made before a position and read from there on."""
            made = (name for name in varying if view.producer.get(name, -1) < position)
            return {name for name in made if name in later or read_last.get(name, -1) >= position}

        low = max(at, last[number])
        at = min(range(low, max(low, last[number + 1]) + 1), key=lambda p: (_elements(study.facts, alive(p)), p))
        alive_at.append(alive(at))
    borders = [tuple(sorted(names)) for names in alive_at]
    return [Link(takes, leaves) for takes, leaves in zip([(), *borders], [*borders, ()], strict=True)]


def cut(proto: onnx.ModelProto, link: Link, outputs: Iterable[str], taken: Mapping[str, Array]) -> None:
    """Keep what a pass runs, in place: from what it takes to what it measures and leaves.

    Args:
        proto: the measuring graph.
        link: the pass.
        outputs: the tensors that it measures.
        taken: what it takes, of one run: types and ranks are read off it.
    """
    graph = proto.graph
    wanted = [*dict.fromkeys(outputs), *(name for name in link.leaves if name not in taken)]
    producer = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    kept: set[int] = set()
    pending = list(wanted)
    while pending:
        k = producer.get(pending.pop())
        if k is not None and k not in kept:
            kept.add(k)
            pending.extend(name for name in reads(graph.node[k]) if name not in taken)
    nodes = [graph.node[k] for k in sorted(kept)]
    used = {name for node in nodes for name in reads(node)}
    weights = [t for t in graph.initializer if t.name in used]
    inputs = list(graph.input)
    if taken:
        names = {t.name for t in weights}
        inputs = [i for i in inputs if i.name in names]
        inputs += [_open_input(name, array) for name, array in taken.items() if name in used]
    for field in ("node", "initializer", "input", "output", "value_info"):
        graph.ClearField(field)
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
    graph.input.extend(inputs)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)


class Spool:
    """Activations of every run, in files, from one pass to the next."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers: dict[str, int] = {}

    def keep(self, run: int, arrays: Mapping[str, Array]) -> None:
        """Store what a run of the samples left."""
        for name, array in arrays.items():
            np.save(self._path(run, name), array, allow_pickle=False)

    def read(self, run: int, names: Iterable[str]) -> dict[str, Array]:
        """What a run left."""
        return {name: np.load(self._path(run, name), allow_pickle=False) for name in names}

    def forget(self, names: Iterable[str]) -> None:
        """Remove what no later pass reads."""
        for name in names:
            for path in self._folder.glob(f"{self._number(name)}-*.npy"):
                path.unlink()

    def _path(self, run: int, name: str) -> Path:
        return self._folder / f"{self._number(name)}-{run}.npy"

    def _number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers))


def _varying(view: GraphView) -> set[str]:
    """Tensors that depend on the graph's inputs."""
    varying = {i.name for i in view.model.proto.graph.input if i.name not in view.initializers}
    for node in view.nodes:
        if any(name in varying for name in reads(node)):
            varying.update(name for name in node.output if name)
    return varying


def _last_readings(view: GraphView, tensors: Iterable[str]) -> dict[str, int]:
    """Position of the last node that reads a tensor, among the nodes that compute the given ones."""
    needed: set[int] = set()
    last: dict[str, int] = {}
    pending = list(tensors)
    while pending:
        k = view.producer.get(pending.pop())
        if k is None or k in needed:
            continue
        needed.add(k)
        for name in reads(view.nodes[k]):
            last[name] = max(last.get(name, -1), k)
            pending.append(name)
    return last


def _elements(facts: Facts, tensors: Iterable[str]) -> float:
    """How large activations are together; infinite where a shape is not known."""
    shapes = [facts.shape(name) for name in tensors]
    return sum(float("inf") if shape is None else float(np.prod(shape)) for shape in shapes)


def _open_input(name: str, array: Array) -> onnx.ValueInfoProto:
    """A graph input of an array's type and rank, its extents left open."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim)
