"""Biases behind a Split move in front of it and change nothing; what is no bias stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from toast_onnx.engines.build import with_weights
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.split_bias import join_split_biases
from toast_onnx.model import Model
from toast_onnx.planning.macs import graph_params

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((4, 9)),
    "sizes": np.array([2, 3, 4], np.int64),
    "a": RNG.standard_normal(2),
    "b": RNG.standard_normal(3),
    "c": RNG.standard_normal(4),
    "row": RNG.standard_normal((5, 1)),
}


def graph(*adds: tuple[str, str], axis: int = -1, outputs: tuple[str, ...] = ()) -> Model:
    """x (2, 5, 4) @ w, split into p0 (2), p1 (3), p2 (4); `adds` are (operand, part) pairs of constants added."""
    make = onnx.helper.make_node
    nodes = [
        make("MatMul", ["x", "w"], ["y"], name="product"),
        make("Split", ["y", "sizes"], ["p0", "p1", "p2"], name="split", axis=axis),
        *(make("Add", list(pair), [f"{pair[1]}_{pair[0]}"]) for pair in adds),
    ]
    added = [f"{part}_{constant}" for constant, part in adds]
    used = {part for _, part in adds}
    names = [*added, *(p for p in ("p0", "p1", "p2") if p not in used), *outputs]
    weights = [numpy_helper.from_array(v if k == "sizes" else v.astype(np.float32), k) for k, v in WEIGHTS.items()]
    x = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5, 4])
    results = [onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]
    opsets = [onnx.helper.make_opsetid("", 17)]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x], results, weights), opset_imports=opsets, ir_version=8
    )
    return Model(proto, Path("m.onnx"))


def values(model: Model) -> list[np.ndarray]:
    x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(2, 5, 4)
    return list(ort.InferenceSession(with_weights(model).SerializeToString()).run(None, {"x": x}))


@pytest.mark.parametrize("adds", [(("a", "p0"), ("b", "p1"), ("c", "p2")), (("b", "p1"),), (("a", "p0"), ("c", "p2"))])
def test_biases_are_joined_and_nothing_else_changes(adds: tuple[tuple[str, str], ...]) -> None:
    model = graph(*adds)
    new = join_split_biases(model)
    assert [n.op_type for n in new.proto.graph.node] == ["MatMul", "Add", "Split"]
    assert list(new.proto.graph.output) == list(model.proto.graph.output)
    for ours, theirs in zip(values(new), values(model), strict=True):
        assert np.array_equal(ours, theirs)
    unread = {"row", *"abc"} - {constant for constant, _ in adds}  # the graph never read them
    bias = sum(len(WEIGHTS[constant]) for constant, _ in adds)
    zeros = 9 - bias  # of parts without a bias
    assert {t.name for t in new.proto.graph.initializer} >= unread
    assert graph_params(GraphView(new)) == graph_params(GraphView(model)) + zeros, "the old biases are gone"


def test_a_bias_that_something_else_reads_stays_for_it() -> None:
    model = graph(("a", "p0"), ("b", "p1"), ("c", "p2"))
    model.proto.graph.node.append(onnx.helper.make_node("Neg", ["a"], ["other"]))
    model.proto.graph.output.append(onnx.helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    new = join_split_biases(model)
    assert {t.name for t in new.proto.graph.initializer} & set("abc") == {"a"}
    for ours, theirs in zip(values(new), values(model), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    "model",
    [
        graph(),  # no bias at all
        graph(("row", "p0")),  # one number a token
        graph(("a", "p0"), outputs=("p0",)),  # the part without its bias is an output
        graph(("a", "p0"), outputs=("y",)),
    ],
    ids=["none", "per token", "part is an output", "product is an output"],
)
def test_what_is_no_bias_stays(model: Model) -> None:
    assert join_split_biases(model) is model
