"""`toast-onnx eval`: what goes to stdout, what to stderr, and the exit statuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from tests.calibration.tiny import colour_folder, colour_model
from toast_onnx_cli.main import SUBCOMMANDS, main


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    colour_model(tmp_path / "m.onnx", size=56, classes=8)
    colour_folder(tmp_path / "images")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["eval", "m.onnx", "--data", "images", *arguments])


def test_it_is_a_command() -> None:
    assert "eval" in SUBCOMMANDS


def test_a_table_with_notes_aside(files: Path) -> None:
    result = run("--labels", "folders")
    assert result.exit_code == 0
    assert "top-1" in result.stdout
    assert "33.33%" in result.stdout  # blue, green, red in sorted order against the model's red, green, blue
    assert "4/12" in result.stdout
    assert "Note" not in result.stdout
    assert "Note: no preprocessing was given" in result.stderr
    assert "3 folders, but the model has 8 classes" in result.stderr


def test_one_json_document(files: Path) -> None:
    result = run("--labels", "folders", "--preprocess", "none", "--batch", "5", "--samples", "7", "--json")
    document = json.loads(result.stdout)
    assert document["model"] == "m.onnx"
    assert document["model_sha256"] == hashlib.sha256((files / "m.onnx").read_bytes()).hexdigest()
    assert document["accuracy"]["samples"] == 7
    assert document["batch"] == 5
    assert document["preprocessing"]["resize"] == [56, 56]


def test_a_metric(files: Path) -> None:
    (files / "metric_of_mine.py").write_text(
        "def f(results):\n    return {'rows': sum(len(r.rows) for r in results), 'x': float('nan')}\n"
    )
    assert "rows" in run("--metric", "metric_of_mine:f").stdout
    assert json.loads(run("--metric", "metric_of_mine:f", "--json").stdout)["metrics"] == {"rows": 12.0, "x": None}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "accuracy needs labels"),
        (["--labels", "absent.csv"], "no such labels file"),
        (["--labels", "folders", "--preprocess", "imagnet"], "give one of imagenet"),
        (["--labels", "folders", "--output-name", "x"], "no output 'x'"),
        (["--metric", "absent_module:f"], "cannot import 'absent_module'"),
    ],
)
def test_failures_are_one_line_and_status_one(files: Path, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert words in line
    assert "Traceback" not in result.stderr


def test_wrong_usage_is_status_two(files: Path) -> None:
    assert run("--labels", "folders", "--provider", "tpu").exit_code == 2
    assert run("--metric", "a:b", "--output-name", "x").exit_code == 2
    assert run("--batch", "0").exit_code == 2


def test_a_note_comes_before_the_work(files: Path) -> None:
    lines = run("--labels", "folders").stderr.splitlines()
    notes = [number for number, line in enumerate(lines) if "using imagenet" in line]
    assert len(notes) == 1
    assert notes[0] < lines.index("evaluating ...")


@pytest.mark.parametrize(
    ("channels", "size", "recipe", "words"),
    [
        (1, 56, "imagenet", "colour images"),
        (3, 32, "imagenet-inception", "about 224x224"),
        (1, 28, "", "taken because"),
    ],
)
def test_a_recipe_for_other_images_names_those_that_fit(
    channels: int, size: int, recipe: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an accuracy that is merely low."""
    monkeypatch.chdir(tmp_path)
    colour_folder(tmp_path / "images")
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", channels, size, size])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", channels])
    node = helper.make_node("ReduceMean", ["pixels"], ["scores"], axes=[2, 3], keepdims=0)
    graph = helper.make_graph([node], "g", [pixels], [scores])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "m.onnx")
    result = run("--labels", "folders", *(["--preprocess", recipe] if recipe else []))
    assert result.exit_code == 1
    assert words in result.stderr
    assert "none fits, or write a recipe file" in result.stderr
    assert "beyond the 1 classes" in run("--labels", "folders", "--preprocess", "none").stderr or channels == 3
