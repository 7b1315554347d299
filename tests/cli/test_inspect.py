"""`toast-onnx inspect`: what it says of graphs without blocks and of quantized ones, and tables on narrow terminals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from onnxruntime.quantization import quantize_dynamic

from tests.matching.tiny import block
from toast_onnx.report.tables import Table, shortened
from toast_onnx_cli.main import main


def convolutions(path: Path) -> Path:
    """A small convolutional classifier."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (8, 10)}
    weights = [onnx.numpy_helper.from_array(rng.random(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "w3"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 16, 16]), ("y", [1, 10]))
    ]
    graph = helper.make_graph(nodes, "cnn", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_convolutional_network_is_told_what_was_looked_for(tmp_path: Path) -> None:
    path = convolutions(tmp_path / "cnn.onnx")
    (tmp_path / "r.yaml").write_text("version: 1\nffn: {fc2: 0.5}\n")
    shown = CliRunner().invoke(main, ["inspect", str(path)]).stdout
    refused = CliRunner().invoke(main, ["prune", str(path), "--ratios", str(tmp_path / "r.yaml")])
    assert refused.exit_code == 1
    for text in (shown, refused.stderr):
        assert "looked for attention (a Softmax" in text
        assert "0 Softmax or Attention and 1 MatMul or Gemm, most of its nodes are 2 Conv" in text
        assert "a convolutional network" in text


def test_a_quantized_model_gets_one_line(tmp_path: Path) -> None:
    graph, y = block()
    dense, path = graph.save(tmp_path / "dense.onnx", y), tmp_path / "q.onnx"
    quantize_dynamic(str(dense), str(path))
    lines = CliRunner().invoke(main, ["inspect", str(path)]).stdout.splitlines()
    assert [line for line in lines[1:] if "quantize" in line] == [
        "quantized: weights of blocks 0; prune first, then quantize"
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_table_fits_with_one_line_a_block(width: int) -> None:
    names = [f"encoder.layers.encoder_layer_{k}.self_attention.block" for k in range(12)]
    columns = ("block", "name", "heads", "params")
    table = Table(None, columns, [[str(k), n, "3", "1.2 M"] for k, n in enumerate(names)], spare=("params",))
    wide = Table(None, columns, table.rows, ("right", "left", "right", "right"), spare=("params",))
    fitted = wide.fitted(width, 3)
    widths = [max(len(row[k]) for row in (fitted.columns, *fitted.rows)) for k in range(len(fitted.columns))]
    assert sum(widths) + 3 * (len(widths) - 1) <= width
    assert len(fitted.rows) == 12
    assert ("params" in fitted.columns) == (width > 60)


def test_names_are_cut_in_the_middle() -> None:
    assert shortened("encoder.layer.11.attention", 12) == "encode…ntion"
    assert shortened("short", 12) == "short"
