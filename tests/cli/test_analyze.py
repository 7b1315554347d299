"""`toast-onnx analyze`: table, JSON, plot, against moments of the PyTorch module's own activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests import zoo
from tests.calibration.reference import references
from toast_onnx_cli.main import SUBCOMMANDS, main

Exported = Callable[[zoo.Case], Path]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported) -> Path:
    monkeypatch.chdir(tmp_path)
    source = exported(zoo.Case("timm-vit"))
    (tmp_path / "m.onnx").write_bytes(source.read_bytes())
    np.save(tmp_path / "x.npy", zoo.inputs(source, 60)["input"])
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["analyze", *arguments, "--threads", "1"])


def test_it_is_a_command() -> None:
    assert "analyze" in SUBCOMMANDS


def test_the_document_measures_the_modules_activations(files: Path) -> None:
    result = run("m.onnx", "--data", "x.npy", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [b["index"] for b in document["blocks"]] == [0, 1]
    for block, found in zip(references("timm-vit", {"input": np.load("x.npy")}), document["blocks"], strict=True):
        for layer, x in (("fc1", block.inputs), ("fc2", block.hidden)):
            rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
            activity = np.sqrt((rows**2).mean(axis=0))
            s = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
            p = s[s > 0] / s.sum()
            assert found[layer]["width"] == rows.shape[1]
            assert found[layer]["dead"] == pytest.approx((activity < 0.2 * activity.mean()).mean())
            assert found[layer]["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=2e-3)
        hidden = block.hidden.reshape(-1, block.hidden.shape[-1])
        inflation = np.diagonal(np.linalg.pinv(np.corrcoef(hidden.T)))  # 1 / (1 - R2), where it is defined
        assert hidden.shape[0] < hidden.shape[1] or found["fc2"]["r2_mean"] == pytest.approx(
            (1 - 1 / inflation).mean(), abs=1e-3
        )
        assert 0 < found["fc1"]["r2_mean"] < 0.99  # the norm's own tie does not count


def test_a_table_and_a_plot(files: Path) -> None:
    result = run("m.onnx", "--data", "x.npy", "--plot", "p.png", "--dead", "0.5")
    assert result.exit_code == 0, result.stderr
    assert "effective rank" in result.stdout
    assert len([line for line in result.stdout.splitlines() if " fc1 " in line or " fc2 " in line]) == 4
    assert (files / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in files.iterdir()) == ["m.onnx", "p.png", "x.npy"]


def test_statistics_of_calibrate_serve_for_what_they_hold(files: Path) -> None:
    (files / "r.yaml").write_text("version: 1\nffn: {fc1: 0.5, fc2: 0.5}\n")
    arguments = ("calibrate", "m.onnx", "--data", "x.npy", "-o", "s.npz", "--threads", "1", "--class-weight", "1")
    assert CliRunner().invoke(main, [*arguments, "--ratios", "r.yaml"]).exit_code == 0
    ours = json.loads(run("m.onnx", "--statistics", "s.npz", "--json").stdout)
    assert ours["blocks"] == json.loads(run("m.onnx", "--data", "x.npy", "--json").stdout)["blocks"]
    assert (
        CliRunner().invoke(main, [*arguments, "--overwrite"]).exit_code == 0
    )  # without a ratios file: no inputs of fc1
    result = run("m.onnx", "--statistics", "s.npz")
    assert result.exit_code == 1
    assert "has no statistics of block 0's inputs activations" in result.stderr


@pytest.mark.parametrize("arguments", [("m.onnx",), ("m.onnx", "--data", "x.npy", "--statistics", "s.npz")])
def test_one_source_of_statistics(files: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "either --data or --statistics" in result.stderr


def test_an_ending_that_is_no_image_is_refused(files: Path) -> None:
    result = run("m.onnx", "--data", "x.npy", "--plot", "p.txt")
    assert result.exit_code == 1
    assert "use .png, .svg or .pdf" in result.stderr
