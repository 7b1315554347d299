"""The benchmark for GPUs on ONNX Runtime's CPU, so that it is known to work where a GPU is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_variant_of_the_example_is_timed() -> None:
    words = [sys.executable, str(SCRIPT), "--provider", "cpu", "--batch", "1", "--rounds", "2", "--no-engines"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:5] for line in done.stdout.splitlines() if line.startswith("| digits_vit")]
    assert [row[1].strip() for row in rows] == ["dense", "aligned", "tied", "unaligned", "merged", "tied, int8"]
    assert all(float(row[3]) > 0 for row in rows)
