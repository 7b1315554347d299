"""What a region of elementwise nodes is called."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from toast_onnx.matching.activations import activation_name
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.model import Model

ONNX, CONTRIB = "", "com.microsoft"


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ([(ONNX, "Relu", {})], "relu"),
        ([(ONNX, "Gelu", {"approximate": "tanh"})], "gelu_tanh"),
        ([(ONNX, "Gelu", {})], "gelu"),
        ([(CONTRIB, "Gelu", {})], "gelu"),
        ([(CONTRIB, "FastGelu", {})], "gelu_tanh"),
        ([(CONTRIB, "QuickGelu", {"alpha": 1.0})], "silu"),
        ([(CONTRIB, "QuickGelu", {})], "quick_gelu"),
        ([(ONNX, "Erf", {}), (ONNX, "Mul", {})], "gelu"),
        ([(ONNX, "Softplus", {}), (ONNX, "Tanh", {}), (ONNX, "Mul", {})], "mish"),
        ([(ONNX, "Softplus", {})], "softplus"),
        ([(ONNX, "Tanh", {}), (ONNX, "Mul", {})], "gelu_tanh"),
        ([(ONNX, "Tanh", {})], "tanh"),
        ([(ONNX, "Sigmoid", {})], "sigmoid"),
        ([(ONNX, "Sigmoid", {}), (ONNX, "Mul", {})], "silu"),
        ([(ONNX, "Add", {})], None),
    ],
)
def test_an_activation_is_known_by_its_operators(spelling: list[tuple[str, str, dict[str, object]]], name: str) -> None:
    nodes = [
        onnx.helper.make_node(op, [f"t{k}"] * (2 if op in ("Add", "Mul") else 1), [f"t{k + 1}"], domain=domain, **given)
        for k, (domain, op, given) in enumerate(spelling)
    ]
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 3]) for n in ("t0", f"t{len(nodes)}")]
    graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:])
    opsets = [onnx.helper.make_opsetid(ONNX, 20), onnx.helper.make_opsetid(CONTRIB, 1)]
    view = GraphView(Model(onnx.helper.make_model(graph, opset_imports=opsets), Path("m.onnx")))
    assert activation_name(view, Facts(view, {"t0": (2, 3)}), range(len(nodes))) == name
