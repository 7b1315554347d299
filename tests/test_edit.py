"""What is dropped of an edited graph, beside what onnx-graphsurgeon drops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from onnx import TensorProto

from toast_onnx.edit import tidy
from toast_onnx.model import Model


def value(name: str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, kind, [2])


def graph_with_dead_parts() -> onnx.ModelProto:
    """A branch that captures `inside` and `w_inside`, a chain that nothing needs, and weights that are inputs."""
    node = onnx.helper.make_node
    branches = [
        onnx.helper.make_graph([node("Add", ["inside", "w_inside"], ["then"])], "then", [], [value("then")]),
        onnx.helper.make_graph([node("Neg", ["x"], ["else"])], "else", [], [value("else")]),
    ]
    nodes = [
        node("Abs", ["x"], ["inside"]),
        node("Exp", ["x"], ["dead_1"]),
        node("Mul", ["dead_1", "w_dead"], ["dead_2"]),
        node("If", ["flag"], ["chosen"], then_branch=branches[0], else_branch=branches[1]),
        node("Split", ["chosen", "sizes"], ["y", "unread"], axis=0),
        node("Identity", ["w_out"], ["z"]),
    ]
    arrays = {name: np.ones(2, np.float32) for name in ("w_inside", "w_dead", "w_out", "w_input", "w_direct")}
    arrays["sizes"] = np.array([1, 1])
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x"), onnx.helper.make_tensor_value_info("flag", TensorProto.BOOL, []), value("w_input")],
        [value("y"), value("z"), value("w_direct")],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
        value_info=[value("dead_1"), value("inside")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=3)


def test_what_is_dead_goes_and_nothing_else() -> None:
    proto = graph_with_dead_parts()
    wanted = gs.import_onnx(proto).cleanup()
    model = Model(proto, Path("m.onnx"), {"w_dead": np.ones(2), "w_out": np.ones(2)})
    tidy(model)
    nodes = [list(node.output) for node in proto.graph.node]
    assert nodes == [[t.name for t in node.outputs] for node in wanted.nodes]
    assert nodes == [["inside"], ["chosen"], ["y", "unread"], ["z"]]
    assert [t.name for t in proto.graph.initializer] == ["w_inside", "w_out", "w_input", "w_direct", "sizes"]
    assert list(model.arrays) == ["w_out"]
    assert not proto.graph.value_info
