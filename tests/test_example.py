"""The example that ships: what its files promise, and README's first command end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DENSE = EXAMPLES / "digits_vit.onnx"


def accuracy(model: Path) -> float:
    """Accuracy on the shipped test images, in one batch."""
    with np.load(EXAMPLES / "digits_test.npz") as file:
        pixels = file["images"][:, None].astype(np.float32) / np.float32(255)
        labels = file["labels"]
    logits = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"pixels": pixels})[0]
    assert isinstance(logits, np.ndarray)
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def test_dense_model_is_small_valid_and_accurate() -> None:
    assert DENSE.stat().st_size < 3_000_000
    onnx.checker.check_model(DENSE, full_check=True)
    assert accuracy(DENSE) >= 0.96


def test_dense_model_has_a_dynamic_batch_and_names_no_source_file_of_its_making() -> None:
    model = onnx.load(DENSE)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    text = DENSE.read_bytes()
    for trace in (b"site-packages", b".py"):
        assert trace not in text


def test_images_are_uint8_and_calibration_is_disjoint_from_test() -> None:
    with np.load(EXAMPLES / "digits_test.npz") as file:
        test, labels = file["images"], file["labels"]
    with np.load(EXAMPLES / "digits_calibration.npz") as file:
        assert file.files == ["images"]
        calibration = file["images"]
    assert test.shape == (1000, 28, 28)
    assert labels.shape == (1000,)
    assert set(labels.tolist()) == set(range(10))
    assert calibration.shape == (256, 28, 28)
    assert test.dtype == calibration.dtype == np.uint8
    assert not {image.tobytes() for image in test} & {image.tobytes() for image in calibration}


def test_ratios_file_prunes_attention_and_ffn_without_data() -> None:
    ratios = yaml.safe_load((EXAMPLES / "ratios.yaml").read_text(encoding="utf-8"))
    assert ratios["version"] == 1
    assert ratios["attention"]["qk"] > 0
    assert ratios["attention"]["vo"] > 0
    assert ratios["ffn"]["fc2"] > 0
    assert "calibration" not in ratios


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder run.py wrote to and what it printed."""
    folder = tmp_path_factory.mktemp("example")
    arguments = [sys.executable, str(EXAMPLES / "run.py"), "--out", str(folder), "--rounds", "5"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_run_writes_a_smaller_model_that_still_reads_digits(run: tuple[Path, str]) -> None:
    folder, _ = run
    pruned = folder / "digits_vit.pruned.onnx"
    onnx.checker.check_model(pruned, full_check=True)
    assert pruned.stat().st_size < 0.65 * DENSE.stat().st_size
    assert accuracy(pruned) >= 0.9
    report = json.loads((folder / "digits_vit.pruned.json").read_text(encoding="utf-8"))
    assert isinstance(report, dict)


def test_run_prints_what_is_measured_side_by_side(run: tuple[Path, str]) -> None:
    folder, printed = run
    rows = {line[:24].strip(): line[24:].split() for line in printed.splitlines()}
    dense, pruned, _ = rows["accuracy, 1000 images, %"]
    assert float(dense) == pytest.approx(100 * accuracy(DENSE), abs=0.051)
    assert float(pruned) == pytest.approx(100 * accuracy(folder / "digits_vit.pruned.onnx"), abs=0.051)
    for name in ("MACs an image, M", "parameters, k", "file, kB"):
        dense, pruned, fraction = rows[name]
        assert float(pruned) < float(dense)
        assert float(fraction) < 0.7
    assert "batch of 50, ms" in rows
