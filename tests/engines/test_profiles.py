"""Optimization profiles: what is accepted, and that what is wrong is caught before a build."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from toast_onnx.engines.profiles import (
    DEFAULT_BATCH,
    InputSpec,
    ShapeRange,
    build_profile,
    graph_inputs,
    parse_batch,
)
from toast_onnx.errors import ConfigError

IMAGE = InputSpec("x", (None, 3, 224, 224), ("batch", "?", "?", "?"), TensorProto.FLOAT)
TOKENS = InputSpec("ids", (None, None), ("batch", "sequence"), TensorProto.INT64)
FIXED = InputSpec("f", (2, 5), ("?", "?"), TensorProto.FLOAT)


@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(sorted))
def test_batch_reads_what_was_written(sizes: list[int]) -> None:
    assert parse_batch(":".join(map(str, sizes))) == tuple(sizes)


def test_one_batch_number_stands_for_all_three() -> None:
    assert parse_batch("8") == (8, 8, 8)


@pytest.mark.parametrize("text", ["", "1:8", "0:1:2", "1:8:x", "-1:1:1", "1:8:64:128", "1.5:2:3"])
def test_batch_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="MIN:OPT:MAX"):
        parse_batch(text)


@pytest.mark.parametrize("text", ["8:1:64", "1:64:8"])
def test_batch_out_of_order_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="ascending order"):
        parse_batch(text)


def test_the_batch_range_fills_an_open_first_dimension() -> None:
    assert build_profile([IMAGE, FIXED], (1, 8, 64)) == {
        "x": ShapeRange((1, 3, 224, 224), (8, 3, 224, 224), (64, 3, 224, 224))
    }


def test_an_open_batch_without_a_range_takes_the_default() -> None:
    shapes = build_profile([IMAGE])["x"]
    assert (shapes.min[0], shapes.opt[0], shapes.max[0]) == DEFAULT_BATCH


def test_a_graph_with_fixed_shapes_has_no_profile() -> None:
    assert build_profile([FIXED]) == {}


def test_explicit_shapes_and_the_batch_range_go_together() -> None:
    shapes = {kind: {"ids": size} for kind, size in (("min", (1, 8)), ("opt", (2, 16)), ("max", (4, 512)))}
    profile = build_profile([TOKENS, IMAGE], (1, 2, 4), shapes["min"], shapes["opt"], shapes["max"])
    assert profile["ids"] == ShapeRange((1, 8), (2, 16), (4, 512))
    assert profile["x"].max == (4, 3, 224, 224)


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ([TOKENS], {"batch": (1, 2, 4)}, "'ids' .* is missing from the profile and is open in dimension 0, 1"),
        ([FIXED], {"batch": (1, 2, 4)}, "fixed first dimension"),
        ([IMAGE], {"min_shapes": {"X": (1, 3, 224, 224)}}, "no input 'X'; inputs are: x"),
        ([IMAGE], {"min_shapes": {"x": (1, 3, 224, 224)}}, "has no opt and no max shape"),
    ],
)
def test_what_the_graph_contradicts_is_refused(inputs: list[InputSpec], arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_profile(inputs, **arguments)


@pytest.mark.parametrize(
    ("low", "usual", "high", "message"),
    [
        ((4, 3, 224, 224), (2, 3, 224, 224), (8, 3, 224, 224), "dimension 0: min 4, opt 2, max 8"),
        ((1, 3, 224, 224), (9, 3, 224, 224), (8, 3, 224, 224), "dimension 0: min 1, opt 9, max 8"),
        ((1, 3, 256, 224), (2, 3, 224, 224), (8, 3, 224, 224), "256 in dimension 2, the graph fixes it to 224"),
        ((1, 3, 224), (2, 3, 224, 224), (8, 3, 224, 224), "has 3 dimensions, the graph has 4"),
    ],
)
def test_explicit_shapes_are_checked(low: tuple, usual: tuple, high: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_profile([IMAGE], None, {"x": low}, {"x": usual}, {"x": high})


def test_a_misspelled_input_is_named_with_the_nearest() -> None:
    spec = InputSpec("pixel_values", (None, 3), ("b", "?"), TensorProto.FLOAT)
    with pytest.raises(ConfigError, match="did you mean 'pixel_values'"):
        build_profile([spec], None, {"pixel_value": (1, 3)})


def test_initializers_are_no_inputs() -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2]) for n in ("x", "w", "y")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [0.0] * 4)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:2], values[2:], [weight])
    specs = graph_inputs(helper.make_model(graph))
    assert [(s.name, s.dims, s.symbols[0]) for s in specs] == [("x", (None, 2), "b")]
