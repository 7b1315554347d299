"""`toast-onnx check-engine` end to end, with STAND-INS for TensorRT and the CUDA driver (see test_engine_check)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.engines import graphs
from tests.engines.test_engine_check import FakeCuda, fake_tensorrt
from toast_onnx.engines import backends, cuda, engine_check
from toast_onnx.engines.build import record_path
from toast_onnx.model import file_hash
from toast_onnx_cli.check_engine import command
from toast_onnx_cli.main import LazyGroup


class Group(LazyGroup):
    """The program's group with this one command, so that expected failures end as they do for users."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return command


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    (tmp_path / "m.engine").write_bytes(b"engine")
    shapes = {kind: [size, 4, 32] for kind, size in (("min", 1), ("opt", 2), ("max", 4))}
    record = {"profile": {"x": shapes}, "precision": "fp16", "backend": "tensorrt"}
    record_path(tmp_path / "m.engine").write_text(json.dumps(record))
    driver = cuda.Driver(FakeCuda())
    for module in (cuda, engine_check):
        monkeypatch.setattr(module, "driver", lambda: driver)
    monkeypatch.setattr(engine_check, "tensorrt_logger", lambda trt: None)
    monkeypatch.setattr(backends, "choose", lambda name: SimpleNamespace(name=name))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, error: float, *arguments: str) -> Result:
    monkeypatch.setattr(engine_check, "load", lambda backend: fake_tensorrt(graphs.mlp(), error))
    return CliRunner().invoke(Group(), ["check-engine", "m.engine", "m.onnx", *arguments])


def test_agreement_is_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, 0.0, "--json", "--samples", "10")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["passed"]
    assert document["tolerance"] == engine_check.TOLERANCES["fp16"]  # from the JSON beside the engine
    assert document["model_sha256"] == file_hash(Path("m.onnx"))
    assert [f["file"] for f in document["read"]] == ["m.engine.json", "m.engine"]
    assert document["items"] == 12  # whole batches of 4, the largest the engine takes


def test_a_difference_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, 0.5)
    assert result.exit_code == 1
    assert "DIFFERENT within 0.02" in result.stdout
    assert result.stderr.startswith("Error: m.engine differs from m.onnx by more than 0.02")


def test_the_tolerance_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, 0.5, "--tolerance", "1000").exit_code == 0
    assert run(monkeypatch, 1e-3, "--precision", "fp32").exit_code == 1


def test_data_is_fed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((7, 4, 32)).astype(np.float32))
    result = run(monkeypatch, 0.0, "--data", "x.npy", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["items"] == 7
