"""Walks through a graph: what a tensor's contents depend on, and what they go on to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.operators import MEASURING


def upstream(
    view: GraphView,
    facts: Facts,
    tensors: Iterable[str],
    stop: Callable[[int], bool] = lambda node: False,
    data: Callable[[int], Iterable[str]] | None = None,
) -> Iterator[int | None]:
    """The nodes that the contents of some tensors depend on, nearest first, once for each tensor; None for an input.

    Constants and what the facts know the value of (shape arithmetic) are left out, and so is what is read for its
    shape alone.

    Args:
        view: the graph.
        facts: what is known about it.
        tensors: where to start.
        stop: whether the walk ends at a node, given its position; the node itself still counts.
        data: the inputs of a node to go on with, all of them by default.
    """
    seen: set[str] = set()
    pending = deque(tensors)
    while pending:
        tensor = pending.popleft()
        if not tensor or tensor in seen or facts.is_constant(tensor) or facts.value(tensor) is not None:
            continue
        seen.add(tensor)
        i = view.producer.get(tensor)
        yield i
        if i is not None and not stop(i) and view.nodes[i].op_type not in MEASURING:
            pending.extend(view.nodes[i].input if data is None else data(i))


def downstream(view: GraphView, tensors: Iterable[str], leads_on: Callable[[int], bool]) -> Iterator[tuple[int, str]]:
    """The nodes that read some tensors' contents, or what is made of them, and what each reads; nearest first.

    Args:
        view: the graph.
        tensors: where to start.
        leads_on: whether the walk goes on behind a node, given its position.
    """
    pending = deque(tensors)
    seen = set(pending)
    while pending:
        tensor = pending.popleft()
        for i in view.readers(tensor):
            yield i, tensor
            if leads_on(i):
                made = [name for name in view.nodes[i].output if name and name not in seen]
                seen.update(made)
                pending.extend(made)
