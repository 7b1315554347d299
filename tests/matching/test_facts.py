"""What is known of tensors once the inputs have shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from toast_onnx.matching.facts import Facts
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
