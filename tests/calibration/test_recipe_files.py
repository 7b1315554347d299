"""Which recipe a model gets: the option, a config beside it, or the default with a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toast_onnx.errors import ConfigError
from toast_onnx_calibration.recipe_files import from_hugging_face, from_timm, load_recipe, recipe_for
from toast_onnx_calibration.recipes import NAMED

TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
}
VIT = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def test_the_order_is_option_then_neighbour_then_imagenet(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    default = recipe_for(model, None)
    assert default.recipe == NAMED["imagenet"]
    assert "using imagenet" in default.notes[0]

    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"]}))
    assert recipe_for(model, None).source == "imagenet"  # somebody else's config.json
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    timm = recipe_for(model, None)
    assert (timm.recipe.resize, timm.recipe.crop, timm.source) == (248, (224, 224), str(tmp_path / "config.json"))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT))
    vit = recipe_for(model, None)
    assert (vit.recipe.resize, vit.recipe.interpolation) == ((224, 224), "bilinear")
    assert "preprocessor_config.json" in vit.notes[0]

    named = recipe_for(model, "clip", ("batch", 3, 336, 336))
    assert (named.recipe.resize, named.recipe.crop, named.notes) == (336, 336, ())


def test_yaml_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("\ufeffresize: [40, 30]\ncrop: 28\nmean: 0.1307\nstd: 0.3081\nchannels: gray\n", encoding="utf-8")
    recipe = recipe_for(None, str(path)).recipe
    assert (recipe.resize, recipe.crop, recipe.mean, recipe.channels) == ((40, 30), 28, (0.1307,), "gray")


@pytest.mark.parametrize(
    ("size", "kind", "expected"),
    [
        (224, "ViTFeatureExtractor", (224, 224)),
        (224, "CLIPFeatureExtractor", 224),
        ({"shortest_edge": 256}, "BitImageProcessor", 256),
        ({"shortest_edge": 800, "longest_edge": 1333}, "YolosImageProcessor", 800),
    ],
)
def test_old_and_new_hugging_face_sizes(size: Any, kind: str, expected: Any) -> None:
    config = {"feature_extractor_type": kind, "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert from_hugging_face(config, "")[0].resize == expected


def test_what_a_config_leaves_out_is_said() -> None:
    assert "pads images" in from_hugging_face(VIT | {"do_pad": True}, "c.json")[1][0]
    assert from_hugging_face({"image_processor": VIT}, "")[0] == from_hugging_face(VIT, "")[0]
    assert from_hugging_face(VIT | {"do_flip_channel_order": True}, "")[0].channels == "bgr"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resample": 9}, "resample 9"),
        ({"size": {"longest_edge": 3}}, "size"),
        ({"image_mean": [1, 2]}, "mean needs"),
        ({"rescale_offset": True}, "rescale_offset"),
    ],
)
def test_hugging_face_configs_beyond_a_recipe(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=r"c\.json") as caught:
        from_hugging_face(VIT | change, "c.json")
    assert words in str(caught.value)


def test_timm_configs_beyond_a_recipe() -> None:
    with pytest.raises(ConfigError, match="crop_mode 'border'"):
        from_timm({"pretrained_cfg": TIMM["pretrained_cfg"] | {"crop_mode": "border"}}, "c")
    with pytest.raises(ConfigError, match="input_size"):
        from_timm({"pretrained_cfg": {"mean": [0]}}, "c")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'imagnet': give one of imagenet, .* or the path"):
        recipe_for(None, "imagnet")
    bad = tmp_path / "bad.yaml"
    bad.write_text("resize: [1, 2")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(bad)
    broken = tmp_path / "bad.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_recipe(broken)
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "absent.yaml")
