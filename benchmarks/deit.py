"""DeiT-Tiny with its trained weights as an ONNX file, and the images that benchmarks measure it on."""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

MEAN_STD = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}
#: The evaluation images come scaled to 227 x 227; stretched to 224 x 224 the dense model has 236 of 300 right.
EVALUATION = {"resize": [224, 224]} | MEAN_STD
CALIBRATION = {"resize": 224, "crop": 224} | MEAN_STD


def parser_with_data(description: str | None) -> argparse.ArgumentParser:
    """Options that benchmarks on DeiT-Tiny share: the folder of weights and images, threads, JSON."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = os.environ.get("TOAST_DATA")
    parser.add_argument(
        "--data", type=folder, default=found, required=found is None, help="folder of weights and images (TOAST_DATA)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    return parser


def folder(text: str) -> Path:
    """A folder that exists, as an option's type."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is no folder")
    return path


def import_timm() -> Any:
    """timm, also where torchvision's compiled operators do not load beside this build of PyTorch."""
    import torch

    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        # timm only needs them to exist
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            _LIBRARIES[-1].define(schema)
    import timm

    return timm


def load_deit(weights: Path) -> Any:
    """timm's module with the trained weights."""
    from safetensors.torch import load_file

    model = import_timm().create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(weights), strict=True)
    return model


def export_deit(weights: Path, out: Path, opset: int = 17, *, dynamo: bool = False) -> Path:
    """Export DeiT-Tiny with its trained weights."""
    return export(load_deit(weights), out, opset, dynamo=dynamo)


def export(model: Any, out: Path, opset: int = 17, *, dynamo: bool = False) -> Path:
    """Export a classifier of 224 x 224 images with a dynamic batch; by the TorchScript exporter unless `dynamo`."""
    import torch

    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"], "opset_version": opset}
    example = torch.zeros(2, 3, 224, 224)
    with torch.no_grad():
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            names |= {"dynamic_shapes": shapes, "external_data": False, "verbose": False}
            torch.onnx.export(model, (example,), out, dynamo=True, **names)
        else:
            axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
            # a string: as a Path it would not take models above 2 GB
            torch.onnx.export(model, (example,), str(out), dynamo=False, dynamic_axes=axes, **names)
    return out


_LIBRARIES: list[Any] = []  # a declaration lasts as long as its Library object


def evaluation_images(folder: Path, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3, 224, 224) float32 images and their (n,) labels, from a folder with `labels.csv`."""
    from PIL import Image

    from toast_onnx_calibration.recipes import parse_recipe

    recipe = parse_recipe(EVALUATION, "evaluation")
    with (folder / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))[:limit]
    images = np.stack([recipe.apply(Image.open(folder / row["file"])) for row in rows])
    return images, np.array([int(row["label"]) for row in rows])


def logits(model: Path, images: np.ndarray, threads: int, batch: int = 20) -> np.ndarray:
    """The model's (n, classes) scores."""
    from toast_onnx_calibration.sessions import make_session, run

    session = make_session(model, threads=threads)
    name = session.get_inputs()[0].name
    return np.concatenate(
        [next(iter(run(session, {name: images[i : i + batch]}).values())) for i in range(0, len(images), batch)]
    )


def uniform_ratios(
    attention: dict[str, str], ffn: dict[str, str], compensation: dict[str, str], ratio: float, *, heads: bool
) -> dict[str, Any]:
    """A ratios file of the same ratio everywhere; without `heads` only the feed-forward networks shrink."""
    removed = {"qk": ratio, "vo": ratio} if heads else {}
    return {
        "version": 1,
        "attention": attention | removed,
        "ffn": ffn | {"fc2": ratio},
        "align": 1,
        "compensation": compensation,
    }
