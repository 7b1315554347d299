"""Recipes against torchvision's, timm's and transformers' own code, and against numpy on odd images."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.calibration.tiny import noise
from toast_onnx.errors import ConfigError, DataError
from toast_onnx_calibration.images import decode
from toast_onnx_calibration.recipe_files import from_hugging_face, from_timm, recipe_for
from toast_onnx_calibration.recipes import NAMED, Recipe, adapt, cover, parse_recipe, shorter_side

# Both sides normalise the same 8-bit pixels in float32, in a different order of operations: a few units in the last
# place of values up to about 3. A pixel that is off by one would differ by 1/255/0.23 = 0.017.
EXACT = 2e-6
SIZES = [(37, 50), (50, 37), (300, 411), (411, 300), (227, 227), (225, 340), (20, 90)]


def timm_transforms() -> Any:
    """timm's transform factory; torchvision's missing native operators are declared so that it imports."""
    torch = pytest.importorskip("torch")
    definitions = torch.library.Library("torchvision", "FRAGMENT")
    for line in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # torchvision's own are there, or another test declared them
            definitions.define(line)
    factory = pytest.importorskip("timm.data.transforms_factory", exc_type=ImportError)
    factory.keep = definitions  # a library object that is collected takes its operators along
    return factory.transforms_imagenet_eval


def timm_config(size: tuple[int, int], ratio: float, mode: str, interpolation: str) -> dict[str, Any]:
    return {
        "input_size": (3, *size),
        "crop_pct": ratio,
        "crop_mode": mode,
        "interpolation": interpolation,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }


@pytest.mark.parametrize(
    ("size", "ratio", "mode", "interpolation"),
    [
        ((224, 224), 0.9, "center", "bicubic"),
        ((224, 224), 0.875, "center", "bilinear"),
        ((224, 224), 1.0, "squash", "bicubic"),
        ((28, 28), 0.95, "center", "nearest"),
        ((96, 64), 0.9, "center", "lanczos"),
        ((32, 32), 0.8, "squash", "box"),
    ],
)
def test_equals_timm(size: tuple[int, int], ratio: float, mode: str, interpolation: str) -> None:
    config = timm_config(size, ratio, mode, interpolation)
    options = {"crop_pct": ratio, "crop_mode": mode, "interpolation": interpolation}
    reference = timm_transforms()(img_size=size, mean=config["mean"], std=config["std"], **options)
    recipe = from_timm({"pretrained_cfg": config}, "config.json")
    for number, (height, width) in enumerate(SIZES):
        image = noise(height, width, number)
        expected = reference(image).numpy()
        np.testing.assert_allclose(recipe.apply(image), expected, atol=EXACT, err_msg=f"{height}x{width}")


PROCESSORS = {
    "ViTImageProcessorPil": "transformers.models.vit.image_processing_pil_vit",
    "CLIPImageProcessorPil": "transformers.models.clip.image_processing_pil_clip",
    "DeiTImageProcessorPil": "transformers.models.deit.image_processing_pil_deit",
    "BitImageProcessorPil": "transformers.models.bit.image_processing_pil_bit",
    "ConvNextImageProcessorPil": "transformers.models.convnext.image_processing_pil_convnext",
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTImageProcessorPil", {}),
        ("ViTImageProcessorPil", {"size": {"height": 96, "width": 64}, "resample": 3}),
        ("ViTImageProcessorPil", {"do_normalize": False, "rescale_factor": 1 / 127.5}),
        ("ViTImageProcessorPil", {"do_rescale": False, "do_normalize": False}),
        ("CLIPImageProcessorPil", {}),
        ("CLIPImageProcessorPil", {"crop_size": {"height": 199, "width": 177}}),
        ("DeiTImageProcessorPil", {}),
        # DINOv2's preprocessor_config.json
        (
            "BitImageProcessorPil",
            {
                "size": {"shortest_edge": 256},
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            },
        ),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}}),
    ],
)
def test_equals_transformers(kind: str, options: dict[str, Any]) -> None:
    module = pytest.importorskip(PROCESSORS[kind], reason="transformers 5 has Pillow processors", exc_type=ImportError)
    processor = getattr(module, kind)(**options)
    recipe, _ = from_hugging_face(processor.to_dict(), "preprocessor_config.json")
    for number, (height, width) in enumerate(SIZES):
        image = noise(height, width, number)
        expected = np.asarray(processor(image)["pixel_values"][0])
        # Values reach 255 without the rescaling, so the tolerance is relative to the largest.
        tolerance = EXACT * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(recipe.apply(image), expected, atol=tolerance, err_msg=f"{height}x{width}")


def test_named_recipes_are_the_published_numbers() -> None:
    deit = NAMED["imagenet"]
    assert (deit.resize, deit.crop, deit.interpolation) == (256, 224, "bicubic")
    assert (deit.mean, deit.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert NAMED["imagenet-inception"].mean == NAMED["imagenet-inception"].std == (0.5, 0.5, 0.5)
    clip = pytest.importorskip(PROCESSORS["CLIPImageProcessorPil"], exc_type=ImportError).CLIPImageProcessorPil()
    ours = from_hugging_face(clip.to_dict(), "")[0]
    assert (ours.resize, ours.mean, ours.std) == (NAMED["clip"].resize, NAMED["clip"].mean, NAMED["clip"].std)


@pytest.mark.parametrize(("side", "resize"), [(224, 256), (384, 438), (518, 592), (28, 32), (448, 512)])
def test_adapting_keeps_the_crop_ratio(side: int, resize: int) -> None:
    adapted = adapt(NAMED["imagenet"], ("batch", 3, side, side))
    assert (adapted.resize, adapted.crop) == (resize, 224 if side == 224 else side)
    assert adapted.apply(noise(60, 90)).shape == (3, side, side)


@given(
    name=st.sampled_from(sorted(NAMED)),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    image=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    layout=st.sampled_from(["nchw", "nhwc"]),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=60, deadline=None)
def test_any_image_gets_exactly_the_models_shape(
    name: str, height: int, width: int, image: tuple[int, int], layout: str, channels: int
) -> None:
    # A side of 1 or 3 pixels could be read as channels; such an input is no image size.
    height, width = height + 3, width + 3
    shape = (None, channels, height, width) if layout == "nchw" else (None, height, width, channels)
    recipe = adapt(NAMED[name], shape)
    assert recipe.apply(noise(*image)).shape == shape[1:]
    assert adapt(recipe, shape) == recipe


def test_free_height_and_width_leave_the_recipe() -> None:
    assert adapt(NAMED["imagenet"], ("b", 3, "h", "w")) == NAMED["imagenet"]
    assert NAMED["none"].apply(noise(31, 45)).shape == (3, 31, 45)


def test_without_a_crop_a_fixed_input_is_stretched_to() -> None:
    assert adapt(Recipe(resize=300), (1, 3, 32, 48)).resize == (32, 48)
    pixels = np.asarray(noise(32, 48))
    np.testing.assert_allclose(
        adapt(NAMED["none"], (1, 3, 32, 48)).apply(noise(32, 48)), pixels.transpose(2, 0, 1) / 255, atol=1e-7
    )


def test_channels_layout_and_type() -> None:
    image = noise(10, 12)
    pixels = np.asarray(image)
    bgr = Recipe(channels="bgr", layout="nhwc", scale=1.0, mean=(0, 0, 0), dtype="uint8")
    np.testing.assert_array_equal(bgr.apply(image), pixels[:, :, ::-1])
    # mean and std are given in the order R, G, B and follow their channels.
    tinted = Recipe(channels="bgr", scale=1.0, mean=(1, 2, 3), std=(4, 5, 6)).apply(image)
    np.testing.assert_allclose(tinted[0], (pixels[:, :, 2] - 3.0) / 6, rtol=1e-6)
    gray = adapt(NAMED["imagenet"], (1, 1, 10, 12))
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    whole = gray.model_copy(update={"resize": None, "mean": (0.0,), "std": (1.0,), "scale": 1.0}).apply(image)
    assert whole.shape == (1, 10, 12)
    assert np.abs(whole[0] - luma).max() <= 1.0  # Pillow rounds the luma to 8 bits
    assert gray.mean == pytest.approx((0.449,))
    assert Recipe(dtype="float16").apply(image).dtype == np.float16


def test_small_images_are_enlarged_to_the_crop() -> None:
    tiny = Image.new("RGB", (5, 9), (255, 0, 0))
    out = Recipe(crop=(20, 30)).apply(tiny)
    assert out.shape == (3, 20, 30)
    assert out[0].min() == 1.0  # no padding around it


def test_odd_margins_follow_each_library() -> None:
    image = Image.fromarray(np.arange(7, dtype=np.uint8)[None].repeat(4, 0))
    raw = {"crop": 4, "channels": "gray", "scale": 1.0, "dtype": "uint8"}
    assert parse_recipe(raw, "").apply(image)[0, 0, 0] == 2  # round(1.5)
    assert parse_recipe(raw | {"crop_offset": "floor"}, "").apply(image)[0, 0, 0] == 1


def png16(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.uint16)).save(path)
    return path


def test_every_pixel_format_becomes_eight_bit_colour(tmp_path: Path) -> None:
    base = noise(6, 8)
    pixels = np.asarray(base)
    raw = Recipe(scale=1.0, dtype="uint8", layout="nhwc")
    gray = np.asarray(base.convert("L"))

    alpha = base.copy()
    alpha.putalpha(Image.fromarray(gray))
    alpha.save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(raw.apply(decode(tmp_path / "alpha.png")), pixels)

    indexed = Image.fromarray((np.arange(48).reshape(6, 8) % 3).astype(np.uint8), "P")
    indexed.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    indexed.save(tmp_path / "palette.png", transparency=b"\x00\xff\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = raw.apply(decode(tmp_path / "palette.png"))
    np.testing.assert_array_equal(read, np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])[np.asarray(indexed)])

    deep = np.arange(48).reshape(6, 8) * 1365
    read = raw.apply(decode(png16(tmp_path / "deep.png", deep)))
    np.testing.assert_array_equal(read, np.repeat((deep // 256)[:, :, None], 3, 2))

    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(raw.apply(decode(tmp_path / "gray.png")), np.repeat(gray[:, :, None], 3, 2))
    Image.fromarray(gray > 128).save(tmp_path / "bits.png")
    assert set(np.unique(raw.apply(decode(tmp_path / "bits.png")))) == {0, 255}
    base.convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    assert np.abs(raw.apply(decode(tmp_path / "print.jpg")).astype(int) - pixels).mean() < 20
    base.save(tmp_path / "lossless.webp", lossless=True)
    np.testing.assert_array_equal(raw.apply(decode(tmp_path / "lossless.webp")), pixels)


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_honoured(orientation: int, turn: int, tmp_path: Path) -> None:
    image = noise(6, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "turned.png")), np.rot90(np.asarray(image), turn))


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 600), st.integers(1, 600))
def test_covering_covers_and_touches(height: int, width: int, box_height: int, box_width: int) -> None:
    new_height, new_width = cover(height, width, box_height, box_width)
    assert new_height >= box_height
    assert new_width >= box_width
    assert new_height == box_height or new_width == box_width
    assert min(shorter_side(height, width, box_height)) <= box_height <= max(shorter_side(height, width, box_height))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"croop": 3}, "unknown key 'croop'; did you mean 'crop'"),
        ({"resize": 0}, "resize"),
        ({"resize": True}, "resize"),
        ({"resize": [1, 2, 3]}, "resize"),
        ({"crop": "224"}, "crop"),
        ({"mean": [1, 2]}, "mean needs 1 or 3 numbers, not 2"),
        ({"std": 0}, "std and scale must be above 0"),
        ({"mean": float("nan")}, "mean"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"dtype": "uint8"}, "raw pixels"),
        ([1, 2], "a recipe is a mapping"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(data: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml: ") as caught:
        parse_recipe(data, "my.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_no_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"4-D input, the model's has shape \(batch, 128\)"):
        adapt(NAMED["imagenet"], ("batch", 128))
    with pytest.raises(DataError, match="1 or 3 channels"):
        adapt(NAMED["imagenet"], (1, 4, 32, 32))
    with pytest.raises(ConfigError, match="says layout nhwc"):
        adapt(Recipe(layout="nhwc"), (1, 3, 32, 32))


def test_feature_maps_take_no_recipe() -> None:
    """Four axes alone make no image: tensors of 64 channels come as they are."""
    assert recipe_for(None, None, (1, 64, 8, 8)).recipe == recipe_for(None, None).recipe
    with pytest.raises(DataError, match="1 or 3 channels"):
        adapt(NAMED["imagenet"], (1, 64, 8, 8))
