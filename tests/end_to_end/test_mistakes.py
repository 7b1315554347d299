"""Typical mistakes: each gets one line, and the line says how to mend it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from onnxruntime.quantization import quantize_dynamic

from tests.end_to_end.command import DIGITS, QUICK, contents, write_ratios
from tests.matching.tiny import block
from toast_onnx_cli.main import main

DATA = DIGITS.with_name("digits_test.npz")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model `m.onnx`, ratios `r.yaml`, samples `d.npz` and an empty folder `photos`."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DIGITS, "m.onnx")
    shutil.copy(DATA, "d.npz")
    write_ratios(tmp_path / "r.yaml", QUICK)
    (tmp_path / "photos").mkdir()
    return tmp_path


def _nothing() -> None:
    pass


def _earlier_result() -> None:
    Path("m.pruned.onnx").write_text("hours of work")


def _quantized() -> None:
    graph, y = block()
    quantize_dynamic(str(graph.save(Path("dense.onnx"), y)), "q.onnx")


def _convolutional() -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 8, 8]) for n in "xy"]
    weight = onnx.numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "c", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "cnn.onnx")


MISTAKES: dict[str, tuple[Callable[[], None], str, str]] = {
    "a percentage for a fraction": (_nothing, "plan m.onnx --data d.npz --macs 65", "a fraction is wanted: 0.65"),
    "a percent sign": (_nothing, "prune m.onnx --data d.npz --macs 60%", "a fraction is wanted: 0.6"),
    "percentages in a list": (_nothing, "plan m.onnx --data d.npz --macs 0.5 --points 25,60", "wanted: 0.25,0.6"),
    "a number for ratios": (_nothing, "prune m.onnx --ratios 0.5", "`attention: {qk: 0.5, vo: 0.5}`"),
    "a misspelt command": (_nothing, "purne m.onnx", "did you mean 'prune'?"),
    "no command": (_nothing, "m.onnx", "toast-onnx inspect m.onnx"),
    "a misspelt option": (_nothing, "prune m.onnx --ratio r.yaml", "--ratios"),
    "nothing asked for": (_nothing, "prune m.onnx", "--macs 0.6 --data images/"),
    "a goal without samples": (_nothing, "prune m.onnx --macs 0.6", "add --data images/"),
    "two goals": (_nothing, "prune m.onnx --macs 0.6 --ratios r.yaml", "say what goes once"),
    "a wrong folder": (_nothing, "prune m.onnx --ratios r.yaml --data fotos", "fotos"),
    "a folder without images": (_nothing, "prune m.onnx --ratios r.yaml --data photos", "no JPEG, PNG, WebP or BMP"),
    "a recipe for other images": (_nothing, "eval m.onnx --data d.npz --preprocess imagenet", "none fits"),
    "no recipe": (_nothing, "eval m.onnx --data d.npz", "none fits"),
    "an unknown recipe": (_nothing, "eval m.onnx --data d.npz --preprocess imagnet", "give one of imagenet"),
    "a recipe without samples": (_nothing, "prune m.onnx --ratios r.yaml --preprocess none", "add --data"),
    "no labels": (_nothing, "eval m.onnx --data photos --preprocess none", "labels"),
    "an earlier result": (_earlier_result, "prune m.onnx --ratios r.yaml", "give --overwrite"),
    "no such folder": (_nothing, "prune m.onnx --ratios r.yaml -o out/m.onnx", "make it"),
    "a quantized model": (_quantized, "prune q.onnx --ratios r.yaml", "prune first, then quantize"),
    "a convolutional network": (_convolutional, "prune cnn.onnx --ratios r.yaml", "looked for attention"),
    "samples for a model": (_nothing, "prune d.npz --ratios r.yaml", "is not an ONNX file"),
    "half a name on the hub": (_nothing, "inspect hf:deit", "write hf:ORG/NAME"),
    "a sheet without samples": (_nothing, "inspect m.onnx --contact-sheet s.png", "add --data images/"),
    "a picture of no kind": (_nothing, "inspect m.onnx --data d.npz --preprocess none --contact-sheet s.txt", ".png"),
    "a shape without a name": (_nothing, "inspect m.onnx --shape 1x1x28x28", "input=1x3x224x224"),
    "a budget below all widths": (_nothing, "plan m.onnx --data d.npz --preprocess none --params 0.01", "at least 0."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_the_line_that_mends_it(mistake: str, place: Path) -> None:
    prepare, words, mends = MISTAKES[mistake]
    prepare()
    before = contents(place)
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code in (1, 2), result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert mends in line
    assert "/tmp/toast" not in line
    assert contents(place) == before


def test_swapped_models_are_noticed(place: Path) -> None:
    run = CliRunner().invoke
    assert run(main, ["prune", "m.onnx", "--ratios", "r.yaml"]).exit_code == 0
    words = ["--data", "d.npz", "--samples", "8", "--preprocess", "none", "--rounds", "0"]
    result = run(main, ["compare", "m.pruned.onnx", "m.onnx", *words])
    assert result.exit_code == 0
    assert "give them the other way round" in result.stderr
    assert "other way round" not in run(main, ["compare", "m.onnx", "m.pruned.onnx", *words]).stderr


def test_a_budget_below_all_widths_is_refused_before_the_trials(place: Path) -> None:
    result = CliRunner().invoke(main, ["plan", "m.onnx", "--data", "d.npz", "--preprocess", "none", "--params", "0.01"])
    assert "calibrating" not in result.stderr
