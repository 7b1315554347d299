"""A detection graph as its user meets it: look at it, prune it without and with images, compare every output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from tests import zoo
from tests.end_to_end.command import succeed, write_ratios

#: YOLOS: a ViT with detection tokens; batch, height and width are symbolic, class scores and boxes come out.
YOLOS = zoo.Case("hf-yolos", "torchscript-17", "dynamic")
SHAPE = "pixel_values=1x3x64x96"
HALF = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc2": 0.5}}
RECIPE = {"resize": [64, 96], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 noise images of different sizes."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for k in range(24):
        pixels = rng.integers(0, 256, (80 + k, 120 - k, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:02}.png")
    return folder


@pytest.mark.slow
def test_yolos_from_inspect_to_compare(exported: Callable[[zoo.Case], Path], images: Path, tmp_path: Path) -> None:
    model, ratios = exported(YOLOS), write_ratios(tmp_path / "half.yaml", HALF)
    recipe = write_ratios(tmp_path / "recipe.yaml", RECIPE)

    seen = json.loads(succeed("inspect", model, "--json", "--shape", SHAPE))
    assert seen["inputs"] == {"pixel_values": [1, 3, 64, 96]}
    assert [(b["attention"]["qk_dim"], b["ffn"]["width"]) for b in seen["blocks"]] == [(64, 768)] * 2
    assert all(b["attention"]["qk"]["prunable"] and b["ffn"]["fc2"]["prunable"] for b in seen["blocks"])
    assert {d["node"].split("/")[2] for d in seen["declined"]} == {"class_labels_classifier", "bbox_predictor"}
    assert {d["kind"] for d in seen["declined"]} == {"no-residual"}  # the heads: MLPs, but no blocks

    agreement = {}
    for name, options in {"blind": [], "seeing": ["--data", images, "--preprocess", recipe]}.items():
        out = tmp_path / f"{name}.onnx"
        succeed("prune", model, "--ratios", ratios, "-o", out, "--shape", SHAPE, *options)
        report = json.loads(out.with_suffix(".json").read_text())
        assert [(b["after"]["qk_dim"], b["after"]["vo_dim"], b["after"]["width"]) for b in report["blocks"]] == [
            (32, 32, 384)
        ] * 2
        assert {d["tensor"] for d in report["twin"]["differences"]} >= {"logits", "pred_boxes"}
        assert report["twin"]["batches"] == ([1, 3] if name == "blind" else [1, 3, 2])  # and on two of the samples
        assert report["twin"]["worst"] < 1e-4
        assert report["pruned"]["macs"] < 0.6 * report["dense"]["macs"]
        same_interface_at_other_sizes(model, out)
        asked = ["--data", images, "--preprocess", recipe, "--rounds", "0", "--json"]
        agreement[name] = outputs(json.loads(succeed("compare", model, out, *asked)))
    for found in agreement.values():
        assert set(found) == {"logits", "pred_boxes"}
        assert all(0 < difference < 1 for difference in found.values())
    assert agreement["seeing"]["logits"] < agreement["blind"]["logits"]


def same_interface_at_other_sizes(dense: Path, pruned: Path) -> None:
    """Symbolic axes are still there, and mean it: two images of 96 x 64 go through both."""
    before, after = (onnx.load(p).graph for p in (dense, pruned))
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)
    feeds = {"pixel_values": np.random.default_rng(1).standard_normal((2, 3, 96, 64), dtype=np.float32)}
    shapes = [[o.shape for o in ort.InferenceSession(str(p)).run(None, feeds)] for p in (dense, pruned)]
    assert shapes[0] == shapes[1] == [(2, 10, 6), (2, 10, 4)]


def outputs(comparison: dict[str, Any]) -> dict[str, float]:
    """Relative difference of every output."""
    return {name: found["relative_error"] for name, found in comparison["outputs"].items()}
