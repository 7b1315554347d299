"""trtexec found, asked and commanded. The program here is a STAND-IN (see standin.py), not TensorRT's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.engines import standin
from toast_onnx.engines.profiles import ShapeRange
from toast_onnx.engines.trtexec import (
    BenchSettings,
    Trtexec,
    ask,
    assumed,
    command,
    find_trtexec,
    parse_version,
    run,
    script,
)
from toast_onnx.errors import BackendError, ConfigError

SHAPES = {"x": (8, 3, 224, 224)}


@pytest.fixture(autouse=True)
def no_trtexec_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither PATH nor TRTEXEC of the machine that runs the tests counts."""
    monkeypatch.delenv("TRTEXEC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("toast_onnx.engines.trtexec._USUAL_PLACES", ())


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101601] [b11] # trtexec --help", (10, 16, 1)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110100] [b3]", (11, 1, 0)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec", (8, 6, 1)),
        ("&&&& RUNNING TensorRT.tensorrt_rtx [TensorRT-RTX v10701] [b1]", (1, 7, 1)),
        ("no banner", ()),
    ],
)
def test_the_banner_gives_the_version(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize(("major", "version"), [(10, (10, 16, 1)), (11, (11, 1, 0))])
def test_a_binary_is_asked(tmp_path: Path, major: int, version: tuple[int, ...]) -> None:
    program = ask(str(standin.write(tmp_path, major)))
    assert program.version == version
    assert program.is_new == (major == 11)
    assert program.describe() == f"trtexec {'.'.join(map(str, version))}"


@pytest.mark.parametrize("major", [10, 11])
def test_the_flags_of_tensorrt_rtx_decide_since_its_version_cannot(tmp_path: Path, major: int) -> None:
    path = standin.write(tmp_path, major, name="tensorrt_rtx", product="TensorRT-RTX", number=10701)
    program = ask(str(path))
    assert program.version == (1, 7, 1)
    assert program.is_new == (major == 11)


def test_old_and_strange_programs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"TensorRT 8\.6\.1; bench knows trtexec 10 and 11"):
        ask(str(standin.write(tmp_path, 10, number=8601)))
    echo = tmp_path / "echo"
    echo.write_text("#!/bin/sh\necho hello\n")
    echo.chmod(0o755)
    with pytest.raises(BackendError, match="does not answer --help"):
        ask(str(echo))
    with pytest.raises(BackendError, match="cannot be asked"):
        ask(str(tmp_path / "absent"))


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_trtexec() is None
    rtx = standin.write(tmp_path, 11, name="tensorrt_rtx")
    assert find_trtexec() is None
    assert find_trtexec("tensorrt-rtx") == str(rtx)
    plain = standin.write(tmp_path, 11)
    assert find_trtexec() == str(plain)
    other = tmp_path / "other"
    other.mkdir()
    mine = standin.write(other, 10)
    assert find_trtexec("tensorrt", str(mine)) == str(mine)
    monkeypatch.setenv("TRTEXEC", str(mine))
    assert find_trtexec() == str(mine)
    with pytest.raises(BackendError, match="is not a program"):
        find_trtexec("tensorrt", str(tmp_path / "absent"))


@pytest.mark.parametrize("major", [10, 11])
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("transfers", [True, False])
@pytest.mark.parametrize("spin_wait", [True, False])
def test_each_version_is_told_the_same_behaviour_in_its_own_flags(
    major: int, cuda_graph: bool, transfers: bool, spin_wait: bool
) -> None:
    settings = BenchSettings(cuda_graph=cuda_graph, transfers=transfers, spin_wait=spin_wait)
    words = set(command(assumed(str(major)), Path("e.engine"), SHAPES, settings))
    if major == 10:  # off unless asked for, transfers on unless refused
        behaviour = ("--useCudaGraph" in words, "--noDataTransfers" not in words, "--useSpinWait" in words)
        assert words.isdisjoint(standin.OWN[11])
    else:  # on unless refused, transfers off unless asked for
        behaviour = ("--noCudaGraph" not in words, "--includeDataTransfers" in words, "--noSpinWait" not in words)
        assert words.isdisjoint(standin.OWN[10])
    assert behaviour == (cuda_graph, transfers, spin_wait)


@pytest.mark.parametrize("major", [10, 11])
def test_commands_are_accepted(tmp_path: Path, major: int) -> None:
    program = ask(str(standin.write(tmp_path, major)))
    for model in (tmp_path / "m.onnx", tmp_path / "m.engine"):
        model.touch()
        files = {kind: tmp_path / f"{kind}.json" for kind in ("times", "profile", "layers")}
        settings = BenchSettings(times=files["times"], profile=files["profile"], layers=files["layers"])
        words = command(program, model, SHAPES, settings, {"x": ShapeRange((1, 3, 224, 224), SHAPES["x"], SHAPES["x"])})
        assert "PASSED" in run(words)
        assert all(file.exists() for file in files.values())
        assert f"--{'onnx' if model.suffix == '.onnx' else 'loadEngine'}={model}" in words
        assert "--shapes=x:8x3x224x224" in words
        assert ("--minShapes=x:1x3x224x224" in words) == (model.suffix == ".onnx")
        assert ("--stronglyTyped" in words) == (model.suffix == ".onnx" and major == 10)
        assert ("--separateProfileRun" in words) == (major == 10)


def test_a_failed_run_says_what_trtexec_said(tmp_path: Path) -> None:
    program = ask(str(standin.write(tmp_path, 11)))
    with pytest.raises(BackendError, match=r"trtexec failed: Could not open file .*absent\.engine; its command was: "):
        run(command(program, tmp_path / "absent.engine", {}, BenchSettings()))
    with pytest.raises(BackendError, match="Unknown option: --fp16"):
        run([program.path, "--fp16", "--onnx=m.onnx"])


def test_a_script_runs_as_it_stands(tmp_path: Path) -> None:
    path = standin.write(tmp_path, 11)
    model = tmp_path / "a name with spaces.engine"
    model.touch()
    words = command(ask(str(path)), model, SHAPES, BenchSettings())
    file = tmp_path / "go.sh"
    file.write_text(script([words, words], "two runs"))
    subprocess.run(["/bin/sh", str(file)], check=True, capture_output=True)
    assert standin.calls(path) == [words[1:], words[1:]]


def test_only_known_versions_are_assumed() -> None:
    assert assumed("10.3") == Trtexec("trtexec", (10, 3))
    assert assumed("11", "tensorrt-rtx").path == "tensorrt_rtx"
    with pytest.raises(ConfigError, match="use 10 or 11"):
        assumed("9")
