"""What `build` writes for other programs: Triton repositories, Polygraphy scripts, models with engines inside."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from tests.engines import graphs
from toast_onnx.engines import backends, cuda
from toast_onnx_cli.main import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["build", "m.onnx", *arguments])


def test_a_model_as_it_is_goes_into_a_repository(folder: Path) -> None:
    result = run("--format", "onnx", "--triton", "serve", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["triton"] == "serve/m/config.pbtxt"
    assert (folder / "serve/m/1/model.onnx").exists()
    assert sorted(p.name for p in folder.iterdir()) == ["m.onnx", "serve"]
    again = run("--format", "onnx", "--triton", "serve")
    assert again.exit_code == 1
    assert "config.pbtxt exists already; give --overwrite to replace it, or another name with --triton" in again.stderr
    assert run("--format", "onnx", "--triton", "serve", "--overwrite").exit_code == 0


def test_a_16_bit_graph_goes_in_with_its_types(folder: Path) -> None:
    result = run("--format", "onnx", "--precision", "fp16", "--fp16-io", "--triton", "serve")
    assert result.exit_code == 0, result.output
    assert "TYPE_FP16" in (folder / "serve/m.fp16/config.pbtxt").read_text()
    assert (folder / "m.fp16.onnx").exists()


def test_what_triton_and_polygraphy_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "choose", lambda name: SimpleNamespace(name="tensorrt-rtx"))
    result = run("--triton", "serve")
    assert result.exit_code == 1
    assert "Triton serves engines of tensorrt, not of tensorrt_rtx" in result.stderr
    assert "--triton goes with" in run("--format", "ort", "--triton", "serve").stderr
    assert "--polygraphy goes with" in run("--format", "ort", "--polygraphy", "c.py").stderr


def test_an_engine_inside_a_model_needs_a_gpu(folder: Path) -> None:
    if cuda.driver() is not None:
        pytest.skip("a GPU is here")
    result = run("--format", "ep-context")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: --format ep-context builds on a GPU")
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "m.context.onnx").exists()


def test_the_polygraphy_script_names_engine_and_model(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")
    result = run("--precision", "fp16", "--batch", "1:2:4", "--polygraphy", "check.py")
    assert result.exit_code == 0, result.output
    text = (folder / "check.py").read_text()
    assert "HERE / 'm.onnx'" in text
    assert "HERE / 'm.engine'" in text
    assert "(2, 4, 32)" in text
