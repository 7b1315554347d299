"""Recipes of every kind with a wrong value at any key: a recipe that works, or one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toast_onnx.errors import ConfigError, DataError
from toast_onnx_calibration.recipe_files import load_recipe

HUGGING_FACE: dict[str, Any] = {
    "image_processor_type": "ConvNextImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "crop_pct": 0.9,
    "resample": 2,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
}
TIMM: dict[str, Any] = {
    "pretrained_cfg": {
        "input_size": [3, 16, 16],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "crop_mode": "center",
    }
}
OURS: dict[str, Any] = {
    "resize": [20, 20],
    "crop": 16,
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": 0.5,
    "keep_ratio": True,
    "crop_offset": "floor",
    "layout": "nchw",
    "channels": "rgb",
    "dtype": "float32",
    "scale": 1.0,
}
WRONG: list[Any] = [
    *(None, True, False, 0, -1, 1, 10**30, int("9" * 40), 0.5, 1e-320, 1e300, "", "1e9", "2026-01-01", "é" * 500),
    *([], {}, [None] * 3, [0.5], ["a", "b", "c"], [1e300] * 3, {"height": 16}, {"shortest_edge": -5}, [[1], [2], [3]]),
]


def mutants(document: Any) -> list[Any]:
    """The document with every value in turn, at any depth, in place of every wrong one, and with each key left out."""
    found = []
    for key, value in document.items():
        without = {k: v for k, v in document.items() if k != key}
        found += [without, *({**document, key: wrong} for wrong in WRONG)]
        if isinstance(value, dict):
            found += [{**document, key: inner} for inner in mutants(value)]
    return copy.deepcopy(found)


@pytest.mark.parametrize("document", [HUGGING_FACE, TIMM, OURS], ids=["hugging face", "timm", "ours"])
@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_any_wrong_value_is_one_line_or_a_recipe_that_works(document: Any, ending: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((16, 24, 3), np.uint8))
    load_recipe(_write(tmp_path, document, ending)).recipe.apply(image)
    refusals: list[str] = []
    for mutant in mutants(document):
        path = _write(tmp_path, mutant, ending)
        try:
            assert np.isfinite(load_recipe(path).recipe.apply(image)).all(), mutant
        except (ConfigError, DataError) as e:
            refusals.append(str(e))
    assert len(refusals) > 100
    assert all("\n" not in text and len(text) < 600 for text in refusals)


def _write(folder: Path, document: Any, ending: str) -> Path:
    path = folder / f"r.{ending}"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 500, "- " * 5000, "mean: " + "9" * 5000, "mean: 2026-01-01", "mean: .inf"]
)
def test_hostile_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        load_recipe(tmp_path / "r.yaml")
