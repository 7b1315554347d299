"""`toast-onnx sweep`: several sizes from one set of measurements, gone on with where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests import zoo
from toast_onnx_calibration.sensitivity_stream import Trials
from toast_onnx_cli.main import main

COMMON = ("--data", "x.npy", "--threads", "1")


def sweep(*words: str) -> Result:
    return CliRunner().invoke(main, ["sweep", "m.onnx", "-o", "out", *COMMON, *words])


@pytest.fixture
def model(exported: Callable[[zoo.Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    source = exported(zoo.Case("timm-vit"))
    Path("m.onnx").write_bytes(source.read_bytes())
    np.save("x.npy", zoo.inputs(source, 4)["input"])
    return tmp_path


@pytest.mark.slow
def test_sizes_share_measurements_and_one_that_cannot_be_reached_stops_no_other(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    damage = Trials.damage

    def counted(self: Trials, *args: object, **kwargs: object) -> dict[str, float]:
        ran.append(1)
        return damage(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Trials, "damage", counted)
    first = sweep("--params", "0.8,0.01", "--json")
    assert first.exit_code == 1
    assert "not made: params 0.01 (a params budget of 0.01 cannot be reached" in first.stderr
    document = json.loads(first.stdout)
    assert [m["file"] for m in document["models"]] == ["m.params-0.8.onnx"]
    assert list(document["missed"]) == ["params 0.01"]
    made, trials = Path("out/m.params-0.8.onnx").stat(), len(ran)
    again = sweep("--params", "0.8,0.7", "--json", "--sort", "params")
    assert again.exit_code == 0, again.stderr
    assert Path("out/m.params-0.8.onnx").stat().st_mtime_ns == made.st_mtime_ns
    assert len(ran) - trials <= 1  # the new plan tried whole, and nothing that was measured before
    models = json.loads(again.stdout)["models"]
    assert [m["file"] for m in models] == ["m.params-0.7.onnx", "m.params-0.8.onnx"]
    dense = json.loads(again.stdout)["dense"]["params"]
    assert all(m["params"] <= share * dense for m, share in zip(models, (0.7, 0.8), strict=True))
    assert "same answers against MACs left" in Path("out/report.html").read_text()
    Path("out/report.html").unlink()
    with monkeypatch.context() as bare:
        bare.setitem(sys.modules, "matplotlib", None)
        plain = sweep("--params", "0.8")
    assert plain.exit_code == 0, plain.stderr
    assert "there will be a table and no page: figures need matplotlib" in plain.stderr
    assert "m.params-0.8.onnx" in plain.stdout
    assert not Path("out/report.html").exists()
    other = sweep("--params", "0.8", "--seed", "1")
    assert "out holds results of another seed (0); give another folder with -o" in other.stderr


@pytest.mark.slow
def test_a_size_is_what_prune_makes_of_it(model: Path) -> None:
    assert sweep("--macs", "0.8,0.6").exit_code == 0
    words = ["prune", "m.onnx", "--macs", "0.6", "-o", "alone.onnx", *COMMON]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert Path("alone.onnx").read_bytes() == Path("out/m.macs-0.6.onnx").read_bytes()
    again = CliRunner().invoke(main, ["prune", "--replay", "out/m.macs-0.6.json"])
    assert "the same bytes as out/m.macs-0.6.json tells of" in again.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say the sizes once"),
        (["--macs", "0.5", "--params", "0.5"], "say the sizes once"),
        (["--macs", "80,60"], "fractions are wanted: 0.8,0.6"),
        (["--macs", "0.5", "--csv", "--json"], "either --csv or --json"),
    ],
)
def test_what_is_no_sweep_is_said(words: list[str], said: str) -> None:
    assert said in sweep(*words).stderr


def test_models_of_others_are_not_written_over(model: Path) -> None:
    Path("out").mkdir()
    Path("out/m.macs-0.5.onnx").write_bytes(b"mine")
    assert "m.macs-0.5.onnx exists already" in sweep("--macs", "0.5").stderr
    assert Path("out/m.macs-0.5.onnx").read_bytes() == b"mine"
