"""Recipes: how an image file becomes the tensor a model was trained on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, field_validator, model_validator

from toast_onnx.errors import ConfigError, DataError

Dim = int | str | None
"""One dimension of a model's input: a number, or a name or None where it is free."""

_Side = Annotated[int, Strict(), Field(gt=0, le=65536)]
_Size = _Side | tuple[_Side, _Side]
_Number = Annotated[float, Strict(), Field(ge=-1e9, le=1e9)]

_SMALLEST = 1e-12  # what is left of it in float32 still divides

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


#: Pixels of an image, as it is stored and as a recipe resizes it; an image of a few bytes can ask for any number.
MAX_PIXELS = 64_000_000
_allowed = {"pixels": MAX_PIXELS}


def set_max_pixels(count: int) -> None:
    """Allow images of more, or only of fewer pixels than `MAX_PIXELS`, from now on."""
    _allowed["pixels"] = count
    Image.MAX_IMAGE_PIXELS = max(count, MAX_PIXELS)  # Pillow's own limit is twice this


def max_pixels() -> int:
    """The pixels that an image may have."""
    return _allowed["pixels"]


def check_pixels(height: int, width: int, how: str) -> None:
    """Refuse sizes that nobody's images have.

    Args:
        height: in pixels.
        width: in pixels.
        how: what the size is of, such as `resized to`.

    Raises:
        DataError: no pixel at all, or more than are allowed.
    """
    if height < 1 or width < 1:
        raise DataError(f"an image {how} {width} x {height} pixels has none")
    if height * width > _allowed["pixels"]:
        raise DataError(
            f"an image {how} {width} x {height} pixels has more than {_allowed['pixels']}; leave it out, or raise "
            "--max-pixels"
        )


