"""`toast-onnx build`: what it writes, where it prints, exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tests.engines import graphs
from toast_onnx_cli.build import command, size
from toast_onnx_cli.main import LazyGroup

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")


class Group(LazyGroup):
    """The program's group with this one command, so that expected failures end as they do for users."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return command


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    graphs.save(graphs.unsupported(), tmp_path / "bad.onnx")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(Group(), ["build", *arguments])


def test_an_engine_beside_the_model(folder: Path) -> None:
    result = run("m.onnx", "--precision", "fp16", "--batch", "1:8:32", "--compute-capability", "8.0,89,sm120")
    assert result.exit_code == 0
    assert (folder / "m.engine").stat().st_size > 1000
    assert json.loads((folder / "m.engine.json").read_text())["compute_capabilities"] == [80, 89, 120]
    assert "1x4x32 .. 8x4x32 .. 32x4x32" in result.stdout
    assert "SM80, SM89, SM120" in result.stdout
    assert "building" in result.stderr


def test_json_is_the_file_beside_the_engine(folder: Path) -> None:
    result = run("m.onnx", "-o", "e.plan", "--timing-cache", "t", "--workspace", "64M", "--json")
    assert json.loads(result.stdout) == json.loads((folder / "e.plan.json").read_text())
    assert json.loads(result.stdout)["workspace"] == 64 << 20
    assert "Note: tensorrt-rtx times no kernels" in result.stderr


def test_nodes_tensorrt_lacks_are_listed_before_the_error(folder: Path) -> None:
    result = run("bad.onnx")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[-3].split(None, 2) == ["area", "Det", "this operator is not supported"]
    assert lines[-2].split(None, 2) == ["distinct", "Unique", "this operator is not supported"]
    assert lines[-1].startswith("Error: TensorRT does not take 2 node(s)")
    assert result.stdout == ""
    assert not (folder / "bad.engine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "8:1:2"], "Error: batch '8:1:2' is not in ascending order"),
        (["--min-shapes", "z:1x4x32"], "Error: the model has no input 'z'"),
        (["--min-shapes", "x:1x4x32"], "Error: input 'x' has no opt and no max shape"),
        (["--compute-capability", "90"], "Error: tensorrt-rtx"),
        (["--compute-capability", "ada"], "Error: compute capability 'ada' is not like"),
        (["--fp16-io"], "Error: --fp16-io goes with --precision fp16"),
        (["--format", "ort", "-o", "m.bin"], "Error: m.bin: --format ort writes"),
    ],
)
def test_what_cannot_be_ends_in_one_line(folder: Path, arguments: list[str], message: str) -> None:
    result = run("m.onnx", *arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(message)
    assert sorted(p.name for p in folder.iterdir()) == ["bad.onnx", "m.onnx"]


def test_wrong_usage_is_status_2() -> None:
    assert run("m.onnx", "--workspace", "3x").exit_code == 2
    assert run("m.onnx", "--precision", "int8").exit_code == 2


def test_onnx_runtimes_format(folder: Path) -> None:
    result = run("m.onnx", "--format", "ort")
    assert result.exit_code == 0
    assert (folder / "m.ort").read_bytes()[4:8] == b"ORTM"


@pytest.mark.parametrize(
    ("text", "value"), [("512", 512), ("64k", 64 << 10), ("512M", 512 << 20), ("4GiB", 4 << 30), ("1mb", 1 << 20)]
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value
