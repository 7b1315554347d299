"""`prune --replay`: a report's run once more, byte for byte, or a line that says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.end_to_end.command import DIGITS
from toast_onnx.model import file_hash
from toast_onnx_cli.main import main


def toast(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on the shipped example, with one option from the environment."""
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes(DIGITS.read_bytes())
    Path("r.yaml").write_text("version: 1\nffn: {fc2: 0.5, score: l2}\ncompensation: {kind: none}\n")
    monkeypatch.setenv("TOAST_PRUNE_SEED", "3")
    result = toast("-q", "prune", "m.onnx", "--ratios", "r.yaml", "--overwrite", "-o", "p.onnx")
    assert result.exit_code == 0, result.stderr
    monkeypatch.delenv("TOAST_PRUNE_SEED")
    return Path("p.json")


def test_a_run_is_repeated_byte_for_byte(report: Path) -> None:
    assert json.loads(report.read_text())["command"][-2:] == ["--seed", "3"]
    result = toast("prune", "--replay", "p.json")
    assert result.exit_code == 0, result.stderr
    assert "the same bytes as p.json tells of" in result.stdout
    assert Path("p.again.onnx").read_bytes() == Path("p.onnx").read_bytes()
    assert json.loads(Path("p.again.json").read_text())["options"]["seed"] == 3
    assert (
        "exists already" in toast("prune", "--replay", "p.json").stderr
    )  # what the first run wrote over is no licence
    Path("r.yaml").write_text("version: 1\nffn: {fc2: 0.25, score: l2}\ncompensation: {kind: none}\n")
    assert "q.onnx is not what p.json tells of" in toast("prune", "--replay", "p.json", "-o", "q.onnx").stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"command": None}, "names no command of prune to repeat"),
        ({"command": ["prune", "--replay", "p.json"]}, "names no command of prune to repeat"),
        ({"command": ["prune", "m.onnx", "--macs", "0.5", "--data", "code:run"]}, "reads samples from Python code"),
        ({"command": ["prune", "m.onnx", "--ratios", "-"]}, "came from stdin"),
        ({"dense": {"sha256": "0" * 64}}, "is not the model that p.json was made from"),
    ],
)
def test_what_cannot_be_repeated_is_said(
    change: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes(DIGITS.read_bytes())
    words = ["prune", "m.onnx", "--ratios", "r.yaml"]
    told = {"command": words, "dense": {"sha256": file_hash(DIGITS)}, "pruned": {"sha256": "1" * 64}}
    Path("p.json").write_text(json.dumps(told | change))
    result = toast("prune", "--replay", "p.json")
    assert result.exit_code
    assert said in result.stderr


def test_a_report_and_settings_contradict_each_other() -> None:
    assert "takes model and settings from the report" in toast("prune", "m.onnx", "--replay", "p.json").stderr
