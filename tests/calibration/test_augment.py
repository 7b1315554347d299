"""Augmented images: the recipe's size, type and numbers, and changes within their limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from toast_onnx.errors import ConfigError
from toast_onnx_calibration.augment import LEVELS, Augmentation, augmentation, output_size, random_box
from toast_onnx_calibration.recipes import NAMED, Recipe


def picture(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "recipe",
    [
        NAMED["imagenet"],
        Recipe(resize=(24, 32), mean=0.5, std=0.25, layout="nhwc"),
        Recipe(crop=16, channels="gray", dtype="float16"),
        Recipe(),
    ],
)
def test_shape_and_type_are_the_recipes(level: str, recipe: Recipe) -> None:
    plain = recipe.apply(picture())
    found = LEVELS[level].apply(picture(), recipe, np.random.default_rng(1))
    assert found.shape == plain.shape
    assert found.dtype == plain.dtype


def test_none_is_the_recipe_itself() -> None:
    recipe = NAMED["clip"]
    np.testing.assert_array_equal(
        Augmentation().apply(picture(), recipe, np.random.default_rng(0)), recipe.apply(picture())
    )


def test_mirroring_turns_about_half_of_the_images() -> None:
    recipe = Recipe(resize=(40, 60))
    plain = recipe.apply(picture())
    turned = 0
    for seed in range(200):
        found = Augmentation(mirror=True).apply(picture(), recipe, np.random.default_rng(seed))
        turned += np.array_equal(found, plain[:, :, ::-1])
        assert np.array_equal(found, plain) or np.array_equal(found, plain[:, :, ::-1])
    assert 70 < turned < 130


def test_a_crop_shows_a_part_of_the_image() -> None:
    """On a ramp from left to right a crop's first and last column tell where it was cut."""
    ramp = Image.fromarray(np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3)).copy())
    recipe = Recipe(resize=(50, 50), interpolation="bilinear")
    widths = []
    for seed in range(100):
        row = 255 * Augmentation(area=0.25).apply(ramp, recipe, np.random.default_rng(seed))[0, 25]
        widths.append(row[-1] - row[0])
        assert np.all(np.diff(row) > 0)
    assert min(widths) >= 200 * np.sqrt(0.25 * 3 / 4) - 6
    assert max(widths) - min(widths) > 50


def test_the_normalisation_is_the_recipes() -> None:
    gray = Image.new("RGB", (30, 30), (128, 128, 128))
    recipe = Recipe(resize=(8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    found = LEVELS["light"].apply(gray, recipe, np.random.default_rng(0))
    np.testing.assert_allclose(found[:, 0, 0], (128 / 255 - np.array([0.1, 0.2, 0.3])) / [0.5, 0.25, 1.0], rtol=1e-5)


def test_colour_changes_stay_within_their_limit() -> None:
    gray = Image.new("RGB", (8, 8), (100, 100, 100))
    values = [
        255 * Augmentation(colour=0.3).apply(gray, Recipe(), np.random.default_rng(seed))[0, 0, 0] for seed in range(60)
    ]
    assert min(values) >= 69
    assert max(values) <= 131
    assert max(values) - min(values) > 30


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.05, 0.99), st.integers(0, 99))
def test_boxes_lie_inside_and_are_large_enough(height: int, width: int, area: float, seed: int) -> None:
    left, top, right, bottom = random_box(height, width, area, 4 / 3, np.random.default_rng(seed))
    assert 0 <= left < right <= width + 1e-6
    assert 0 <= top < bottom <= height + 1e-6
    assert (right - left) * (bottom - top) >= area * height * width * (1 - 1e-6)


def test_sizes_that_depend_on_the_image_are_not_cropped() -> None:
    assert output_size(Recipe(resize=64)) is None
    assert output_size(Recipe(resize=64, crop=(32, 48))) == (32, 48)
    assert output_size(Recipe(resize=(20, 30), keep_ratio=True)) is None


def test_names() -> None:
    assert augmentation("strong", mirror=False).mirror is False
    assert augmentation("strong").mirror is True
    with pytest.raises(ConfigError, match="choose none, light, strong"):
        augmentation("wild")
