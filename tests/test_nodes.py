"""The writer of nodes at every opset whose spelling differs, in both graphs it writes into, against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from onnx.reference import ReferenceEvaluator

from toast_onnx.edit import GraphEdit, PlaceWriter, drop_attributes
from toast_onnx.matching.graph import GraphView, rewired
from toast_onnx.model import Model, stub
from toast_onnx.nodes import NodeWriter
from toast_onnx_calibration.graph_writer import GraphWriter

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def model(opset: int) -> Model:
    """y = x, with a weight beside it."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"], name="last")],
        "g",
        [info("x", onnx.TensorProto.FLOAT, X.shape)],
        [info("y", onnx.TensorProto.FLOAT, None)],
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    return Model(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), Path("model.onnx"))


def run(written: Model) -> np.ndarray:
    for tensor in written.proto.graph.initializer:
        if tensor.name in written.arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(written.arrays[tensor.name], tensor.name))
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 8, {"": written.opset}
    for node in written.proto.graph.node:
        onnx.checker.check_node(node, context)  # what the reference lets pass: attributes of another opset
    (made,) = ReferenceEvaluator(written.proto).run(None, {"x": X})
    return np.asarray(made)


def split_and_joined(w: NodeWriter) -> str:
    w.split("x", [1, 3], 2, ["a", "b"])
    return w.one("Concat", ["b", "a"], axis=2)


WRITTEN: dict[str, tuple[Callable[[NodeWriter], str], np.ndarray]] = {
    "sum": (lambda w: w.reduce("ReduceSum", "x", [1]), X.sum(1)),
    "mean, its axis kept": (lambda w: w.reduce("ReduceMean", "x", [0, 2], keep=True), X.mean((0, 2), keepdims=True)),
    "largest": (lambda w: w.reduce("ReduceMax", "x", [-1]), X.max(-1)),
    "new axes": (lambda w: w.unsqueeze("x", [0, 2]), X[None, :, None]),
    "parts": (split_and_joined, np.concatenate([X[..., 1:], X[..., :1]], axis=2)),
    "slice": (lambda w: w.slice("x", 1, 1), X[:, 1:]),
    "slice in steps": (lambda w: w.slice("x", 2, 0, 3, 2), X[..., 0:3:2]),
    "shape": (lambda w: w.reshape("x", [0, -1]), X.reshape(2, -1)),
    "places": (lambda w: w.gather("x", [2, 0], 1), X[:, [2, 0]]),
    "numbers": (lambda w: w.cast(w.one("Shape", ["x"]), onnx.TensorProto.FLOAT), np.float32(X.shape)),
}


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
@pytest.mark.parametrize("what", WRITTEN)
def test_a_place_of_a_graph(what: str, opset: int) -> None:
    write, wanted = WRITTEN[what]
    edit = GraphEdit(GraphView(model(opset)))
    edit.remove([0])
    edit.emit(0, "Identity", [write(PlaceWriter(edit, 0, "here"))], "y", "end")
    made = run(edit.apply())
    np.testing.assert_allclose(made, wanted, rtol=1e-6)
    assert made.shape == wanted.shape


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("what", WRITTEN)
def test_the_end_of_a_graph(what: str, opset: int) -> None:
    write, wanted = WRITTEN[what]
    source = model(opset)
    writer = GraphWriter(source)
    writer.output("made", write(writer))
    proto, outputs = writer.finish()
    assert list(outputs) == ["made"]
    np.testing.assert_allclose(run(Model(proto, source.path)), wanted, rtol=1e-6)


def test_names_are_fresh_and_say_what_was_written() -> None:
    edit = GraphEdit(GraphView(model(17)))
    plain, numbered = PlaceWriter(edit, 0, "here"), PlaceWriter(edit, 0, "there", numbered=True)
    assert [plain.one("Abs", ["x"]), plain.one("Abs", ["x"])] == ["here/Abs_output", "here/Abs_output_1"]
    assert numbered.node("TopK", ["x", "k"], "best", 2) == ["there/best_output_0", "there/best_output_1"]
    assert numbered.one("TopK", ["x", "k"], "best") == "there/best_1_output_0"
    assert plain.node("Abs", ["x"], outputs=["given"]) == ["given"]
    assert plain.numbers([1]) == "here/numbers"


def test_a_replaced_node_stands_behind_what_was_written_before_it() -> None:
    edit = GraphEdit(GraphView(model(17)))
    node = edit.copy(0)
    node.input[0] = PlaceWriter(edit, 0, "here").one("Neg", ["x"])
    edit.replace(0, node)
    np.testing.assert_array_equal(run(edit.apply()), -X)
    np.testing.assert_array_equal(run(model(17)), X)


def test_attributes_are_dropped_by_name() -> None:
    node = onnx.helper.make_node("Split", ["x"], ["y"], axis=1, num_outputs=1)
    drop_attributes(node, "num_outputs", "split")
    assert [a.name for a in node.attribute] == ["axis"]


def test_rewired_leaves_out_what_only_the_old_nodes_read() -> None:
    source = model(17)
    graph = source.proto.graph
    source.arrays = {"old": np.float32(2), "kept": np.float32(3)}
    graph.initializer.extend(stub(name, value) for name, value in source.arrays.items())
    del graph.node[:]
    make = onnx.helper.make_node
    graph.node.extend([make("Mul", ["x", "old"], ["twice"]), make("Mul", ["twice", "kept"], ["y"])])
    view = GraphView(source)
    made = rewired(view, {0: [make("Mul", ["x", "new"], ["twice"])]}, arrays={"new": np.float32(5)})
    assert [t.name for t in made.proto.graph.initializer] == list(made.arrays) == ["kept", "new"]
    np.testing.assert_allclose(run(made), 15 * X, rtol=1e-6)
    assert [t.name for t in view.model.proto.graph.initializer] == ["old", "kept"]
