"""Places that take no output, and names that no file can have, end in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.matching.tiny import block
from toast_onnx.errors import ConfigError
from toast_onnx.planning.strict_yaml import write_text_atomically


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph, y = block()
    return graph.save(tmp_path / "block.onnx", y)


def shell(command: str) -> subprocess.CompletedProcess[str]:
    program = f"'{sys.executable}' -m toast_onnx_cli.main"
    return subprocess.run(["sh", "-c", f"{program} {command}"], stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_behind_stdout(model: Path) -> None:
    done = shell(f"inspect '{model}' >/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["Error: the output cannot be written: No space left on device"]


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes it")
def test_stdout_that_was_closed(model: Path) -> None:
    done = shell(f"inspect '{model}' >&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_name_of_thousands_of_letters() -> None:
    done = shell(f"inspect {'a' * 4000}.onnx")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")


def test_text_that_cannot_be_written_where_nothing_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only file system neither the draft can be made nor its absence be confirmed."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ConfigError, match="Read-only file system"):
        write_text_atomically(tmp_path / "r.yaml", "text")
