"""Evaluation: accuracy on tiny models whose answers are known, metrics, errors, and real DeiT-T."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from PIL import Image

from tests import zoo
from tests.calibration.tiny import colour_folder, colour_model, two_input_model
from toast_onnx.errors import ConfigError, DataError
from toast_onnx_calibration.accuracy import Accuracy
from toast_onnx_calibration.evaluating import Result, classify, evaluate, measure
from toast_onnx_calibration.labels import Labels
from toast_onnx_calibration.recipes import NAMED
from toast_onnx_calibration.sessions import make_session, model_inputs
from toast_onnx_calibration.sources import open_source

TRUTH = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return colour_folder(tmp_path / "images")


@pytest.fixture
def labels(images: Path, tmp_path: Path) -> Path:
    """All twelve right but two: a red one called green, a blue one called class 9."""
    lines = []
    for path in sorted(images.rglob("*.png")):
        label = TRUTH[path.parent.name]
        name = path.relative_to(images).as_posix()
        label = {"red/0.png": 1, "blue/3.png": 9}.get(name, label)
        lines.append(f"{name},{label}")
    csv = tmp_path / "labels.csv"
    csv.write_text("file,label\n" + "\n".join(lines))
    return csv


@pytest.mark.parametrize("batch", [1, 5, "batch"])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_counts_whatever_the_batch_and_type(
    batch: int | str, dtype: int, images: Path, labels: Path, tmp_path: Path
) -> None:
    model = colour_model(tmp_path / "m.onnx", batch, 56, dtype=dtype, classes=10)
    seen: list[tuple[int, int | None]] = []
    result = evaluate(model, images, labels, preprocess="imagenet", batch=4, progress=lambda *at: seen.append(at))
    # The red image called green has green second: wrong first, right among five. Class 9 scores lowest of all.
    assert result.accuracy == Accuracy(12, 10, 11, "scores", 10)
    assert (seen[0], seen[-1]) == ((0, 12), (12, 12))
    assert result.batch == (4 if batch == "batch" else batch)
    assert result.notes == ()


def test_the_document(images: Path, labels: Path, tmp_path: Path) -> None:
    result = evaluate(colour_model(tmp_path / "m.onnx", size=56, classes=10), images, labels)
    document = result.to_json()
    assert document["accuracy"]["top1"]["correct"] == 10
    assert document["preprocessing"]["crop"] == 56
    assert "using imagenet" in document["notes"][0]
    # pixels of 20 and 220, of eight images: the first two of the three colours, in equal parts
    low, high = ((x / 255 - np.array((0.485, 0.456, 0.406))) / (0.229, 0.224, 0.225) for x in (20, 220))
    assert f"values from {low.min():.3g} to" in document["notes"][1]
    assert float(re.search(r"to ([\d.]+), mean", document["notes"][1])[1]) <= high.max() + 0.01  # type: ignore[index]
    assert len(document["fingerprint"]) == 64


def test_scores_are_found_behind_other_outputs(images: Path, labels: Path, tmp_path: Path) -> None:
    model = colour_model(tmp_path / "m.onnx", size=56, classes=10, with_map=True)
    assert evaluate(model, images, labels).accuracy.output == "scores"  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"no output 'logits': it has map tensor\(float\)"):
        evaluate(model, images, labels, output="logits")
    with pytest.raises(DataError, match=r"'map' has shape .* not one row of class scores"):
        evaluate(model, images, labels, output="map")


def test_folder_names_as_labels(images: Path, tmp_path: Path) -> None:
    # Sorted, the folders are blue, green, red: only green has the model's number.
    result = evaluate(colour_model(tmp_path / "m.onnx"), images, "folders", preprocess="none")
    assert result.accuracy == Accuracy(12, 4, None, "scores", 3)
    assert result.notes == ()
    wider = evaluate(colour_model(tmp_path / "w.onnx", classes=8), images, "folders", preprocess="none")
    assert "3 folders, but the model has 8 classes" in wider.notes[0]


def test_labels_beside_tensors(tmp_path: Path) -> None:
    pixels = np.zeros((5, 3, 8, 8), np.float32)
    pixels[np.arange(5), [0, 1, 2, 0, 1]] = 1
    np.savez(tmp_path / "d.npz", pixels=pixels, labels=[0, 1, 2, 0, 0])
    result = evaluate(colour_model(tmp_path / "m.onnx", 2), tmp_path / "d.npz")
    assert result.accuracy == Accuracy(5, 4, None, "scores", 3)
    assert result.notes == ()  # no recipe was used, so none is talked about
    few = evaluate(colour_model(tmp_path / "m.onnx", 2), tmp_path / "d.npz", samples=3, seed=1)
    assert few.accuracy is not None
    assert few.accuracy.samples == 3


def test_only_labelled_images_are_drawn(images: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("red/1.png,0\nblue/1.png,2\ngone.png,1")
    result = evaluate(colour_model(tmp_path / "m.onnx"), images, tmp_path / "l.csv", samples=2, preprocess="none")
    assert result.accuracy == Accuracy(2, 2, None, "scores", 3)
    assert "1 files that are not there" in result.notes[0]
    assert "10 images have no label" in result.notes[1]


def test_a_label_beyond_the_classes(images: Path, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"label 9 \(blue/3\.png\) is beyond the 3 classes of the output 'scores'"):
        evaluate(colour_model(tmp_path / "m.onnx", size=56), images, labels)


def test_a_broken_model_is_not_right_by_accident(tmp_path: Path) -> None:
    model = onnx.load(colour_model(tmp_path / "m.onnx"))
    bias = np.full(3, np.nan, np.float32)
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(bias, "bias"))
    onnx.save(model, tmp_path / "broken.onnx")
    np.savez(tmp_path / "d.npz", pixels=np.zeros((2, 3, 8, 8), np.float32), labels=[0, 0])
    result = evaluate(tmp_path / "broken.onnx", tmp_path / "d.npz")
    assert result.accuracy == Accuracy(2, 0, None, "scores", 3, not_finite=2)
    assert "2 samples hold NaN or infinity" in result.notes[-1]


def test_corrupt_images_are_skipped_and_named(images: Path, tmp_path: Path) -> None:
    for i in range(30):
        Image.new("RGB", (9, 9), (250, 0, 0)).save(images / "red" / f"more{i}.png")
    (images / "green" / "1.png").write_bytes(b"\x89PNG")
    model = colour_model(tmp_path / "m.onnx")
    result = evaluate(model, images, "folders", preprocess="none")
    assert result.accuracy is not None
    assert result.accuracy.samples == 41
    assert result.notes == ("1 of 42 images cannot be read and were skipped: green/1.png",)
    for i in range(3):
        (images / "red" / f"more{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match="more than 5% of 42 images"):
        evaluate(model, images, "folders", preprocess="none")


def test_a_metric_sees_every_output_without_padding(images: Path, labels: Path, tmp_path: Path) -> None:
    model = colour_model(tmp_path / "m.onnx", 5, with_map=True)
    session = make_session(model)
    inputs = model_inputs(session)
    source = open_source(images, inputs, NAMED["none"])
    seen: list[Result] = []

    def metric(results: Any) -> dict[str, float]:
        seen.extend(results)
        return {"samples": sum(len(r.rows) for r in seen), "nothing": float("nan")}

    values = measure(session, inputs, source, metric, Labels({"red/0.png": 7}, "mine"))
    assert values["samples"] == 12
    assert [len(r.rows) for r in seen] == [5, 5, 2]
    for result in seen:
        np.testing.assert_array_equal(result.outputs["map"], -result.inputs["pixels"])
        assert len(result.outputs["scores"]) == len(result.rows)
    known = {row: label for r in seen for row, label in zip(r.rows, r.labels or (), strict=True)}
    assert known["red/0.png"] == 7
    assert known["red/1.png"] is None


METRICS = """
def right(results):
    return sum(float(r.outputs["scores"].sum()) for r in results)

