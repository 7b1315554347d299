"""What is known of tensors once the inputs have shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from toast_onnx.matching.facts import Facts, constant_value
from toast_onnx.matching.graph import GraphView
from toast_onnx.model import load_model


@pytest.mark.parametrize("op", ["GreaterOrEqual", "LessOrEqual"])
@pytest.mark.parametrize("opset", [12, 14, 16, 20])
def test_operators_that_only_a_function_body_describes_have_shapes_and_values(
    tmp_path: Path, op: str, opset: int
) -> None:
    info = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Shape", ["x"], ["extents"]),
        onnx.helper.make_node(op, ["extents", "three"], ["flags"]),
        onnx.helper.make_node(op, ["x", "threshold"], ["mask"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", onnx.TensorProto.FLOAT, [4, 3, 2])],
        [info("flags", onnx.TensorProto.BOOL, [3]), info("mask", onnx.TensorProto.BOOL, [4, 3, 2])],
        [
            onnx.numpy_helper.from_array(np.asarray(3, np.int64), "three"),
            onnx.numpy_helper.from_array(np.asarray([0.5], np.float32), "threshold"),
        ],
    )
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8), path)
    facts = Facts(GraphView(load_model(path)), {"x": (4, 3, 2)})
    compare = np.greater_equal if op == "GreaterOrEqual" else np.less_equal
    value = facts.value("flags")
    assert value is not None
    assert np.array_equal(value, compare([4, 3, 2], 3))
    assert facts.shape("mask") == (4, 3, 2)


def test_sums_over_an_axis_that_is_written_as_a_vector(tmp_path: Path) -> None:
    """NaViT as dynamo exports it counts its images' patches so; ONNX's reference takes a number alone."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Shape", ["x"], ["extents"]),
            onnx.helper.make_node("CumSum", ["extents", "axis"], ["ends"]),
        ],
        "g",
        [info("x", onnx.TensorProto.FLOAT, [4, 3, 2])],
        [info("ends", onnx.TensorProto.INT64, [3])],
        [onnx.numpy_helper.from_array(np.asarray([0], np.int64), "axis")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    value = Facts(GraphView(load_model(path)), {"x": (4, 3, 2)}).value("ends")
    assert value is not None
    assert value.tolist() == [4, 7, 9]


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_group_normalization_keeps_its_shape(tmp_path: Path, opset: int) -> None:
    """From opset 21 on it is a function body, which shape inference of a single node says nothing about."""
    gains = 4 if opset >= 21 else 2  # one a channel, or one a group
    node = onnx.helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2)
    info = onnx.helper.make_tensor_value_info
    image, weights = [2, 4, 3, 5], np.ones(gains, np.float32)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [info("x", onnx.TensorProto.FLOAT, image)],
        [info("y", onnx.TensorProto.FLOAT, image)],
        [onnx.numpy_helper.from_array(weights, name) for name in ("scale", "bias")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9), path)
    assert Facts(GraphView(load_model(path)), {"x": tuple(image)}).shape("y") == tuple(image)


def test_facts_that_another_graph_shares_are_those_from_scratch(tmp_path: Path) -> None:
    info = onnx.helper.make_tensor_value_info

    def saved(name: str, gain: np.ndarray, axes: tuple[int, ...], op: str) -> Facts:
        nodes = [
            onnx.helper.make_node("Relu", ["x"], ["a"]),
            onnx.helper.make_node("Mul", ["a", "gain"], ["b"]),
            onnx.helper.make_node("Transpose", ["b"], ["c"], perm=axes),
            onnx.helper.make_node("Shape", ["c"], ["extents"]),
            onnx.helper.make_node(op, ["extents", "two"], ["more"]),
            onnx.helper.make_node("Neg", ["a"], ["y"]),
        ]
        weights = [onnx.numpy_helper.from_array(gain, "gain"), onnx.numpy_helper.from_array(np.int64([2]), "two")]
        outputs = [info("more", onnx.TensorProto.INT64, [3]), info("y", onnx.TensorProto.FLOAT, None)]
        graph = onnx.helper.make_graph(nodes, "g", [info("x", onnx.TensorProto.FLOAT, [4, 3, 2])], outputs, weights)
        made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(made, tmp_path / name)
        return Facts(GraphView(load_model(tmp_path / name)), {"x": (4, 3, 2)})

    known = saved("a.onnx", np.float32([1, 2]), (0, 1, 2), "Mul")
    for gain, axes, op in [([1, 2], (0, 1, 2), "Mul"), ([3, 4], (0, 1, 2), "Add"), ([[1, 2]], (2, 0, 1), "Mul")]:
        fresh = saved("b.onnx", np.float32(gain), axes, op)
        shared = Facts(fresh.view, {"x": (4, 3, 2)}, like=known)
        for name in ("x", "a", "b", "c", "gain", "extents", "more", "y"):
            assert shared.shape(name) == fresh.shape(name), name
            assert shared.elem_type(name) == fresh.elem_type(name)
            assert shared.is_constant(name) == fresh.is_constant(name)
            np.testing.assert_array_equal(shared.value(name), fresh.value(name))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attribute", "value", "kind"),
    [
        ("value_float", 1.5, np.float32),
        ("value_floats", [1.5, 2.0], np.float32),
        ("value_int", 3, np.int64),
        ("value_ints", [3, 4], np.int64),
        ("value_string", b"a", object),
        ("value", onnx.numpy_helper.from_array(np.ones((2, 3), np.float16)), np.float16),
    ],
)
def test_a_constant_is_read_from_whichever_attribute_holds_it(attribute: str, value: object, kind: type) -> None:
    found = constant_value(onnx.helper.make_node("Constant", [], ["c"], **{attribute: value}))
    assert found is not None
    assert found.dtype == kind
    wanted = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value, kind)
    assert np.array_equal(found, wanted)


def test_a_sparse_constant_has_no_value() -> None:
    values = onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [1.0])
    sparse = onnx.helper.make_sparse_tensor(values, onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0]), [4])
    assert constant_value(onnx.helper.make_node("Constant", [], ["c"], sparse_value=sparse)) is None
