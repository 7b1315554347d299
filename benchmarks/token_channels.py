"""Channels chosen once, or for every batch (ToaSt's token channel selection): python benchmarks/token_channels.py

The feed-forward networks of DeiT-Tiny, but for block 0, lose the same share of their channels in several ways;
attention stays dense, nothing is trained. Static rows choose on 256 unlabelled images and really shrink both layers;
run-time rows choose on the batch they are given, so that the batch size is part of the method. All are judged on the
same labelled images. `ms` is the median for one image of a batch of `--latency-batch`, one thread, models in turns.

Needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors, data/ilsvrc_val_300 and
data/calibration_256.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import CALIBRATION, evaluation_images, export_deit, logits, parser_with_data
from toast_onnx.engines.ortbench import benchmark
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx_calibration.agreement import divergences
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_cli.console import print_table

#: name -> (FFN settings, compensation)
STATIC = {
    "static, activation": ({"score": "activation"}, "none"),
    "static, activation, ridge": ({"score": "activation"}, "ridge"),
    "static, default": ({"score": "second-order"}, "ridge"),
}
RUNTIME = {"run time, masked": {"residual": "masked"}, "run time, kept": {"residual": "kept"}}
#: Fractions removed of fc1's inputs and of fc2's.
CASES = ((0.0, 0.25), (0.0, 0.5), (0.25, 0.25))
COLUMNS = ("method", "fc1", "fc2", "batch", "top-1", "KL", "GMACs", "ms")


def main() -> None:
    options = arguments()
    images, labels = evaluation_images(options.data / "data" / "ilsvrc_val_300", options.images)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="toast-channels-") as name:
        folder = Path(name)
        dense = export_deit(options.data / "weights" / "deit_tiny_patch16_224.safetensors", folder / "dense.onnx")
        look = study(load_model(dense))
        wanted = logits(dense, images, options.threads).astype(np.float64)
        models = {("dense", 0.0, 0.0): dense} | pruned_models(look, options, folder)
        speeds = latencies(list(models.values()), options)
        for (method, fc1, fc2), path in models.items():
            after = study(load_model(path))
            for batch in options.batches if method.startswith("run time") else (options.batches[0],):
                found = logits(path, images, options.threads, batch)
                row = {
                    "method": method,
                    "fc1": fc1,
                    "fc2": fc2,
                    "batch": batch,
                    "top1": float((found.argmax(axis=1) == labels).mean()),
                    "kl": float(divergences(wanted, found.astype(np.float64)).mean()),
                    "macs": graph_macs(after.view, after.counted),
                    "ms": speeds.get(path),
                }
                rows.append(row)
                print(f"{method} {fc1}/{fc2}, batch {batch}: {row['top1']:.1%}", file=sys.stderr, flush=True)
    if options.results is not None:
        known = json.loads(options.results.read_text()) if options.results.exists() else []
        rows = known + [row for row in rows if row["method"] != "dense" or not known]
        options.results.write_text(json.dumps(rows, indent=1))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print_table(COLUMNS, [cells(row) for row in rows], title=f"DeiT-Tiny, {len(labels)} images")


def arguments() -> argparse.Namespace:
    parser = parser_with_data(__doc__)
    parser.add_argument(
        "--cases", type=float, nargs="+", help="fc1 and fc2 ratios in turn, in place of the three cases"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 20, 100], help="batch sizes of run-time rows")
    parser.add_argument("--samples", type=int, default=256, help="calibration images of static rows")
    parser.add_argument("--images", type=int, help="evaluation images; all by default")
    parser.add_argument("--latency-batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds; 0 times nothing")
    parser.add_argument("--results", type=Path, help="add the rows to this JSON file, and print all it holds")
    options = parser.parse_args()
    pairs = iter(options.cases or ())
    options.cases = tuple(zip(pairs, pairs, strict=True)) or CASES
    return options


def pruned_models(look: Study, options: argparse.Namespace, folder: Path) -> dict[tuple[str, float, float], Path]:
    """(method, fc1, fc2) -> file; masked and kept are one where fc1 is whole."""
    recipe, out = folder / "calibration.yaml", folder / "statistics.npz"
    recipe.write_text(yaml.safe_dump(CALIBRATION))
    settings = CalibrationOptions(preprocess=str(recipe), samples=options.samples, threads=options.threads)
    parts = {"hidden", "fc2"} | ({"inputs", "fc1"} if any(fc1 for fc1, _ in options.cases) else set())
    calibrate(look, options.data / "data" / "calibration_256", out, everything(look, parts), settings)
    measured = CalibratedStatistics(look, out)
    found: dict[tuple[str, float, float], Path] = {}
    for fc1, fc2 in options.cases:
        runtime = RUNTIME if fc1 else {"run time": {}}
        methods = STATIC | {name: ({"mode": "runtime"} | extra, "none") for name, extra in runtime.items()}
        for name, (ffn, kind) in methods.items():
            document = {
                "version": 1,
                "ffn": ffn | {"fc1": fc1, "fc2": fc2},
                "blocks": {0: {"ffn": {"fc1": 0, "fc2": 0}}},
                "align": 1,
                "compensation": {"kind": kind},
            }
            path = folder / f"{len(found)}.onnx"
            save_model(prune(look, parse_ratios(document), measured).model, path)
            found[name, fc1, fc2] = path
    return found


def latencies(models: list[Path], options: argparse.Namespace) -> dict[Path, float]:
    """Median milliseconds of one image."""
    if not options.rounds:
        return {}
    batch = options.latency_batch
    timings = benchmark(models, [batch], threads=options.threads, warmup=2, rounds=options.rounds)
    return {path: 1000 * float(np.median(t.seconds)) / batch for path, t in zip(models, timings, strict=True)}


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["method"],
        f"{row['fc1']:g}",
        f"{row['fc2']:g}",
        str(row["batch"]) if row["method"].startswith("run time") else "any",
        f"{row['top1']:.1%}",
        f"{row['kl']:.3f}",
        f"{row['macs'] / 1e9:.3f}",
        "-" if row["ms"] is None else f"{row['ms']:.1f}",
    ]


if __name__ == "__main__":
    main()