def early(results):
    return next(results).outputs["scores"].sum()

def crash(results):
    for result in results:
        raise IndexError("boxes")

def text(results):
    list(results)
    return {"a": "b"}
"""


def test_metrics_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text(METRICS)
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "d.npz", ids=np.full((40, 4), 2), mask=np.ones((40, 4), np.float32))
    model = two_input_model(tmp_path / "two.onnx")
    result = evaluate(model, tmp_path / "d.npz", metric="my_metrics:right")
    assert result.metrics == {"right": 320.0}
    assert result.accuracy is None
    for name, words in (
        ("early", "stopped before the last batch"),
        ("crash", "failed with IndexError: boxes"),
        ("text", "must return a number or a mapping"),
        ("absent", "has no 'absent'"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluate(model, tmp_path / "d.npz", metric=f"my_metrics:{name}")
    np.savez(tmp_path / "nan.npz", ids=np.full((1, 4), 2), mask=np.full((1, 4), np.nan))
    with pytest.raises(DataError, match="NaN"):  # the data's fault, not the metric's
        evaluate(model, tmp_path / "nan.npz", metric="my_metrics:right")


def test_a_sample_without_a_label(tmp_path: Path) -> None:
    session = make_session(colour_model(tmp_path / "m.onnx"))
    inputs = model_inputs(session)
    np.save(tmp_path / "d.npy", np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(DataError, match="no label for sample 1"):
        classify(session, inputs, open_source(tmp_path / "d.npy", inputs, None), Labels({"0": 0}, "mine"))


@pytest.mark.slow
@pytest.mark.skipif("TOAST_DATA" not in os.environ, reason="TOAST_DATA does not name the folder of weights and images")
def test_deit_tiny_on_real_images(exported: Callable[[zoo.Case], Path]) -> None:
    data = Path(os.environ["TOAST_DATA"]) / "data" / "ilsvrc_val_300"
    model = exported(zoo.Case("deit-tiny-real"))
    result = evaluate(model, data, data / "labels.csv", preprocess="imagenet", samples=60, threads=2)
    assert result.accuracy is not None
    # 72.2 % on the whole validation set and about 80 % on these; wrong preprocessing or labels fall far below.
    assert result.accuracy.top1 >= 42
    assert result.accuracy.top5 is not None
    assert result.accuracy.top5 >= 52
