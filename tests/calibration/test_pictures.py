"""Pictures of samples as a model sees them, and samples on which two models disagree."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.command import DIGITS
from tests.pruning import prune_file
from tests.pruning import run as run_model
from toast_onnx_calibration.comparing import compare, compare_all
from toast_onnx_calibration.pictures import SIDE, picture, small_picture
from toast_onnx_calibration.recipes import Recipe


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
def test_a_picture_is_what_the_recipe_was_given(layout: str, channels: str) -> None:
    shades = np.random.default_rng(0).integers(0, 256, (12, 10) if channels == "gray" else (12, 10, 3), np.uint8)
    mean, std = ([0.4], [0.3]) if channels == "gray" else ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    recipe = Recipe.model_validate({"layout": layout, "channels": channels, "mean": mean, "std": std})
    found = picture(recipe.apply(Image.fromarray(shades)), recipe)
    assert found is not None
    np.testing.assert_array_equal(np.asarray(found), shades)


def test_values_of_unknown_origin_are_stretched_and_what_is_no_image_has_no_picture() -> None:
    found = picture(np.array([[[-2.0, 0.0, 2.0]]]), None)
    assert found is not None
    assert np.asarray(found).tolist() == [[0, 128, 255]]
    assert picture(np.zeros((5, 4, 4)), None) is None
    assert picture(np.zeros(7), None) is None


def test_a_small_picture_is_small() -> None:
    address = small_picture(np.random.default_rng(0).random((3, 300, 200)), None)
    assert address is not None
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE * 2 // 3, SIDE))


def test_samples_that_changed_are_those_of_both_models(tmp_path: Path) -> None:

    folder = tmp_path
    hard = {"version": 1, "ffn": {"fc2": 0.95, "score": "l2"}, "compensation": {"kind": "none"}}
    prune_file(DIGITS, hard, folder / "p.onnx")
    data = DIGITS.with_name("digits_test.npz")
    reading = {"preprocess": "none", "rounds": 0, "threads": 1}
    (found,) = compare_all(DIGITS, [folder / "p.onnx"], data, shown=5, **reading)
    with np.load(data) as file:
        pixels = file["images"][:, None].astype(np.float32) / np.float32(255)
    a, b = (run_model(path, {"pixels": pixels})[0].astype(np.float64) for path in (DIGITS, folder / "p.onnx"))
    changed = np.flatnonzero(a.argmax(1) != b.argmax(1))
    sure = np.exp(a).max(1) / np.exp(a).sum(1)
    expected = sorted(changed, key=lambda k: -sure[k])[:5]
    assert [d["sample"] for d in found.disagreements] == [str(k) for k in expected]
    for d, k in zip(found.disagreements, expected, strict=True):
        assert (d["dense"]["class"], d["pruned"]["class"]) == (a[k].argmax(), b[k].argmax())
        assert d["dense"]["confidence"] == pytest.approx(sure[k], rel=1e-4)
        assert d["picture"].startswith("data:image/jpeg;base64,")
    (plain,) = compare_all(DIGITS, [folder / "p.onnx"], data, shown=5, images=False, **reading)
    assert {d["picture"] for d in plain.disagreements} == {None}
    assert compare(DIGITS, folder / "p.onnx", data, **reading).disagreements == ()
