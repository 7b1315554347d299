"""What float16 cannot hold: found on samples, named, and kept in float32 by a build."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

from tests.engines import graphs
from toast_onnx.engines.precision import convert_precision
from toast_onnx_calibration.magnitudes import largest_magnitudes
from toast_onnx_cli.main import main

X = np.random.default_rng(0).standard_normal((5, 4, 32)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Between two products, values are 100,000 times larger."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    weights = {"large": np.array(1e5, np.float32), "small": np.array(1e-5, np.float32)}
    nodes = "r = Relu (x) b = Mul (r, large) s = Mul (b, small) y = Add (s, x)"
    return graphs.save(graphs.model(nodes, weights), tmp_path / "m.onnx")


def outputs(proto: onnx.ModelProto) -> np.ndarray:
    """By ONNX's reference, in the graph's own types: ONNX Runtime computes much of float16 in float32 on the CPU."""
    with np.errstate(over="ignore"):
        return np.asarray(ReferenceEvaluator(proto).run(None, {"x": X})[0])


@pytest.mark.parametrize("batch", [2, 8])
def test_magnitudes_are_those_of_numpy(batch: int, model: Path) -> None:
    r = np.maximum(X, 0)
    expected = {"r": r, "b": 1e5 * r, "s": r, "y": r + X}
    found = largest_magnitudes(model, "x.npy", batch=batch)
    assert found == pytest.approx({name: float(np.abs(value).max()) for name, value in expected.items()}, rel=1e-6)


def test_infinite_values_do_not_count(model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32(3e38), "large"))
    onnx.save(proto, model)
    found = largest_magnitudes(model, "x.npy")
    assert np.isfinite(list(found.values())).all()
    assert 65504 < found["b"] < 3.5e38


def test_a_build_names_them_and_keeps_them_in_float32(model: Path) -> None:
    words = ["build", "m.onnx", "--format", "onnx", "--precision", "fp16", "--json", "--overwrite"]
    result = CliRunner().invoke(main, [*words, "--data", "x.npy"])
    assert result.exit_code == 0, result.output
    assert "Note: 1 tensors come near float16's largest number, 65504, and stay in float32: b (" in result.stderr
    document = json.loads(result.stdout)
    assert document["kept_fp32"] == ["b"]
    assert [entry["file"] for entry in document["read"]] == ["x.npy"]
    wanted = np.maximum(X, 0) + X
    assert np.abs(outputs(onnx.load("m.fp16.onnx")) - wanted).max() < 5e-3
    plain, _ = convert_precision(onnx.load(model), "fp16")
    assert not np.isfinite(outputs(plain)).all()


def test_where_nothing_is_large_that_is_said(model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32(2), "large"))
    onnx.save(proto, model)
    words = ["build", "m.onnx", "--format", "onnx", "--precision", "fp16", "--data", "x.npy"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "nothing comes near float16's largest number, 65504: the largest magnitude is" in result.stderr
    wrong = CliRunner().invoke(main, ["build", "m.onnx", "--data", "x.npy"])
    assert wrong.exit_code == 2
    assert "--data goes with --precision fp16" in wrong.stderr
