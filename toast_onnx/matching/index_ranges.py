"""Which numbers an integer input may hold: those that index a table stay within its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, is_standard
from toast_onnx.matching.operators import MOVEMENT, PASSING

_LARGEST = 2**31


@dataclass(frozen=True)
class _Form:
    """A tensor as `factor` times the input plus something between the offsets, cut off at `low` and `high`."""

    factor: float = 1.0
    offsets: tuple[float, float] = (0.0, 0.0)
    low: float = -math.inf
    high: float = math.inf

    def allowed(self, rows: int) -> tuple[float, float]:
        """Numbers of the input for which the tensor lies within a table's rows."""
        least = -math.inf if self.low >= 0 else -self.offsets[0]
        most = math.inf if self.high < rows else rows - 1 - self.offsets[1]
        ends = least / self.factor, most / self.factor
        return ends if self.factor > 0 else ends[::-1]


def index_ranges(view: GraphView, facts: Facts) -> dict[str, tuple[int, int]]:
    """For every graph input that indexes a table, directly or through Cast, Clip and arithmetic, the range it may take.

    Args:
        view: the graph.
        facts: what is known of it.

    Returns:
        Input name -> smallest and largest number, both allowed; inputs that index nothing are left out.
    """
    found: dict[str, tuple[int, int]] = {}
    for value in view.model.proto.graph.input:
        if value.name in view.initializers:
            continue
        low, high = -_LARGEST, _LARGEST
        for form, rows in _lookups(view, facts, value.name):
            least, most = form.allowed(rows)
            low, high = math.ceil(max(low, least)), math.floor(min(high, most))
        if (low, high) != (-_LARGEST, _LARGEST) and low <= high:
            found[value.name] = (low, high)
    return found


def _lookups(view: GraphView, facts: Facts, tensor: str) -> Iterator[tuple[_Form, int]]:
    """Tables that a tensor indexes: what the index is made of the tensor, and the table's rows."""
    pending, seen = [(tensor, _Form())], {tensor}
    while pending:
        name, form = pending.pop()
        for i in view.consumers.get(name, ()):
            node = view.nodes[i]
            at = list(node.input).index(name) if name in node.input else -1
            rows = _rows(facts, i, at, view)
            if rows is not None:
                yield form, rows
                continue
            further = _through(view, facts, i, at, form)
            for output in node.output:
                if further is not None and output and output not in seen:
                    seen.add(output)
                    pending.append((output, further))


def _rows(facts: Facts, i: int, at: int, view: GraphView) -> int | None:
    """Entries of the axis that a node looks up along, where operand `at` says which; None for any other operand."""
    node = view.nodes[i]
    if node.op_type in ("Gather", "GatherElements") and at == 1:
        shape = facts.shape(node.input[0])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        return None if not shape else shape[axis]
    if node.op_type == "OneHot" and at == 0:
        depth = facts.value(node.input[1])
        return None if depth is None else int(depth.reshape(-1)[0])
    return None


def _through(view: GraphView, facts: Facts, i: int, at: int, form: _Form) -> _Form | None:
    """The form of a node's results; None where the numbers do not get through as they are."""
    node = view.nodes[i]
    if not is_standard(node):
        return None
    if node.op_type in MOVEMENT | PASSING:
        return form if at == 0 or node.op_type == "Concat" else None
    if node.op_type in ("Clip", "Max", "Min"):
        low, high = _limits(facts, node, at)
        return replace(form, low=max(form.low, low), high=min(form.high, high))
    cut = math.isfinite(form.low) or math.isfinite(form.high)
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.input) != 2 or cut:
        return None
    other = facts.value(node.input[1 - at])
    if other is None or not other.size or other.dtype.kind not in "iuf":
        return None
    least, most = float(other.min()), float(other.max())
    if node.op_type in ("Add", "Sub"):
        if node.op_type == "Sub":
            if at == 1:
                return None
            least, most = -most, -least
        return replace(form, offsets=(form.offsets[0] + least, form.offsets[1] + most))
    if least != most or not least or (node.op_type == "Div" and at == 1):
        return None
    scale = least if node.op_type == "Mul" else 1 / least
    first, last = sorted(offset * scale for offset in form.offsets)
    return replace(form, factor=form.factor * scale, offsets=(first, last))


def _limits(facts: Facts, node: onnx.NodeProto, at: int) -> tuple[float, float]:
    """What a Clip, Max or Min lets through."""
    if node.op_type == "Clip" and len(node.input) == 1:  # before opset 11
        old = {a.name: a.f for a in node.attribute}
        return old.get("min", -math.inf), old.get("max", math.inf)
    ends = [facts.value(name) if name else None for k, name in enumerate(node.input) if k != at]
    low, high = [*ends, None][:2] if node.op_type == "Clip" else (ends * 2)[:2]
    return (
        float(low.min()) if low is not None and node.op_type != "Min" else -math.inf,
        float(high.max()) if high is not None and node.op_type != "Max" else math.inf,
    )
