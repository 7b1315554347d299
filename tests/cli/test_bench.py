"""`toast-onnx bench` and `check-engine`. trtexec is a STAND-IN here (tests/engines/standin.py)."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tests.engines import graphs, standin
from tests.engines.test_trtbench import engine
from toast_onnx.engines import cuda
from toast_onnx.engines.build import record_path
from toast_onnx_cli import bench, check_engine
from toast_onnx_cli.main import LazyGroup


class Group(LazyGroup):
    """The program's group with these two commands, so that expected failures end as they do for users."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return {"bench": bench.command, "check-engine": check_engine.command}[cmd_name]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and engines, no trtexec, no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRTEXEC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("toast_onnx.engines.trtexec._USUAL_PLACES", ())
    monkeypatch.setattr(cuda, "driver", lambda: None)
    graphs.save(graphs.mlp(4096), tmp_path / "dense.onnx")
    graphs.save(graphs.mlp(16), tmp_path / "pruned.onnx")
    for name in ("dense.engine", "pruned.engine"):
        engine(tmp_path, name)
    return tmp_path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that a GPU is here: the stand-in trtexec does not touch it."""
    monkeypatch.setattr(cuda, "gpu_name", lambda: "pretended")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(Group(), list(arguments))


def test_onnx_runtime_by_default() -> None:
    result = run("bench", "dense.onnx", "pruned.onnx", "--threads", "1", "--rounds", "5", "--batch", "1,4", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert (document["runtime"], document["provider"], document["threads"]) == ("onnxruntime", "cpu", 1)
    assert [(r["model"], r["batch"], r["rounds"]) for r in document["results"]] == [
        (m, b, 5) for b in (1, 4) for m in ("dense.onnx", "pruned.onnx")
    ]
    for row in document["results"]:
        assert row["model_sha256"] == hashlib.sha256(Path(row["model"]).read_bytes()).hexdigest()
    table = run("bench", "dense.onnx", "--rounds", "2").stdout
    assert "images/s" in table
    assert "dense.onnx" in table


@pytest.mark.parametrize("major", [10, 11])
def test_trtexec_measures_in_turns(folder: Path, gpu: None, major: int) -> None:
    path = standin.write(folder, major)
    made = json.loads(record_path(folder / "pruned.engine").read_text()) | {"model_sha256": "5a"}
    record_path(folder / "pruned.engine").write_text(json.dumps(made))
    result = run(
        *("bench", "dense.engine", "pruned.engine", "--runtime", "trtexec"),
        *("--batch", "1,8", "--rounds", "2", "--blocks", "--json"),
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["version"] == ("10.16.1" if major == 10 else "11.1.0")
    assert [r["speedup"] for r in document["results"]] == pytest.approx([1.0, 2.0, 1.0, 2.0])
    assert [r["model_sha256"] for r in document["results"]] == [None, "5a"] * 2  # what the JSON beside an engine says
    assert document["results"][0]["blocks"] == {"blocks.0": 1.0, "blocks.1": 0.5, "other": 0.5}
    assert len(standin.calls(path)) == 8


def test_tables_of_an_engine(folder: Path, gpu: None) -> None:
    standin.write(folder, 11)
    result = run("bench", "dense.engine", "--runtime", "trtexec", "--rounds", "1", "--blocks", "--no-cuda-graph")
    assert result.exit_code == 0, result.output
    assert "2.000" in result.stdout
    assert "blocks.0" in result.stdout
    assert "50.0%" in result.stdout


def test_a_dry_run_prints_the_commands_and_runs_nothing(folder: Path) -> None:
    path = standin.write(folder, 10)
    result = run("bench", "dense.engine", "--runtime", "trtexec", "--batch", "8", "--dry-run", "--warmup", "500")
    assert result.exit_code == 0
    words = shlex.split(result.stdout.splitlines()[-1])
    assert words[:3] == [str(path), "--loadEngine=dense.engine", "--shapes=x:8x3x8x8"]
    assert {"--warmUp=500", "--duration=3", "--useCudaGraph", "--noDataTransfers", "--useSpinWait"} < set(words)
    assert standin.calls(path) == []


@pytest.mark.parametrize("with_trtexec", [True, False])
def test_without_a_gpu_the_commands_are_left_behind(folder: Path, with_trtexec: bool) -> None:
    if with_trtexec:
        standin.write(folder, 11)
    result = run("bench", "dense.engine", "pruned.engine", "--runtime", "trtexec", "--script", "go.sh")
    assert result.exit_code == 1
    assert result.stdout == (folder / "go.sh").read_text()
    assert result.stdout.count("--loadEngine=") == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert ("no GPU here" if with_trtexec else "trtexec was not found") in line
    if with_trtexec:
        subprocess.run(["/bin/sh", "go.sh"], check=True, capture_output=True)


def test_the_assumed_version_decides_where_trtexec_is_not(folder: Path) -> None:
    old = run("bench", "dense.engine", "--runtime", "trtexec", "--dry-run", "--trtexec-version", "10.3").stdout
    new = run("bench", "dense.engine", "--runtime", "trtexec", "--dry-run", "--trtexec-version", "11").stdout
    assert "--useCudaGraph" in old
    assert "CudaGraph" not in new


def test_rtx_engines_run_in_their_own_program(folder: Path) -> None:
    engine(folder, "rtx.engine", "tensorrt-rtx")
    assert (
        "\ntensorrt_rtx --loadEngine=rtx.engine"
        in run("bench", "rtx.engine", "--runtime", "trtexec", "--dry-run").stdout
    )
    mixed = run("bench", "rtx.engine", "dense.engine", "--runtime", "trtexec", "--dry-run")
    assert mixed.exit_code == 1
    assert "measure them apart" in mixed.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["dense.onnx", "--batch", "0"], 2, "not a list of batch sizes"),
        (["dense.onnx", "--dry-run"], 2, "go with --runtime trtexec"),
        (["absent.onnx"], 1, "Error: "),
        (["dense.engine", "--runtime", "trtexec", "--batch", "64", "--dry-run"], 1, "built for batches 1 to 32"),
        (["dense.engine", "--runtime", "trtexec", "--trtexec", "nowhere"], 1, "Error: nowhere is not a program"),
        (["dense.onnx", "--provider", "cuda"], 1, "Error: "),
    ],
)
def test_failures(arguments: list[str], status: int, message: str) -> None:
    result = run("bench", *arguments)
    assert result.exit_code == status
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_check_engine_without_a_gpu_leaves_its_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["check-engine", "dense.engine", "dense.onnx", "--script", "check.sh"]
    monkeypatch.setattr("sys.argv", ["toast-onnx", *arguments])
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == f"toast-onnx {shlex.join(arguments)}\n"
    assert (folder / "check.sh").read_text().endswith(result.stdout)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: an engine runs on an NVIDIA GPU and none is here")
