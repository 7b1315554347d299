"""Weights stored in fewer bits than they compute with are declined as quantized ones are: written back, files grew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from tests.matching.tiny import block
from tests.pruning import look
from toast_onnx.planning.macs import graph_params
from toast_onnx.reasons import Kind


def _stored(path: Path, kind: str) -> tuple[Path, int]:
    """The tiny block with every matrix stored small, and its number of parameters before."""
    graph, y = block()
    model = onnx.load(graph.save(path, y))
    params = graph_params(look(path).view)
    weights = {t.name: t for t in model.graph.initializer}
    added: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            continue
        name = node.input[1]
        value = onnx.numpy_helper.to_array(weights[name])
        if kind == "half":
            weights[name].CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), name))
            added.append(onnx.helper.make_node("Cast", [name], [f"{name}.wide"], to=onnx.TensorProto.FLOAT))
        else:
            scale = np.abs(value).max(axis=0, keepdims=True) / 127
            small = np.round(value / scale).astype(np.int8)
            weights[name].CopyFrom(onnx.numpy_helper.from_array(small, name))
            model.graph.initializer.append(onnx.numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"))
            added.append(onnx.helper.make_node("Cast", [name], [f"{name}.cast"], to=onnx.TensorProto.FLOAT))
            added.append(onnx.helper.make_node("Mul", [f"{name}.scale", f"{name}.cast"], [f"{name}.wide"]))
        node.input[1] = f"{name}.wide"
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    return path, params


@pytest.mark.parametrize("kind", ["half", "bytes"])
def test_they_are_declined_and_counted(kind: str, tmp_path: Path) -> None:
    path, params = _stored(tmp_path / "model.onnx", kind)
    found = look(path)
    (the_block,) = found.match.blocks
    assert the_block.attention is not None
    assert the_block.ffn is not None
    reasons = (the_block.attention.qk_reason, the_block.attention.vo_reason, the_block.ffn.fc2_reason)
    why, end = {
        "half": (Kind.STORED, "stored as float16 and cast up; prune the float32 model, then store it smaller"),
        "bytes": (Kind.QUANTIZED, "stored as int8; prune first, then quantize"),
    }[kind]
    assert all(reason is not None and reason.kind == why and str(reason).endswith(end) for reason in reasons)
    assert graph_params(found.view) >= params
