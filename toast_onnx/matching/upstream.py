"""What a tensor's contents depend on: the walk back through the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView


def upstream(
    view: GraphView, facts: Facts, tensors: Iterable[str], stop: Callable[[int], bool] = lambda node: False
) -> Iterator[int | None]:
    """The nodes that the contents of some tensors depend on, by position, once for each tensor; None for an input.

    Constants and what the facts know the value of (shape arithmetic) are left out, and so is what is read for its
    shape alone.

    Args:
        view: the graph.
        facts: what is known about it.
        tensors: where to start.
        stop: whether the walk ends at a node, given its position; the node itself still counts.
    """
    seen: set[str] = set()
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if not tensor or tensor in seen or facts.is_constant(tensor) or facts.value(tensor) is not None:
            continue
        seen.add(tensor)
        i = view.producer.get(tensor)
        yield i
        if i is not None and not stop(i) and view.nodes[i].op_type not in ("Shape", "Size"):
            pending.extend(view.nodes[i].input)
