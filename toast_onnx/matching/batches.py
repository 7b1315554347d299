"""Whether a batch is free: inputs may declare it symbolic over a graph that holds the size of its export inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toast_onnx.errors import ModelError
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.input_shapes import Shapes, counted_shapes, input_shapes
from toast_onnx.model import Model

#: What is added to every further symbolic axis, until the graph takes it.
_SHIFTS = (32, 64, 28, 224, 0)


def is_symbolic(view: GraphView) -> bool:
    """Whether the inputs declare a first axis without a size."""
    return input_shapes(view, {}, 2) != input_shapes(view, {}, 3)


def free_batch(view: GraphView, given: Mapping[str, Sequence[int]]) -> tuple[Facts, Facts] | None:
    """Facts at two batch items, and at three with further symbolic axes at other sizes as far as the graph allows.

    A graph that holds a batch takes that one alone: both sizes are tried, as it may hold two.

    Args:
        view: the graph.
        given: shapes by input name, for the other axes.

    Returns:
        Both; None where the batch is fixed, by what the inputs declare or by the graph itself.
    """
    if not is_symbolic(view):
        return None
    try:
        facts = Facts(view, input_shapes(view, given, 2, fixed_batch=False))
    except ModelError:
        return None
    other = elsewhere(view, given, 3, fixed_batch=False)
    return None if other is None else (facts, other)


def elsewhere(view: GraphView, given: Mapping[str, Sequence[int]], batch: int, *, fixed_batch: bool) -> Facts | None:
    """Facts with every further symbolic axis at another size, as far as the graph allows; None where no size fits."""
    tried: list[Shapes] = []
    for shift in _SHIFTS:
        shapes = input_shapes(view, given, batch, fixed_batch=fixed_batch, shift=shift)
        if shapes in tried:
            continue
        tried.append(shapes)
        try:
            return Facts(view, shapes)
        except ModelError:
            continue
    return None


def held_batches(model: Model) -> dict[str, int]:
    """Batch that a graph holds inside, by the name of each input; empty where it is free or declared.

    Raises:
        ModelError: no shapes fit the graph.
    """
    view = GraphView(model)
    if not is_symbolic(view):
        return {}
    counted = counted_shapes(view, {})
    if free_batch(view, {} if counted.usual else counted.shapes) is not None:
        return {}
    return {name: extents[0] for name, extents in counted.shapes.items() if extents}
