"""Compresses the example model with the installed `toast-onnx` command and prints it beside the dense one.

    python examples/run.py

Dense and pruned are run on the same 1000 test images, and timed in turns, with ONNX Runtime on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent
DENSE = HERE / "digits_vit.onnx"
RATIOS = HERE / "ratios.yaml"
TEST_IMAGES = HERE / "digits_test.npz"


def toast_onnx(*arguments: str | Path) -> str:
    """Runs the `toast-onnx` of this Python's environment and returns what it printed; ends the script if it fails."""
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("toast-onnx", path=beside_python)
    if program is None:
        sys.exit("toast-onnx is not installed for this Python: run `pip install -e .` in the repository first")
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout


def open_session(model: Path) -> ort.InferenceSession:
    """The model in ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a machine without a GPU is nothing to warn about here
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def load_test_images() -> tuple[np.ndarray, np.ndarray]:
    """Pixels float32 (1000, 1, 28, 28) in [0, 1] and labels (1000,)."""
    with np.load(TEST_IMAGES) as file:
        return file["images"][:, None].astype(np.float32) / 255, file["labels"]


def accuracy(session: ort.InferenceSession, pixels: np.ndarray, labels: np.ndarray, batch: int) -> float:
    """The fraction of images whose most likely class is the label."""
    parts = (pixels[start : start + batch] for start in range(0, len(pixels), batch))
    guesses = np.concatenate([session.run(None, {"pixels": part})[0].argmax(axis=1) for part in parts])
    return float((guesses == labels).mean())


def latencies(sessions: list[ort.InferenceSession], pixels: np.ndarray, rounds: int) -> list[float]:
    """Median milliseconds of one batch for each session; they take turns, so that a busy machine slows both alike."""
    times: list[list[float]] = [[] for _ in sessions]
    for round_number in range(rounds + 3):
        for session, own in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(None, {"pixels": pixels})
            if round_number >= 3:  # the first rounds allocate
                own.append(1000 * (time.perf_counter() - started))
    return [statistics.median(own) for own in times]


def print_comparison(rows: list[tuple[str, list[float], str]]) -> None:
    """Prints each row's name, its [dense, pruned] numbers in its own format, and what is left of the dense one."""
    print(f"\n{'':24}{'dense':>10}{'pruned':>10}{'pruned/dense':>15}")
    for name, (dense, pruned), spec in rows:
        print(f"{name:24}{format(dense, spec):>10}{format(pruned, spec):>10}{pruned / dense:>15.2f}")


def main() -> None:
    """Compresses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "output", help="folder for the pruned model and its report")
    parser.add_argument("--batch", type=int, default=50, help="images per batch")
    parser.add_argument("--rounds", type=int, default=100, help="timed batches of each model")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    pruned = options.out / "digits_vit.pruned.onnx"
    print(toast_onnx("prune", DENSE, "--ratios", RATIOS, "-o", pruned, "--overwrite"), end="")

    models = [DENSE, pruned]
    counts = [json.loads(toast_onnx("inspect", model, "--json")) for model in models]
    sessions = [open_session(model) for model in models]
    pixels, labels = load_test_images()
    scores = [100 * accuracy(session, pixels, labels, options.batch) for session in sessions]
    medians = latencies(sessions, pixels[: options.batch], options.rounds)

    print_comparison(
        [
            (f"accuracy, {len(labels)} images, %", scores, ".1f"),
            ("MACs an image, M", [count["macs"] / 1e6 for count in counts], ".2f"),
            ("parameters, k", [count["params"] / 1e3 for count in counts], ".0f"),
            ("file, kB", [model.stat().st_size / 1e3 for model in models], ".0f"),
            (f"batch of {options.batch}, ms", medians, ".2f"),
        ]
    )
    print(f"\nThe pruned model and its report are in {options.out}")


if __name__ == "__main__":
    main()
