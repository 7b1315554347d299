"""Accuracy of DeiT-Tiny after attention pruning without any data: plain `gm` removal beside the data-free default.

    python benchmarks/data_free.py --data FOLDER

FOLDER (or the variable TOAST_DATA) holds `weights/deit_tiny_patch16_224.safetensors` and `data/ilsvrc_val_300` with its
`labels.csv`. The model is exported with timm; pruning sees the graph alone. The images only measure.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from toast_onnx.matching.study import study
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.surgery.prune import prune
from toast_onnx.surgery.synthetic import SyntheticStatistics
from toast_onnx_calibration.evaluate import evaluate

#: The images come in 227x227 and are stretched to the model's 224x224.
RECIPE = {"resize": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
#: How the paper selects, its compensation-free removal, against this project's default.
GM = {"select": "index", "score": "gm", "coupling": "coupled"}


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TOAST_DATA"), metavar="FOLDER")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.375, 0.5], help="removed of Q, K, V, Proj")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data or set TOAST_DATA")
    with tempfile.TemporaryDirectory() as folder:
        dense = export(options.data / "weights" / "deit_tiny_patch16_224.safetensors", Path(folder) / "deit_tiny.onnx")
        images = options.data / "data" / "ilsvrc_val_300"
        print("| removed | kept of 64 | dense | `gm`, plain | data-free default |")
        print("|---:|---:|---:|---:|---:|")
        before = top1(dense, images)
        for ratio in options.ratios:
            kept, plain = pruned_top1(dense, images, ratio, GM, "none")
            _, ours = pruned_top1(dense, images, ratio, {}, "ridge")
            print(f"| {ratio:g} | {kept} | {before:.2f} | {plain:.2f} | {ours:.2f} |", flush=True)


def export(weights: Path, path: Path) -> Path:
    """DeiT-Tiny with trained weights as a graph with a dynamic batch (TorchScript exporter, opset 17)."""
    import torch
    from safetensors.torch import load_file

    for name in ("nms", "qnms"):  # importing torchvision needs them, and its own do not load beside every PyTorch
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import timm

    module = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()
    module.load_state_dict(load_file(weights))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, 3, 224, 224),),
            path,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
            dynamo=False,
            opset_version=17,
        )
    return path


def pruned_top1(
    dense: Path, images: Path, ratio: float, selection: dict[str, Any], compensation: str
) -> tuple[int, float]:
    """(kept dimensions of each head, top-1 in percent) after pruning Q with K and V with Proj in every block."""
    ratios = parse_ratios(
        {
            "version": 1,
            "attention": {"qk": ratio, "vo": ratio, **selection},
            "align": 1,
            "compensation": {"kind": compensation},
        }
    )
    found = study(load_model(dense))
    result = prune(found, ratios, SyntheticStatistics(found))
    path = dense.with_name("pruned.onnx")
    save_model(result.model, path)
    return result.widths[0].qk or 64, top1(path, images)


def top1(model: Path, images: Path) -> float:
    """Top-1 in percent on the labelled images."""
    recipe = model.with_name("recipe.yaml")
    recipe.write_text(json.dumps(RECIPE))  # JSON is YAML
    found = evaluate(model, images, images / "labels.csv", preprocess=str(recipe))
    assert found.accuracy is not None
    return 100 * found.accuracy.top1 / found.accuracy.samples


if __name__ == "__main__":
    main()
