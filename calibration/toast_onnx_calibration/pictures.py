"""Pictures of samples as a model sees them: small ones for reports, sheets of them for people."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toast_onnx_calibration.recipes import Recipe

#: Longer side of a small picture, in pixels.
SIDE = 96


def picture(sample: NDArray[Any], recipe: Recipe | None) -> Image.Image | None:
    """One sample as an image, its preprocessing undone; without a recipe, values are stretched over the range.

    Args:
        sample: (C, H, W), or (H, W, C), with one or three channels.
        recipe: what the sample went through.

    Returns:
        The image; None where the sample is none.
    """
    if sample.ndim != 3:
        return None
    last = recipe.layout == "nhwc" if recipe is not None else sample.shape[0] not in (1, 3)
    pixels = np.asarray(sample, np.float64)
    pixels = pixels if last else pixels.transpose(1, 2, 0)  # (H, W, C)
    if pixels.shape[2] not in (1, 3) or not np.isfinite(pixels).all():
        return None
    if recipe is None:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / max(high - low, 1e-12) * 255
    else:
        if recipe.channels == "bgr":
            pixels = pixels[:, :, ::-1]
        pixels = (pixels * np.array(recipe.std) + np.array(recipe.mean)) / recipe.scale
    shades = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return Image.fromarray(shades[:, :, 0] if shades.shape[2] == 1 else shades)


def small_picture(sample: NDArray[Any], recipe: Recipe | None) -> str | None:
    """As `picture`, at most `SIDE` pixels wide and high, as a `data:` address; None where the sample is none."""
    image = picture(sample, recipe)
    if image is None:
        return None
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
