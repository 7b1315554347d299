"""Samples by number: the same tensors as the sources give, labels, and clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toast_onnx.errors import ConfigError, DataError
from toast_onnx_calibration.augment import LEVELS, Augmentation
from toast_onnx_calibration.labels import open_labels
from toast_onnx_calibration.recipes import Recipe
from toast_onnx_calibration.samples import NumberedSamples, open_samples
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import open_source

PIXELS = ModelInput("pixels", ("batch", 3, 8, 8), np.dtype(np.float32))
RECIPE = Recipe(mean=0.5, std=0.25)


def folder(path: Path, count: int = 5) -> Path:
    rng = np.random.default_rng(0)
    for k in range(count):
        (path / f"{'ab'[k % 2]}").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(path / "ab"[k % 2] / f"{k}.png")
    return path


def opened(spec: Path | str, **options: object) -> NumberedSamples:
    return open_samples(spec, [PIXELS], RECIPE, change=LEVELS["light"], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_plain_samples_are_those_of_the_source(tmp_path: Path, kind: str) -> None:
    spec = folder(tmp_path)
    if kind == "npz":
        spec = tmp_path / "images.npz"
        np.savez(spec, images=np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8))
    samples = opened(spec)
    chunks = [row for chunk in open_source(spec, [PIXELS], RECIPE) for row in chunk.arrays["pixels"]]
    assert len(samples) == len(chunks) == 5
    for k, want in enumerate(chunks):
        np.testing.assert_array_equal(samples.read(k, None)["pixels"], want)
    changed = samples.read(0, np.random.default_rng(0))["pixels"]
    assert changed.shape == (3, 8, 8)
    assert not np.array_equal(changed, chunks[0])
    np.testing.assert_array_equal(changed, samples.read(0, np.random.default_rng(0))["pixels"])


def test_labels_belong_to_their_samples(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    samples = opened(spec, labels=open_labels("folders", spec))
    assert [samples.label(k) for k in range(5)] == [0, 0, 0, 1, 1]
    assert opened(spec).label(0) is None


def test_samples_without_a_label_are_left_out(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    (tmp_path / "labels.csv").write_text("file,label\na/0.png,7\nb/3.png,2\n")
    samples = opened(spec, labels=open_labels(tmp_path / "labels.csv", spec))
    assert [samples.label(k) for k in range(len(samples))] == [7, 2]


def test_ready_tensors_are_never_changed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    samples = opened(tmp_path / "x.npy")
    assert samples.recipe is None
    np.testing.assert_array_equal(samples.read(2, np.random.default_rng(0))["pixels"], values[2])


def test_fingerprints_tell_data_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        np.save(tmp_path / f"{seed}.npy", np.random.default_rng(seed).standard_normal((4, 3, 8, 8)).astype(np.float32))
    prints = [opened(tmp_path / f"{seed}.npy").fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_drawn_samples_follow_the_seed(tmp_path: Path) -> None:
    spec = folder(tmp_path, 9)
    drawn = [opened(spec, samples=4, seed=s).fingerprint for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_sample_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least two samples"):
        opened(folder(tmp_path, 1))


def test_unfitting_tensors_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 3, 7, 8), np.float32))
    with pytest.raises(DataError, match=r"'pixels' has shape \(3, 7, 8\)"):
        opened(tmp_path / "x.npy")


def test_images_need_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe"):
        open_samples(folder(tmp_path), [PIXELS], None, change=Augmentation())


def test_a_damaged_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    spec = folder(tmp_path)
    (spec / "b" / "9.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"9\.png cannot be read"):
        opened(spec).read(5, None)
