"""Graphs that no runtime takes are refused in one line, before anything is made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from tests.matching.tiny import block
from toast_onnx.errors import ModelError
from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.wellformed import blame_model, why_not_loaded

Spoil = Callable[[onnx.ModelProto], object]


def _node(proto: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if n.op_type == op)


def _opset(version: int) -> Spoil:
    return lambda proto: setattr(proto.opset_import[0], "version", version)


SPOILT: dict[str, tuple[Spoil, str]] = {
    "no operands": (lambda p: p.graph.node[3].ClearField("input"), "has 0 operands"),
    "too many operands": (lambda p: _node(p, "Softmax").input.append("x"), "has 2 operands"),
    "no result": (lambda p: _node(p, "Softmax").ClearField("output"), "has no result"),
    "two of one name": (lambda p: p.graph.node[-1].output.__setitem__(0, p.graph.node[0].output[0]), "are called"),
    "attribute of another type": (
        lambda p: _node(p, "Softmax").attribute[0].CopyFrom(onnx.helper.make_attribute("axis", "last")),
        "of another type",
    ),
    "opset 0": (_opset(0), "out of range"),
    "negative opset": (_opset(-5), "out of range"),
    "opset of a far future": (_opset(2**62), "out of range"),
    "type 99": (lambda p: setattr(p.graph.initializer[0], "data_type", 99), "has type 99"),
    "no type": (lambda p: setattr(p.graph.initializer[0], "data_type", 0), "has type 0"),
    "negative extent": (lambda p: p.graph.initializer[0].dims.__setitem__(0, -1), "shape"),
    "input of type 99": (
        lambda p: setattr(p.graph.input[0].type.tensor_type, "elem_type", 99),
        "unknown element type 99",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), SPOILT.values(), ids=list(SPOILT))
def test_what_no_runtime_takes_is_refused_on_loading(spoil: Spoil, reason: str, tmp_path: Path) -> None:
    graph, y = block()
    path = graph.save(tmp_path / "model.onnx", y)
    load_model(path)
    proto = onnx.load(path)
    spoil(proto)
    path.write_bytes(proto.SerializeToString())
    assert why_not_loaded(path) is not None
    with pytest.raises(ModelError, match=reason):
        load_model(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    graph, y = block()
    path = graph.save(tmp_path / "model.onnx", y)
    path.write_bytes(path.read_bytes().replace(b"softmax", b"soft\xff\xfex"))
    with pytest.raises(ModelError, match="not text in UTF-8"):
        load_model(path)


def test_the_unforeseen_is_the_models_fault_only_where_it_is(tmp_path: Path) -> None:
    graph, y = block()
    path = graph.save(tmp_path / "model.onnx", y)
    with pytest.raises(ZeroDivisionError), blame_model(path):
        raise ZeroDivisionError
    proto = onnx.load(path)
    _node(proto, "Softmax").op_type = "Hardmost"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="refuses the graph"), blame_model(path):
        raise ZeroDivisionError


def test_what_a_runtime_takes_has_no_reason(tmp_path: Path) -> None:
    graph, y = block()
    path = graph.save(tmp_path / "model.onnx", y)
    assert why_not_loaded(path) is None


@pytest.mark.parametrize("number", range(9))
def test_empty_lists_of_axes_and_sizes_end_in_one_line(number: int, tmp_path: Path) -> None:
    """Each Transpose and Reshape of the block in turn: an empty `perm`, a shape without sizes."""
    graph, y = block()
    path = graph.save(tmp_path / "model.onnx", y)
    proto = onnx.load(path)
    moves = [n for n in proto.graph.node if n.op_type in ("Transpose", "Reshape")]
    assert len(moves) == 9
    if moves[number].op_type == "Transpose":
        del moves[number].attribute[0].ints[:]
    else:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(0, np.int64), "nothing"))
        moves[number].input[1] = "nothing"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError) as refused:
        study(load_model(path))
    assert "\n" not in str(refused.value)
