"""What distillation on 256 unlabelled images adds to DeiT-Tiny pruned to half: KL to the dense model on other images.

    python benchmarks/finetune_deit_tiny.py --out build/deit

The model is pruned with compensation from 256 images, fine-tuned by the command on them alone, and both are compared
with the dense model on images that neither step saw: mean KL(dense || model) in nats and top-1. Without training is the
line to beat; images seen in training say nothing.

Needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors, data/ilsvrc_val_300 and
data/calibration_256.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import export_deit, logits, parser_with_data
from benchmarks.installed import toast_onnx
from toast_onnx_calibration.agreement import divergences
from toast_onnx_calibration.images import decode, find_images
from toast_onnx_calibration.recipes import NAMED

HALF = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc2": 0.5}}
#: Everything else is what the command does by itself where there are no labels.
TRAINING = ("--batch", "16", "--evaluate-every", "20", "--patience", "0")


def main() -> None:
    """Prunes, fine-tunes, prints the table."""
    parser = parser_with_data(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and reports")
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", default="off", help="as for the command; bf16 is faster on CPUs that have it")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    dense, pruned, tuned = out / "deit_tiny.onnx", out / "half.onnx", out / "half.finetuned.onnx"
    (out / "half.yaml").write_text(yaml.safe_dump(HALF))
    if not dense.exists():
        export_deit(options.data / "weights" / "deit_tiny_patch16_224.safetensors", dense)
    train, test = options.data / "data" / "calibration_256", options.data / "data" / "ilsvrc_val_300"
    reading = ["--data", train, "--preprocess", "imagenet", "--threads", str(options.threads)]
    if not pruned.exists():
        toast_onnx("prune", dense, "--ratios", out / "half.yaml", *reading, "-o", pruned)
    began = time.monotonic()
    toast_onnx(
        "finetune", pruned, "--teacher", dense, *reading, "--steps", str(options.steps), *TRAINING,
        "--amp", options.amp, "--seed", str(options.seed), "-o", tuned,
    )  # fmt: skip
    minutes = (time.monotonic() - began) / 60

    names = find_images(test)
    images = np.stack([NAMED["imagenet"].apply(decode(test / name)) for name in names])
    labels = read_labels(test, names)
    wanted = logits(dense, images, options.threads).astype(np.float64)
    rows: list[dict[str, Any]] = []
    for name, model in (("dense", dense), ("pruned to half", pruned), ("fine-tuned", tuned)):
        found = logits(model, images, options.threads).astype(np.float64)
        top1 = float((found.argmax(axis=1) == labels).mean())
        rows.append({"model": name, "kl": float(divergences(wanted, found).mean()), "top1": top1})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("| DeiT-T | KL to dense | top-1 |\n|---|---|---|")
    for row in rows:
        print(f"| {row['model']} | {row['kl']:.4f} | {row['top1']:.1%} |")
    report = json.loads(tuned.with_suffix(".json").read_text())["finetune"]
    print(
        f"\nKL changed by {rows[2]['kl'] / rows[1]['kl'] - 1:+.1%}; {options.steps} steps, kept step "
        f"{report['best_step']}, {report['images_per_second']} images/s, {minutes:.1f} minutes"
    )


def read_labels(folder: Path, names: list[str]) -> np.ndarray:
    """Class numbers from `labels.csv`, columns file and label."""
    with (folder / "labels.csv").open(newline="") as file:
        found = {row["file"]: int(row["label"]) for row in csv.DictReader(file)}
    return np.array([found[name] for name in names])


if __name__ == "__main__":
    main()
