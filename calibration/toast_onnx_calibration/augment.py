"""Augmentation that fits a recipe: random crops at its size and filter, mirroring, colour, then its own numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from toast_onnx.errors import ConfigError
from toast_onnx_calibration.recipes import INTERPOLATIONS, Recipe, pair, to_mode


@dataclass(frozen=True)
class Augmentation:
    """Random changes that leave an image recognisable.

    Attributes:
        area: smallest part of the image's area that a crop keeps; 1 crops nothing and follows the recipe.
        ratio: largest stretch of a crop's sides against each other (3/4 .. 4/3 at 4/3).
        mirror: whether every second image is mirrored left to right.
        colour: largest relative change of brightness, contrast and saturation.
    """

    area: float = 1.0
    ratio: float = 4 / 3
    mirror: bool = False
    colour: float = 0.0

    def apply(self, image: Image.Image, recipe: Recipe, rng: np.random.Generator) -> NDArray[Any]:
        """The augmented image as the recipe's tensor, (C, H, W) or (H, W, C), of the recipe's size.

        A crop is a random part of the whole image, brought to the recipe's size (Szegedy et al. 2015). Where the recipe
        leaves the size free, nothing is cropped.
        """
        image = to_mode(image, "L" if recipe.channels == "gray" else "RGB")
        size = output_size(recipe)
        if size is not None and self.area < 1:
            box = random_box(image.height, image.width, self.area, self.ratio, rng)
            image = image.resize((size[1], size[0]), INTERPOLATIONS[recipe.interpolation], box=box)
            recipe = recipe.model_copy(update={"resize": None, "crop": None})
        if self.mirror and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colour:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = change(image).enhance(float(rng.uniform(1 - self.colour, 1 + self.colour)))
        return recipe.apply(image)

    def describe(self) -> str:
        """One line for people."""
        parts = [f"random crops of {self.area:.0%} .. 100 % of the area"] if self.area < 1 else []
        parts += ["mirroring"] if self.mirror else []
        parts += [f"colours changed by up to {self.colour:.0%}"] if self.colour else []
        return ", ".join(parts) or "none"


LEVELS: dict[str, Augmentation] = {
    "none": Augmentation(),
    "light": Augmentation(area=0.6, mirror=True),
    "strong": Augmentation(area=0.25, mirror=True, colour=0.3),
}


def augmentation(level: str, mirror: bool | None = None) -> Augmentation:
    """An augmentation by name, with mirroring as asked for (None: as the level has it).

    Raises:
        ConfigError: unknown name.
    """
    if level not in LEVELS:
        raise ConfigError(f"unknown augmentation '{level}': choose {', '.join(LEVELS)}")
    found = LEVELS[level]
    return found if mirror is None else Augmentation(found.area, found.ratio, mirror, found.colour)


def output_size(recipe: Recipe) -> tuple[int, int] | None:
    """(height, width) of the recipe's tensors, None where they depend on the image."""
    if recipe.crop is not None:
        return pair(recipe.crop)
    if isinstance(recipe.resize, tuple) and not recipe.keep_ratio:
        return recipe.resize
    return None


def random_box(
    height: int, width: int, area: float, ratio: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a part with at least `area` of the image; the whole image where none fits."""
    for _ in range(10):
        part = rng.uniform(area, 1.0) * height * width
        stretch = math.exp(rng.uniform(-math.log(ratio), math.log(ratio)))
        w, h = math.sqrt(part * stretch), math.sqrt(part / stretch)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return 0.0, 0.0, float(width), float(height)
