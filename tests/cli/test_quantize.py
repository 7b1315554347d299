"""`toast-onnx quantize`: one file, one table, plain output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests import zoo
from toast_onnx.report.measured import read_measured
from toast_onnx_cli.main import main


def test_the_steps_are_shown(exported: Callable[[zoo.Case], Path], tmp_path: Path) -> None:
    model, out = exported(zoo.Case("timm-vit")), tmp_path / "q.onnx"
    np.save(tmp_path / "x.npy", zoo.inputs(model, 4)["input"])
    arguments = ["quantize", str(model), "--data", str(tmp_path / "x.npy"), "--preprocess", "none", "-o", str(out)]
    arguments += ["--dense", str(model)]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)  # nothing else is printed
    assert [row["step"] for row in document["steps"]] == ["dense", "float", "int8"]
    assert document["steps"][0]["agreement"] == document["steps"][1]["agreement"] == 1.0
    assert len(document["layers"]) == 8
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert "give --overwrite" in again.stderr
    plain = CliRunner().invoke(main, [*arguments, "--overwrite"])
    assert "8 linear layers in int8, 2 kept" in plain.stdout
    assert "agrees with first" in plain.stdout


@pytest.mark.slow
def test_samples_are_drawn_as_the_pruned_models_were(exported: Callable[[zoo.Case], Path], tmp_path: Path) -> None:
    dense, pruned, data = exported(zoo.Case("timm-vit")), tmp_path / "p.onnx", tmp_path / "x.npy"
    np.save(data, zoo.inputs(dense, 8)["input"])
    (tmp_path / "r.yaml").write_text("version: 1\nffn: {fc2: 0.5}\n")
    words = ["prune", dense, "--ratios", tmp_path / "r.yaml", "--data", data, "--samples", "6", "--seed", "3"]
    result = CliRunner().invoke(main, [*map(str, words), "-o", str(pruned)])
    assert result.exit_code == 0, result.stderr
    assert read_measured(pruned).model_dump() == {"samples": 6, "seed": 3}
    words = ["quantize", pruned, "--data", data, "--method", "minmax", "--json", "-o", tmp_path / "q.onnx"]
    document = json.loads(CliRunner().invoke(main, list(map(str, words))).stdout)
    assert (document["samples"], document["seed"]) == (6, 3)
    pruned.write_bytes(dense.read_bytes())  # another model than the report's
    assert read_measured(pruned).model_dump() == {"samples": None, "seed": 0}
