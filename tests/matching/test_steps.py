"""Single steps of the longer walks, on numbers small enough to be checked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.matching.tiny import TOKENS, WIDTH, Graph
from toast_onnx.matching.dims import Operand, _arrivals, _joined, _mixed, _units
from toast_onnx.matching.facts import Facts, slice_operands
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.layout import DIM as D
from toast_onnx.matching.layout import HEAD as H
from toast_onnx.matching.layout import Factor, _other_extents, _solved
from toast_onnx.model import load_model
from toast_onnx.reasons import Decline, Kind
from toast_onnx.rewriting.shrinking import _bounds


def test_the_last_factor_of_an_extent_is_what_the_others_leave() -> None:
    """12 = 4 a and 9 = a b, given in the order in which nothing can be told at first."""
    a, b, window = (0, 1), (0, 0), (1, 0)
    found = _solved({window: 4}, [([b, a], 9), ([a, window], 12)])
    assert found == {window: 4, a: 3, b: 3}


def test_two_unknown_factors_stay_unknown() -> None:
    assert _solved({}, [([(0, 0), (0, 1)], 9)]) == {}


def test_windows_are_told_apart_from_the_batch() -> None:
    """Batch 2 (3), 8 (12) rows in windows of 4: (batch x rows / 4, 4, heads, dim)."""
    axes = [[Factor(0, 1, 2), Factor(1, 4, 2)], [Factor(1, 1, 4)], [Factor(H, 0, 2)], [Factor(D, 0, 5)]]
    found = _other_extents(axes, (2, 8, 10), (3, 12, 10), (4, 4, 2, 5), (9, 4, 2, 5), "Q")
    assert found == [[3, 3], [4], [2], [5]]


def test_a_window_that_grows_with_the_input_is_declined() -> None:
    axes = [[Factor(0, 1, 2), Factor(1, 4, 2)], [Factor(1, 1, 4)], [Factor(D, 0, 5)]]
    with pytest.raises(Decline, match="Q: its layout changes with the input's shape") as why:
        _other_extents(axes, (2, 8, 5), (3, 12, 5), (4, 4, 5), (8, 4, 5), "Q")
    assert (why.value.reason.kind, why.value.reason.part) == (Kind.DYNAMIC, "Q")


def test_pairs_join_through_others() -> None:
    owner = _joined([(0, 1), (3, 4), (1, 3)], 6)
    groups = {tuple(np.flatnonzero(owner == number)) for number in owner}
    assert groups == {(0, 1, 3, 4), (2,), (5,)}


def _halves(dim: int) -> list[np.ndarray]:
    """Labels of rotated vectors: every place is made of a dimension and of the one half a head away."""
    straight = np.arange(dim, dtype=np.int32)[None] + 1
    return [straight, np.roll(straight, dim // 2, axis=1)]


def test_rotation_by_halves_makes_pairs() -> None:
    labels = {"q": _halves(4)}
    assert set(_mixed(labels, 4)) == {(0, 2), (1, 3), (2, 0), (3, 1)}
    assert _arrivals(labels, Operand("Q", "q", "q", -1), 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert _units([labels], [Operand("Q", "q", "q", -1)], 4).tolist() == [0, 1, 0, 1]


def test_dimensions_that_arrive_at_one_place_stay_together() -> None:
    """Queries in order against keys of which 0 and 1, 2 and 3 changed places."""
    straight, turned = {"q": [np.asarray([[1, 2, 3, 4]])]}, {"k": [np.asarray([[2, 1, 4, 3]])]}
    operands = [Operand("Q", "q", "q", -1), Operand("K", "k", "k", -1)]
    units = _units([straight, turned], operands, 4)
    assert units[0] == units[1] != units[2] == units[3]


def test_half_of_a_head_does_not_arrive() -> None:
    with pytest.raises(Decline, match="only some of the dimensions of K arrive"):
        _arrivals({"k": [np.asarray([[1, 2, 3]])]}, Operand("K", "k", "k", -1), 4)


@pytest.mark.parametrize("named", [("axes", "steps"), ("axes",), ()])
def test_a_slice_fills_in_what_it_leaves_out(named: tuple[str, ...], tmp_path: Path) -> None:
    values = {"axes": [1], "steps": [2]}
    graph = Graph()
    operands = [graph.constant([1]), graph.constant([4]), *(graph.constant(values[n]) for n in named)]
    y = graph.add("Slice", "x", *operands, name="cut")
    view = GraphView(load_model(graph.save(tmp_path / "model.onnx", y)))
    facts = Facts(view, {"x": (1, TOKENS, WIDTH)})
    starts, ends, axes, steps = (v.tolist() for v in slice_operands(facts, view.nodes[0]))
    assert (starts, ends) == ([1], [4])
    assert (axes, steps) == ([1] if "axes" in named else [0], [2] if "steps" in named else [1])


def test_bounds_take_exactly_the_places() -> None:
    for places in ([3], [1, 2, 3], [0, 2, 4]):
        start, end, step = _bounds(np.asarray(places), "cut")
        assert np.arange(8)[start:end:step].tolist() == places
