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
    at, end = 0, len(view.nodes)
    for number in range(len(sights) - 1):
        later = set().union(*sights[number + 1 :])

        # an activation is alive from behind the node that makes it up to the last node, or later pass, that reads it
        spans = {n: (view.producer.get(n, -1) + 1, end if n in later else read_last.get(n, -1)) for n in varying}
        low = max(at, last[number])
        sizes = _sizes(study.facts, spans, end)
        at = min(range(low, max(low, last[number + 1]) + 1), key=lambda p: (sizes[p], p))
        alive_at.append({name for name, (first, final) in spans.items() if first <= at <= final})
    borders = [tuple(sorted(names)) for names in alive_at]
    return [Link(takes, leaves) for takes, leaves in zip([(), *borders], [*borders, ()], strict=True)]


def cut(proto: onnx.ModelProto, link: Link, outputs: Iterable[str], taken: Mapping[str, onnx.ValueInfoProto]) -> None:
    """Keep what a pass runs, in place: from what it takes to what it measures and leaves.

    Args:
        proto: the measuring graph.
        link: the pass.
        outputs: the tensors that it measures.
        taken: type and extents of what it takes.
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
    # an initializer may be an input, too: those of nodes that are gone would have to be fed
    every, left = ({t.name for t in tensors} for tensors in (graph.initializer, weights))
    inputs = [i for i in graph.input if i.name in left or (not taken and i.name not in every)]
    inputs += [value for name, value in taken.items() if name in used]
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
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int | None, ...]]] = {}

    def keep(self, run: int, arrays: Mapping[str, Array]) -> None:
        """Store what a run of the samples left."""
        for name, array in arrays.items():
            np.save(self._path(run, name), array, allow_pickle=False)
            _, extents = self._kinds.get(name, (array.dtype, array.shape))
            same = tuple(a if a == b else None for a, b in zip(extents, array.shape, strict=True))
            self._kinds[name] = (array.dtype, same)

    def inputs(self, names: Iterable[str]) -> dict[str, onnx.ValueInfoProto]:
        """Graph inputs for what all runs left: extents that every run shares are fixed, the others free.

        Shape inference of some nodes (Resize) asks how long a vector of sizes is.
        """
        kinds = {name: self._kinds[name] for name in names}
        types = {name: onnx.helper.np_dtype_to_tensor_dtype(dtype) for name, (dtype, _) in kinds.items()}
        return {n: onnx.helper.make_tensor_value_info(n, types[n], extents) for n, (_, extents) in kinds.items()}

    def read(self, run: int, names: Iterable[str]) -> dict[str, Array]:
        """What a run left."""
        return {name: np.load(self._path(run, name), allow_pickle=False) for name in names}

    def forget(self, run: int, names: Iterable[str]) -> None:
        """Remove what no later pass reads of a run."""
        for name in names:
            self._path(run, name).unlink()

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


def _sizes(facts: Facts, spans: Mapping[str, tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """What is alive before each node and at the end: number of activations of unknown shape, elements of the others."""
    changes = np.zeros((end + 2, 2), np.int64)
    for name, (first, final) in spans.items():
        if first <= final:
            shape = facts.shape(name)
            size = (1, 0) if shape is None else (0, int(np.prod(shape, dtype=np.int64)))
            changes[first] += size
            changes[final + 1] -= size
    return [(int(unknown), int(elements)) for unknown, elements in np.cumsum(changes, axis=0)]
