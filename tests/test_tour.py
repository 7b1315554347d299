"""The notebook that ships: it is its script, it holds pictures, it is small, and the script runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT, NOTEBOOK = EXAMPLES / "tour.py", EXAMPLES / "tour.ipynb"


def cells_of_script(text: str) -> list[tuple[str, str]]:
    """Kind and text of the cells of a script in the percent format."""
    found = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [re.sub(r"^# ?", "", line) for line in body.strip("\n").splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip("\n")))
    return found


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """The notebook's cells."""
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = document["cells"]
    return found


def test_the_notebook_is_its_script(cells: list[dict[str, Any]]) -> None:
    written = cells_of_script(SCRIPT.read_text(encoding="utf-8"))
    assert [(c["cell_type"], "".join(c["source"])) for c in cells] == written
    assert [text.partition("\n")[0] for kind, text in written if kind == "markdown"][1:] == [
        "## Load", "## Look", "## Plan", "## Prune", "## Compare", "## What each size costs"
    ]  # fmt: skip


def test_the_notebook_holds_what_its_cells_show_and_is_small(cells: list[dict[str, Any]]) -> None:
    code = [c for c in cells if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == [*range(1, len(code) + 1)]
    kinds = [kind for c in code for output in c["outputs"] for kind in output.get("data", {})]
    assert kinds.count("image/png") >= 3
    assert kinds.count("text/html") >= 3
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not re.search(r"/(home|root|tmp|work)/", text)
    assert not any(output["output_type"] == "error" for c in code for output in c["outputs"])


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path) -> None:
    for name in ("tour.py", "digits_vit.onnx", "digits_test.npz", "digits_calibration.npz"):
        shutil.copy(EXAMPLES / name, tmp_path)
    environment = {**os.environ, "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "tour.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    assert "the twin agrees to" in done.stdout
    assert "answers as the dense model does on" in done.stdout
