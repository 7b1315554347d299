"""Accuracy of DeiT-Tiny after attention pruning without any data: python benchmarks/data_free.py

Plain removal by the paper's score (`gm`) beside the data-free default. The model is exported with timm; pruning sees
the graph alone. The images only measure.

Needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors and data/ilsvrc_val_300.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import evaluation_images, export_deit, logits, parser_with_data
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune

#: How the paper selects, its compensation-free removal, against this project's default.
GM = {"select": "index", "score": "gm", "coupling": "coupled"}


def main() -> None:
    """Print one Markdown table."""
    parser = parser_with_data(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.375, 0.5], help="removed of Q, K, V, Proj")
    options = parser.parse_args()
    images, labels = evaluation_images(options.data / "data" / "ilsvrc_val_300")

    def top1(model: Path) -> float:
        found = logits(model, images, options.threads)
        return float((found.argmax(axis=1) == labels).mean())

    rows = []
    with tempfile.TemporaryDirectory(prefix="toast-data-free-") as name:
        folder = Path(name)
        dense = export_deit(options.data / "weights" / "deit_tiny_patch16_224.safetensors", folder / "dense.onnx")
        look, before = study(load_model(dense)), top1(dense)
        for ratio in options.ratios:
            kept, plain = pruned(look, ratio, GM, "none", folder)
            row: dict[str, Any] = {"ratio": ratio, "kept": kept, "dense": before, "gm": top1(plain)}
            rows.append(row | {"default": top1(pruned(look, ratio, {}, "ridge", folder)[1])})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("| removed | kept of 64 | dense | `gm`, plain | data-free default |\n|---:|---:|---:|---:|---:|")
    for row in rows:
        figures = " | ".join(f"{100 * row[method]:.2f}" for method in ("dense", "gm", "default"))
        print(f"| {row['ratio']:g} | {row['kept']} | {figures} |")


def pruned(look: Study, ratio: float, selection: dict[str, Any], compensation: str, folder: Path) -> tuple[int, Path]:
    """Kept dimensions of each head, and the model, after pruning Q with K and V with Proj in every block."""
    ratios = parse_ratios(
        {
            "version": 1,
            "attention": {"qk": ratio, "vo": ratio, **selection},
            "align": 1,
            "compensation": {"kind": compensation},
        }
    )
    result = prune(look, ratios, SyntheticStatistics(look))
    path = folder / "pruned.onnx"
    save_model(result.model, path)
    return result.widths[0].qk or 64, path


if __name__ == "__main__":
    main()
