"""Places that take no output, and names that no file can have, end in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.matching.tiny import block
from toast_onnx.errors import ConfigError, DataError, ModelError
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.strict_yaml import write_text_atomically
from toast_onnx_calibration.images import find_images


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


@pytest.mark.skipif(sys.platform == "win32", reason="there is no ulimit on Windows")
def test_an_address_space_that_is_too_small(model: Path) -> None:
    """Further on libraries would end in a crash, or wait for threads that never start."""
    program = f"'{sys.executable}' -m toast_onnx_cli.main inspect '{model}'"
    done = subprocess.run(["sh", "-c", f"ulimit -v 500000; {program}"], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: the address space is limited to 488 MiB and 1024 MiB are the least")


def test_a_name_of_thousands_of_letters() -> None:
    done = shell(f"inspect {'a' * 4000}.onnx")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_names_that_are_not_text(model: Path) -> None:
    named = model.with_name(os.fsdecode(b"m\xff.onnx"))
    named.write_bytes(model.read_bytes())
    for words in (["inspect", named], ["prune", model, "--ratios", "paper:deit_tiny", "-o", named]):
        done = subprocess.run(
            [sys.executable, "-m", "toast_onnx_cli.main", *words], stderr=subprocess.PIPE, text=True, check=False
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line == f"Error: the name {model.parent}/m\\xff.onnx is not text in UTF-8; choose another name"
    with pytest.raises(ModelError, match="not text in UTF-8"):
        save_model(load_model(named), named)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
@pytest.mark.parametrize("name", [b"b\xff.png", b"of\xff/b.png"])
def test_images_whose_names_are_not_text(name: bytes, tmp_path: Path) -> None:
    """They could stand in no fingerprint and in no report."""
    odd = tmp_path / os.fsdecode(name)
    odd.parent.mkdir(exist_ok=True)
    for path in (tmp_path / "a.png", odd):
        Image.new("RGB", (4, 4)).save(path)
    shown = name.decode(errors="backslashreplace")
    with pytest.raises(DataError, match=re.escape(f"the name {shown} is not text in UTF-8")):
        find_images(tmp_path)


def test_data_with_a_name_that_is_too_long(model: Path) -> None:
    done = shell(f"calibrate '{model}' --data {'a' * 300}.png")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert line.endswith("File name too long; give another name")


@pytest.mark.parametrize("length", [240, 246, 300])
def test_outputs_with_long_names(length: int, model: Path, tmp_path: Path) -> None:
    """A name may have 255 bytes, with what a model's weights and report add to it."""
    out = tmp_path / f"{'a' * length}.onnx"
    if length == 240:
        save_model(load_model(model), out)
        assert out.exists()
    else:
        with pytest.raises(ModelError, match="too long"):
            save_model(load_model(model), out)


def test_a_place_that_is_read_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ModelError, match="Read-only file system"):
        save_model(load_model(model), model.with_name("new.onnx"))
    with pytest.raises(ConfigError, match="Read-only file system"):
        write_text_atomically(model.with_name("r.yaml"), "text")


def test_text_that_cannot_be_written_where_nothing_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only file system neither the draft can be made nor its absence be confirmed."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ConfigError, match="Read-only file system"):
        write_text_atomically(tmp_path / "r.yaml", "text")