class Recipe(BaseModel):
    """Preprocessing of one image: resize, centre crop, `(pixel * scale - mean) / std`, layout.

    Attributes:
        resize: A number is the length of the shorter side (ratio kept, as torchvision's `Resize`); `[h, w]` is exact;
            None leaves the size alone.
        keep_ratio: With `resize: [h, w]`, keep the ratio and cover that box instead of stretching to it.
        interpolation: Pillow's filter of that name; all but nearest are antialiased.
        crop: Side or `[h, w]` of the centre crop, or None. An image smaller than the crop is enlarged to cover it.
        crop_offset: Where an odd margin goes: `round` to the even offset (torchvision, timm), `floor` (transformers).
        mean: One number or one per channel in R, G, B order, in the units left by `scale`.
        std: Likewise.
        scale: Multiplies the 0..255 pixel values.
        layout: Order of the axes behind the batch.
        channels: Order of the colours; `gray` is one channel of luma (ITU-R 601, Pillow's `L`).
        dtype: Type of the tensor; `uint8` hands out the raw pixels, so it goes with scale 1, mean 0 and std 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resize: _Size | None = None
    keep_ratio: Annotated[bool, Strict()] = False
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    crop: _Size | None = None
    crop_offset: Literal["round", "floor"] = "round"
    mean: tuple[_Number, ...] = (0.0,)
    std: tuple[_Number, ...] = (1.0,)
    scale: _Number = 1 / 255
    layout: Literal["nchw", "nhwc"] = "nchw"
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    dtype: Literal["float32", "float16", "float64", "uint8"] = "float32"

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_number_is_all_channels(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _is_consistent(self) -> Recipe:
        allowed = (1,) if self.channels == "gray" else (1, 3)
        for name in ("mean", "std"):
            given = len(getattr(self, name))
            if given not in allowed:
                raise ValueError(f"{name} needs {' or '.join(map(str, allowed))} numbers, not {given}")
        if min(self.std) < _SMALLEST or self.scale < _SMALLEST:
            raise ValueError("std and scale must be above 0")
        raw = self.scale == 1 and set(self.mean) == {0.0} and set(self.std) == {1.0}
        if self.dtype == "uint8" and not raw:
            raise ValueError("dtype uint8 hands out raw pixels: set scale 1, mean 0 and std 1")
        return self

    def apply(self, image: Image.Image) -> NDArray[Any]:
        """The image as (C, H, W), or (H, W, C) for layout nhwc; H and W are the recipe's or, where free, its own."""
        image = to_mode(image, "L" if self.channels == "gray" else "RGB")
        image = self._crop(self._resize(image))
        pixels = np.atleast_3d(np.asarray(image))  # (H, W, C) uint8
        tensor = pixels if self.dtype == "uint8" else self._normalize(pixels)
        if self.channels == "bgr":
            tensor = tensor[:, :, ::-1]
        if self.layout == "nchw":
            tensor = tensor.transpose(2, 0, 1)
        return np.ascontiguousarray(tensor, dtype=self.dtype)

    def describe(self) -> str:
        """One line for people, such as `shorter side 256 bicubic, crop 224x224, mean 0.5, std 0.5`."""
        parts = []
        if isinstance(self.resize, int):
            parts.append(f"shorter side {self.resize} {self.interpolation}")
        elif self.resize:
            verb = "covering" if self.keep_ratio else "stretched to"
            parts.append(f"{verb} {_times(self.resize)} {self.interpolation}")
        if self.crop:
            parts.append(f"crop {_times(pair(self.crop))}")
        parts.append(f"mean {_numbers(self.mean)}, std {_numbers(self.std)}")
        defaults = {"scale": 1 / 255, "layout": "nchw", "channels": "rgb", "dtype": "float32"}
        parts += [f"{name} {getattr(self, name)}" for name, usual in defaults.items() if getattr(self, name) != usual]
        return ", ".join(parts)

    def _resize(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        check_pixels(height, width, "of")
        if self.resize is None:
            new = (height, width)
        elif isinstance(self.resize, int):
            new = shorter_side(height, width, self.resize)
        elif self.keep_ratio:
            new = cover(height, width, *self.resize)
        else:
            new = self.resize
        if self.crop is not None:
            crop_height, crop_width = pair(self.crop)
            if new[0] < crop_height or new[1] < crop_width:
                new = cover(*new, crop_height, crop_width)
        if new == (height, width):
            return image
        check_pixels(*new, "resized to")
        return image.resize((new[1], new[0]), INTERPOLATIONS[self.interpolation])

    def _crop(self, image: Image.Image) -> Image.Image:
        if self.crop is None:
            return image
        height, width = pair(self.crop)
        margins = (image.height - height, image.width - width)
        top, left = (m // 2 if self.crop_offset == "floor" else round(m / 2) for m in margins)
        return image.crop((left, top, left + width, top + height))

    def _normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled: NDArray[np.float32] = pixels.astype(np.float32) * np.float32(self.scale)
        return (scaled - mean) / std


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STANDARD = Recipe(resize=256, crop=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD)

NAMED: dict[str, Recipe] = {
    # Shorter side 256, bicubic, centre crop 224 (crop ratio 0.875): how DeiT, Swin and most of their kin were
    # evaluated. timm's own numbers for DeiT use a ratio of 0.9; a timm config beside the model says so.
    "imagenet": _STANDARD,
    # timm's AugReg ViTs: ratio 0.9. (Google's checkpoints on Hugging Face stretch to 224x224, as their config says.)
    "imagenet-inception": Recipe(resize=248, crop=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "clip": Recipe(
        resize=224,
        crop=224,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    # The linear evaluation of DINOv2 and the fine-tuned evaluation of MAE at 224 are the standard one.
    "dinov2": _STANDARD,
    "mae": _STANDARD,
    # Stretched to the model's size, 0..1.
    "none": Recipe(),
}


def adapt(recipe: Recipe, shape: Sequence[Dim]) -> Recipe:
    """The recipe for a model's input: its size (crop ratio kept), its layout and its number of channels.

    A fixed height and width replace the crop, and the resize grows or shrinks with it, rounded down; without a crop
    the image is stretched to exactly that size. Free ones leave the recipe as it is. Adapting twice changes nothing.

    Args:
        recipe: What to adapt.
        shape: The input's shape with the batch first, (B, C, H, W) or (B, H, W, C).

    Raises:
        DataError: The input is not an image: not 4-D, or neither 1 nor 3 channels.
        ConfigError: The recipe states a layout that the input does not have.
    """
    shape = tuple(shape)
    if len(shape) != 4:
        raise DataError(f"images need a 4-D input, the model's has shape {show(shape)}: give tensors in a .npz file")
    layout = _layout(recipe, shape)
    count, height, width = (shape[1], *shape[2:]) if layout == "nchw" else (shape[3], *shape[1:3])
    changes: dict[str, Any] = {}
    if layout != recipe.layout:
        changes["layout"] = layout
    if count == 1 and recipe.channels != "gray":
        changes |= {"channels": "gray", "mean": (_average(recipe.mean),), "std": (_average(recipe.std),)}
    if count == 3 and recipe.channels == "gray":
        changes["channels"] = "rgb"  # a gray image three times is what converting L to RGB gives, too
    if isinstance(height, int) and isinstance(width, int):
        changes |= _sizes_for(recipe, height, width)
    return parse_recipe(recipe.model_dump(exclude_unset=True) | changes, "the adapted recipe") if changes else recipe


def takes_images(shape: Sequence[Dim]) -> bool:
    """Whether a shape (B, C, H, W) or (B, H, W, C) may be one of images, not of feature maps."""
    return len(shape) == 4 and any(extent in (1, 3) or not isinstance(extent, int) for extent in (shape[1], shape[3]))


def misfit(recipe: Recipe, shape: Sequence[Dim]) -> str | None:
    """Why a recipe is for other images than a model takes; None where it may be right.

    A recipe for colour images says nothing of gray ones, and one for photographs of 224 pixels nothing of thumbnails of
    less than a quarter of that.

    Args:
        recipe: as it was written, not adapted.
        shape: the input's shape with the batch first, (B, C, H, W) or (B, H, W, C).
    """
    if len(shape) != 4:
        return None
    nchw = _layout(recipe, shape) == "nchw"
    count, sides = (shape[1], shape[2:]) if nchw else (shape[3], shape[1:3])
    if count == 1 and recipe.channels != "gray" and (len({*recipe.mean}) > 1 or len({*recipe.std}) > 1):
        return "it is for colour images"
    meant = pair(recipe.crop) if recipe.crop is not None else recipe.resize
    if isinstance(meant, tuple):
        small = [isinstance(side, int) and 4 * side < wanted for side, wanted in zip(sides, meant, strict=True)]
        if any(small):
            return f"it is for images of about {_times(meant)} pixels"
    return None


def parse_recipe(data: Any, where: str) -> Recipe:
    """A recipe from a mapping (YAML, JSON).

    Raises:
        ConfigError: `where`, and the first thing wrong; for an unknown key the nearest known one.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: a recipe is a mapping with keys such as resize, crop, mean and std")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, Recipe.model_fields, 1, 0.0)
            raise ConfigError(f"{where}: unknown key '{key:.40}'; did you mean '{near[0]}'?") from error
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key + ': ' if key else ''}{reason}") from error


def to_mode(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    """The image in 8 bits a channel, gray or colour, whatever it was stored as. Alpha is dropped, not blended."""
    if image.mode.startswith("I"):
        # 16-bit gray: the high byte, as Pillow itself does for 16-bit colour; its own conversion clips at 255.
        high_byte = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        image = Image.fromarray(high_byte)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) with the shorter one at `side` and the other in proportion, rounded down."""
    if height <= width:
        return side, side * width // height
    return side * height // width, side


def cover(height: int, width: int, box_height: int, box_width: int) -> tuple[int, int]:
    """The smallest (height, width) of the same ratio, to the nearest pixel, that covers a box."""
    if box_height * width >= box_width * height:  # the height decides
        return box_height, max(box_width, round(width * box_height / height))
    return max(box_height, round(height * box_width / width)), box_width


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """A side or a pair as (height, width)."""
    return (size, size) if isinstance(size, int) else size


def show(shape: Sequence[Dim]) -> str:
    """A shape for messages: free dimensions by their name or as `?`."""
    return "(" + ", ".join("?" if d is None else str(d) for d in shape) + ")"


def _layout(recipe: Recipe, shape: Sequence[Dim]) -> Literal["nchw", "nhwc"]:
    first, last = shape[1], shape[3]
    if not isinstance(first, int) and not isinstance(last, int):
        return recipe.layout
    found: Literal["nchw", "nhwc"]
    if first in (1, 3):
        found = "nhwc" if last in (1, 3) and recipe.layout == "nhwc" else "nchw"
    elif last in (1, 3):
        found = "nhwc"
    elif not isinstance(first, int) or not isinstance(last, int):
        return recipe.layout  # a free channel axis and a fixed width, or the other way round
    else:
        raise DataError(f"images have 1 or 3 channels, the model's input is {show(shape)}: give tensors in a .npz file")
    if found != recipe.layout and "layout" in recipe.model_fields_set:
        raise ConfigError(f"the recipe says layout {recipe.layout}, the model's input is {show(shape)}: drop that key")
    return found


def _sizes_for(recipe: Recipe, height: int, width: int) -> dict[str, Any]:
    if recipe.crop is None:
        return {} if recipe.resize == (height, width) else {"resize": (height, width), "keep_ratio": False}
    crop_height, crop_width = pair(recipe.crop)
    if (crop_height, crop_width) == (height, width):
        return {}
    changes: dict[str, Any] = {"crop": height if height == width else (height, width)}
    if recipe.resize is not None:
        resize_height, resize_width = pair(recipe.resize)
        new = (height * resize_height // crop_height, width * resize_width // crop_width)
        ratio_kept = isinstance(recipe.resize, int) or recipe.keep_ratio
        changes["resize"] = new[0] if isinstance(recipe.resize, int) and new[0] == new[1] else new
        changes["keep_ratio"] = ratio_kept and not isinstance(changes["resize"], int)
    return changes


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _numbers(values: Sequence[float]) -> str:
    distinct = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{v:g}" for v in distinct)
