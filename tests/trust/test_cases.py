"""Hostile and damaged files, small: each gives one `Error:` line and status 1, quickly and in little memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.matching.tiny import block

CASES = Path(__file__).parents[1] / "cases" / "trust"
#: The command, then its largest memory in KiB. A parent's measure of a child counts the parent, which it starts as.
MEASURED = """
import atexit, re, runpy, sys
def tell():
    with open("/proc/self/status") as status:
        print("largest memory:", re.search(r"VmHWM:\\s*(\\d+)", status.read())[1], file=sys.stderr)
atexit.register(tell)
sys.argv[0] = "toast-onnx"
runpy.run_module("toast_onnx_cli.main", run_name="__main__")
"""
#: Seconds of processor time, and memory; a machine may be busy, so that by the clock it takes longer.
SECONDS, BYTES = 5, 1 << 30
PATIENCE = 120


def toast(*arguments: str | Path) -> tuple[int, str, int]:
    """Exit status, standard error and largest memory in bytes of a command in a process of its own."""
    words = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)),
    )
    assert process.stderr is not None
    started = time.monotonic()
    text = process.stderr.read()
    assert process.wait() is not None
    assert time.monotonic() - started < PATIENCE
    text, _, largest = text.rpartition("largest memory: ")
    return process.returncode, text, int(largest) * 1024


def refused(*arguments: str | Path) -> str:
    """The one line of a command that has to refuse."""
    status, text, memory = toast(*arguments)
    lines = text.strip().splitlines()
    assert status == 1, text
    assert len(lines) == 1, text
    assert lines[0].startswith("Error: "), text
    assert memory < BYTES
    return lines[0]


@pytest.fixture
def ratios(tmp_path: Path) -> Path:
    path = tmp_path / "ratios.yaml"
    path.write_text("version: 1\nalign: 1\nattention: {qk: 0.5, vo: 0.5}\nffn: {fc2: 0.5}\n")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph, y = block()
    return graph.save(tmp_path / "block.onnx", y)


@pytest.mark.parametrize("command", ["inspect", "prune"])
@pytest.mark.parametrize("case", sorted(p.name for p in (CASES / "models").iterdir()))
def test_models(case: str, command: str, ratios: Path, tmp_path: Path) -> None:
    options = [] if command == "inspect" else ["--ratios", ratios, "-o", tmp_path / "out.onnx"]
    assert case in refused(command, CASES / "models" / case, *options)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("case", sorted(p.name for p in (CASES / "statistics").glob("*.npz")))
def test_statistics(case: str, ratios: Path, tmp_path: Path) -> None:
    """One of them is right but for a count in a list, and was taken from another model."""
    model = CASES / "statistics" / "model.onnx"
    line = refused(
        "prune", model, "--ratios", ratios, "--statistics", CASES / "statistics" / case, "-o", tmp_path / "o"
    )
    assert case in line
    assert ("was taken from m.onnx" in line) == (case == "5.npz")


@pytest.mark.parametrize("case", sorted(p.name for p in (CASES / "recipes").iterdir()))
def test_recipes(case: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    graph = model.with_name("image.onnx")
    graph.write_bytes((CASES / "statistics" / "model.onnx").read_bytes())
    recipe = CASES / "recipes" / case
    assert case in refused("compare", graph, graph, "--data", tmp_path / "images", "--preprocess", recipe)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="limits of memory are set on POSIX systems")
def test_a_model_that_is_right_is_pruned(model: Path, ratios: Path, tmp_path: Path) -> None:
    status, text, memory = toast("prune", model, "--ratios", ratios, "-o", tmp_path / "out.onnx")
    assert status == 0, text
    assert (tmp_path / "out.onnx").exists()
    assert memory < BYTES


def test_a_model_whose_networks_read_some_of_their_inputs_is_pruned_again(ratios: Path, tmp_path: Path) -> None:
    """The model that the statistics belong to, without any: it was pruned before, fc1's inputs too."""
    model = CASES / "statistics" / "model.onnx"
    status, text, _ = toast("prune", model, "--ratios", ratios, "-o", tmp_path / "out.onnx")
    assert status == 0, text
    assert json.loads((tmp_path / "out.json").read_text())["no_norm_in_front"] == []
