"""`toast-onnx plan` with tokens among its parts: what is planned is what is merged, alone and with narrower layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests import zoo
from tests.pruning import look
from toast_onnx.planning.macs import graph_macs
from toast_onnx_cli.main import main

Exported = Callable[[zoo.Case], Path]
WIDE = ("--points", "0.5", "--align-heads", "16", "--align-width", "64", "--no-heads")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported) -> Path:
    monkeypatch.chdir(tmp_path)
    source = exported(zoo.Case("hf-vit"))
    (tmp_path / "m.onnx").write_bytes(source.read_bytes())
    (name,) = zoo.inputs(source, 8)
    np.save(tmp_path / "x.npy", zoo.inputs(source, 8)[name])
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--threads", "1"])


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("parts", ["tokens", pytest.param("tokens,fc2", marks=pytest.mark.slow)])
def test_what_is_planned_is_what_is_merged(parts: str, files: Path) -> None:
    found = document(run("plan", "m.onnx", "--data", "x.npy", "--parts", parts, *WIDE, "--macs", "0.7", "--json"))
    pruned = document(run("prune", "m.onnx", "--ratios", "m.ratios.yaml", "--data", "x.npy", "--json"))
    planned = {int(b): r for b, r in (found["tokens"] or {"removed": {}})["removed"].items()}
    merges = (pruned["tokens"] or {"merges": []})["merges"]
    merged = {m["block"]: m["before"] - m["after"] for m in merges if m["how"] == "merged"}
    assert merged == planned
    assert planned or parts != "tokens"
    dense, small = look(files / "m.onnx"), look(files / "m.pruned.onnx")
    share = graph_macs(small.view, small.counted) / graph_macs(dense.view, dense.counted)
    assert share == pytest.approx(found["reached"]["macs"]["share"], abs=1e-9)
    assert 0.6 < share <= 0.7
    assert found["measured"]["relative_error"] >= 0
    if parts == "tokens":
        assert found["statistics_sha256"] is None
        assert "statistics" not in (files / "m.ratios.yaml").read_text()


def test_tokens_take_no_parameters_away(files: Path) -> None:
    result = run("plan", "m.onnx", "--data", "x.npy", "--parts", "tokens", "--params", "0.7")
    assert result.exit_code == 1
    assert "merging tokens removes no parameters" in result.stderr


def test_merging_alone_has_a_least(files: Path) -> None:
    result = run("plan", "m.onnx", "--data", "x.npy", "--parts", "tokens", "--macs", "0.2")
    assert result.exit_code == 1
    assert "merging tokens alone cannot reach 0.2 of the macs, only 0." in result.stderr


def test_windows_say_why_not(files: Path, exported: Exported) -> None:
    source = exported(zoo.Case("timm-swin"))
    (files / "swin.onnx").write_bytes(source.read_bytes())
    np.save(files / "y.npy", next(iter(zoo.inputs(source, 2).values())))
    result = run("plan", "swin.onnx", "--data", "y.npy", "--parts", "tokens", "--macs", "0.7")
    assert result.exit_code == 1
    assert "tokens cannot be merged in this model: " in result.stderr
