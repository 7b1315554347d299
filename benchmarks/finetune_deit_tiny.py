"""What distillation on 256 unlabelled images adds to DeiT-Tiny pruned to half: KL to the dense model on other images.

    python benchmarks/finetune_deit_tiny.py --model deit_tiny.onnx --train calibration_256 --test ilsvrc_val_300 \
        --out build/deit

The model is pruned with compensation from the same 256 images, fine-tuned by the command on them alone, and both are
compared with the dense model on images that neither step saw: mean KL(dense || model) in nats and top-1 where the test
folder has a `labels.csv`. Without training is the line to beat; images seen in training say nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import yaml
from scipy.special import log_softmax

from toast_onnx_calibration.images import decode, find_images
from toast_onnx_calibration.recipes import NAMED

HALF = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc2": 0.5}}
#: Everything else is what the command does by itself where there are no labels.
TRAINING = ("--batch", "16", "--evaluate-every", "20", "--patience", "0")


def toast_onnx(*arguments: str | Path) -> str:
    """Runs the command of this Python's environment; ends the script if it fails."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("toast-onnx", path=beside) or sys.exit("install toast-onnx for this Python first")
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout if done.returncode == 0 else sys.exit(done.returncode)


def log_probabilities(model: Path, images: np.ndarray) -> np.ndarray:
    """Log-softmax of the model's first output, (N, K) float64."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: images[i : i + 16]})[0] for i in range(0, len(images), 16)]
    return log_softmax(np.concatenate(logits).astype(np.float64), axis=1)


def read_labels(folder: Path, names: list[str]) -> np.ndarray | None:
    """Class numbers from `labels.csv` (columns file and label), None where there is none."""
    if not (folder / "labels.csv").is_file():
        return None
    with (folder / "labels.csv").open(newline="") as file:
        found = {row["file"]: int(row["label"]) for row in csv.DictReader(file)}
    return np.array([found[name] for name in names])


def main() -> None:
    """Prunes, fine-tunes, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="DeiT-Tiny as ONNX, 224x224, ImageNet mean and std")
    parser.add_argument("--train", type=Path, required=True, help="folder of images to calibrate and train on")
    parser.add_argument("--test", type=Path, required=True, help="folder of other images")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and reports")
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", default="off", help="as for the command; bf16 is faster on CPUs that have it")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    pruned, tuned = out / "half.onnx", out / "half.finetuned.onnx"
    (out / "half.yaml").write_text(yaml.safe_dump(HALF))
    data = ["--data", options.train, "--preprocess", "imagenet"]
    if not pruned.exists():
        toast_onnx("prune", options.model, "--ratios", out / "half.yaml", *data, "-o", pruned)
    began = time.monotonic()
    toast_onnx(
        "finetune", pruned, "--teacher", options.model, *data, "--steps", str(options.steps), *TRAINING,
        "--amp", options.amp, "--seed", str(options.seed), "-o", tuned,
    )  # fmt: skip
    minutes = (time.monotonic() - began) / 60

    names = find_images(options.test)
    images = np.stack([NAMED["imagenet"].apply(decode(options.test / name)) for name in names])
    labels = read_labels(options.test, names)
    dense = log_probabilities(options.model, images)
    print("| DeiT-T | KL to dense | top-1 |\n|---|---|---|")
    first = None
    for name, model in (("dense", options.model), ("pruned to half", pruned), ("fine-tuned", tuned)):
        found = log_probabilities(model, images)
        kl = float((np.exp(dense) * (dense - found)).sum(1).mean())
        first = kl if name == "pruned to half" else first
        top1 = "" if labels is None else f"{(found.argmax(1) == labels).mean():.1%}"
        print(f"| {name} | {kl:.4f} | {top1} |")
    report = json.loads(tuned.with_suffix(".json").read_text())["finetune"]
    print(
        f"\nKL changed by {kl / (first or 1) - 1:+.1%}; {options.steps} steps, kept step {report['best_step']}, "
        f"{report['images_per_second']} images/s, {minutes:.1f} minutes"
    )


if __name__ == "__main__":
    main()
