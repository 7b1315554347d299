"""The installed `toast-onnx` command, run as a user runs it, and what a user may expect of a refusal."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from toast_onnx_cli.main import main

#: A trained ViT that ships with the project: small, six blocks, input pixels (batch, 1, 28, 28).
DIGITS = Path(__file__).parents[2] / "examples" / "digits_vit.onnx"
#: Asks something of every part by weights alone, so that it is quick.
QUICK: dict[str, Any] = {
    "version": 1,
    "attention": {"qk": 0.5, "vo": 0.25, "select": "index", "score": "l2"},
    "ffn": {"fc2": 0.5, "score": "l2"},
    "compensation": {"kind": "none"},
}

#: What other libraries would write to stderr: ONNX Runtime's colours, Python's warnings.
FOREIGN = re.compile(r"\x1b\[|onnxruntime:|\w+Warning:")

Listing = dict[str, str]


def program() -> str:
    """The `toast-onnx` of this Python's environment."""
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("toast-onnx", path=beside_python)
    if found is None:
        pytest.skip("the command is not installed: pip install -e .")
    return found


def toast(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `toast-onnx` with arguments; options go to `subprocess.run`."""
    command = [program(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)
    assert [line for line in done.stderr.splitlines() if FOREIGN.search(line)] == []
    return done


def succeed(*arguments: str | Path, **options: Any) -> str:
    """Run `toast-onnx`, expect success, return what it printed."""
    done = toast(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(*arguments: str | Path, **options: Any) -> str:
    """Run `toast-onnx`, expect status 1 with one `Error:` line and no traceback; return the line.

    Without options for `subprocess.run` the command runs in this process, which takes a fraction of the time.
    """
    done = toast(*arguments, **options) if options else _within(*arguments)
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert [line for line in lines if line.startswith("Error:")] == lines[-1:]
    return lines[-1]


def _within(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [*map(str, arguments)]
    result = CliRunner().invoke(main, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)


def contents(*folders: Path) -> Listing:
    """Every path below the folders, hidden ones too, with a digest of files and the target of links."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                found[str(path)] = f"-> {os.readlink(path)}"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = "folder"
    return found


def write_ratios(path: Path, document: dict[str, Any] | str) -> Path:
    """A ratios file from a document (JSON is YAML) or from text."""
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path
