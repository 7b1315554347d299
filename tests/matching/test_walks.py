"""Walks through a graph, and the steps of the searches that they lead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.matching.tiny import TOKENS, WIDTH, Graph
from toast_onnx.matching.facts import Facts, reduced_axes
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.linear import find_linears
from toast_onnx.matching.probe import _followed, _sources, carried
from toast_onnx.matching.walks import downstream, upstream
from toast_onnx.model import load_model
from toast_onnx.reasons import Decline, Kind


def looked_at(graph: Graph, y: str, folder: Path) -> tuple[GraphView, Facts]:
    view = GraphView(load_model(graph.save(folder / "model.onnx", y)))
    return view, Facts(view, {"x": (1, TOKENS, WIDTH)})


def named(view: GraphView, nodes: list[int]) -> list[str]:
    return [view.nodes[i].name for i in nodes]


@pytest.fixture
def way(tmp_path: Path) -> tuple[GraphView, Facts]:
    """x -> near -> far, near -> beside; the shape of near decides how far is reshaped in the end."""
    g = Graph()
    near = g.add("Relu", "x", name="near")
    far = g.add("Add", g.add("Neg", near, name="far"), g.add("Abs", near, name="beside"), name="sum")
    return looked_at(g, g.add("Reshape", far, g.add("Shape", near, name="shape"), name="end"), tmp_path)


def test_upstream_goes_by_contents_nearest_first(way: tuple[GraphView, Facts]) -> None:
    view, facts = way
    found = list(upstream(view, facts, ["end.out"]))
    assert named(view, [i for i in found if i is not None]) == ["end", "sum", "far", "beside", "near"]
    assert found[-1] is None  # the graph's input
    held = upstream(
        view, facts, ["end.out"], stop=lambda i: view.nodes[i].op_type == "Neg", data=lambda i: view.nodes[i].input[:1]
    )
    assert named(view, [i for i in held if i is not None]) == ["end", "sum", "far"]


def test_upstream_ends_at_a_shape_that_only_the_input_tells(tmp_path: Path) -> None:
    g = Graph()
    shape = g.add("Shape", g.add("NonZero", "x", name="found"), name="shape")
    many = g.add("ReduceSum", g.add("ConstantOfShape", shape, name="zeros"), name="many", keepdims=0)
    view, facts = looked_at(g, g.add("Add", "x", many, name="end"), tmp_path)
    found = list(upstream(view, facts, ["end.out"]))
    assert named(view, [i for i in found if i is not None]) == ["end", "many", "zeros", "shape"]


def test_downstream_passes_by_what_reads_a_shape(way: tuple[GraphView, Facts]) -> None:
    view, _ = way
    found = list(downstream(view, ["x"], lambda i: view.nodes[i].op_type != "Abs"))
    assert [(view.nodes[i].name, name) for i, name in found] == [
        ("near", "x"),
        ("far", "near.out"),
        ("beside", "near.out"),
        ("sum", "far.out"),
        ("end", "sum.out"),
    ]
    assert named(view, view.readers("near.out")) == ["far", "beside"]


def test_sources_are_the_layers_and_what_computes_on_the_way(tmp_path: Path) -> None:
    g = Graph()
    layer = g.linear("x", WIDTH, WIDTH, "layer")
    moved = g.add(
        "Transpose", g.add("Mul", layer, g.constant(2, np.float32), name="scale"), perm=[0, 2, 1], name="turn"
    )
    view, facts = looked_at(
        g, g.add("Transpose", g.add("Erf", moved, name="erf"), perm=[0, 2, 1], name="back"), tmp_path
    )
    linears = find_linears(view, facts)
    found, nodes, opaque, constants = _sources(view, facts, linears, "back.out", "Q")
    assert not constants
    assert [linear.output for linear in found] == [layer]
    assert named(view, sorted(nodes)) == ["scale", "turn", "erf", "back"]
    assert named(view, sorted(opaque)) == ["erf"]
    assert [_followed(view, facts, i) for i in sorted(nodes)] == [[layer], ["scale.out"], None, ["erf.out"]]
    with pytest.raises(Decline, match="Q comes from the graph input 'x'") as why:
        _sources(view, facts, {}, "x", "Q")
    assert why.value.reason.kind == Kind.NO_LAYER


def test_labels_are_carried_one_array_after_another(tmp_path: Path) -> None:
    g = Graph()
    parts = g.add("Split", "x", g.constant([3, 5]), name="parts", outputs=2, axis=2)
    view, facts = looked_at(g, parts, tmp_path)
    one = np.arange(TOKENS * WIDTH).reshape(1, TOKENS, WIDTH)
    made = carried(view, facts, 0, [one, -one])
    assert list(made) == ["parts.out", "parts.out_1"]
    np.testing.assert_array_equal(made["parts.out_1"][1], -one[..., 3:])


@pytest.mark.parametrize(("axes", "wanted"), [([-1], [2]), ([0, 1], [0, 1]), (None, [0, 1, 2])])
def test_axes_of_a_reduction(axes: list[int] | None, wanted: list[int], tmp_path: Path) -> None:
    g = Graph()
    given = [] if axes is None else [g.constant(axes)]
    view, facts = looked_at(g, g.add("ReduceSum", "x", *given, name="sum"), tmp_path)
    assert reduced_axes(facts, view.nodes[0], 3) == wanted
