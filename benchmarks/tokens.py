"""Merging tokens on the exported graph: KL, top-1, MACs and latency on DeiT-Tiny: python benchmarks/tokens.py

Rows: the same number of tokens in every block by each metric, and with --planned the schedules that `plan` finds for
shares of the MACs on 64 of the calibration images, written into the exported graph by this project's library and judged
on labelled images by top-1 and by the mean KL divergence from dense. MACs are of the whole model, matching and merging
included. With --latency each graph's time on ONNX Runtime is measured in turns with the dense one, at batch 8: median
and middle half of the pairs' ratios, and the gain in time over the gain in MACs.

Needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors, data/ilsvrc_val_300 and
data/calibration_256 (with --planned).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml

from benchmarks.deit import CALIBRATION, evaluation_images, export_deit, logits, parser_with_data
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.ratios import Ratios
from toast_onnx.tokens.metrics import METRICS
from toast_onnx.tokens.points import study_tokens
from toast_onnx.tokens.rewrite import write_merging
from toast_onnx.tokens.schedule import removed_counts
from toast_onnx_calibration.agreement import divergences
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.sensitivity_stream import Trials, read_samples
from toast_onnx_calibration.sessions import make_session, run
from toast_onnx_calibration.token_planning import SAMPLES, explore, open_token_trials, schedule_at
from toast_onnx_calibration.work import Work
from toast_onnx_cli.console import print_table

#: ToMe off the shelf, in PyTorch, on the same images: tokens a block -> KL.
TOME = {4: 0.009, 6: 0.017, 8: 0.022, 10: 0.037, 12: 0.047, 14: 0.081, 16: 0.129}


def main() -> None:
    options = arguments()
    data: Path = options.data
    images, labels = evaluation_images(data / "data" / "ilsvrc_val_300", options.images)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="toast-tokens-") as name:
        folder = Path(name)
        path = export_deit(data / "weights" / "deit_tiny_patch16_224.safetensors", folder / "dense.onnx")
        dense = study(load_model(path))
        tokens = study_tokens(dense)
        macs = graph_macs(dense.view, dense.counted)
        scores = logits(path, images, options.threads).astype(np.float64)

        def judge(what: str, metric: str, removed: Mapping[int, int], unread: bool) -> None:
            model, _ = write_merging(dense, tokens, removed, metric, unread)
            merged = folder / "merged.onnx"
            save_model(model, merged)
            look = study(load_model(merged))
            found = logits(merged, images, options.threads).astype(np.float64)
            row: dict[str, Any] = {
                "tokens": what,
                "metric": metric,
                "unread dropped": unread,
                "macs": graph_macs(look.view, look.counted) / macs,
                "kl": float(divergences(scores, found).mean()),
                "top1": float((found.argmax(1) == labels).mean()),
                "tome_kl": TOME.get(int(what)) if what.isdigit() else None,
            }
            if options.latency:
                row["latency"] = latency(path, merged, images[:8])
                row["gain"] = (1 - row["latency"][1]) / (1 - row["macs"])
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)

        for r in options.removed:
            for metric in options.metrics:
                every = removed_counts(tokens, Decimal(r) / tokens.sequences[0].count)  # at most half at the end
                judge(str(r), metric, every, metric != "keys")  # ToMe computes on tokens that nothing reads
        for share in options.planned:
            judge(f"planned {share:g}", "auto", planned(dense, share, data / "data" / "calibration_256", folder), True)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    columns = ("tokens", "metric", "unread dropped", "MACs", "KL", "top-1", "ToMe's KL", "latency", "gain / MACs' gain")
    print_table(columns, [_cells(row) for row in rows], title="DeiT-Tiny, merged on the graph")


def planned(dense: Study, share: float, images: Path, folder: Path) -> dict[int, int]:
    """The schedule that `plan --parts tokens` finds for a share of the MACs."""
    recipe = folder / "calibration.yaml"
    recipe.write_text(yaml.safe_dump(CALIBRATION))
    options = CalibrationOptions(preprocess=str(recipe), samples=SAMPLES, batch=16, threads=1)
    samples = read_samples(dense, str(images), options, folder)
    every = Trials(dense, samples, options, folder)
    work = Work(every, every, None, Ratios())
    trials = open_token_trials(dense, Ratios(), work.trials, work.merged)
    assert trials is not None
    found = schedule_at(trials, explore(trials, share), share)
    assert found is not None
    print(share, found.removed, file=sys.stderr)
    return found.removed


def _cells(row: Mapping[str, Any]) -> list[str]:
    tome = "-" if row["tome_kl"] is None else f"{row['tome_kl']:.3f}"
    timed, gain = "-", "-"
    if "latency" in row:
        low, middle, high = row["latency"]
        timed, gain = f"{middle:.3f} ({low:.3f} to {high:.3f})", f"{row['gain']:.3f}"
    dropped = "yes" if row["unread dropped"] else "no"
    kl, top1 = f"{row['kl']:.4f}", f"{100 * row['top1']:.1f} %"
    return [row["tokens"], row["metric"], dropped, f"{row['macs']:.3f}", kl, top1, tome, timed, gain]


def latency(dense: Path, merged: Path, batch: np.ndarray, turns: int = 40) -> tuple[float, float, float]:
    """Time of the merged graph over the dense one's, on one thread, in turns: the ratios' quartiles."""
    sessions = [make_session(p, threads=1) for p in (dense, merged)]
    feeds = {sessions[0].get_inputs()[0].name: batch}
    ratios: list[float] = []
    for _ in range(turns + 2):
        seconds = []
        for session in sessions:
            start = time.perf_counter()
            run(session, feeds)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    low, middle, high = np.percentile(ratios[2:], [25, 50, 75])
    return float(low), float(middle), float(high)


def arguments() -> argparse.Namespace:
    parser = parser_with_data(__doc__)
    parser.add_argument("--images", type=int, help="evaluate on the first N images only")
    parser.add_argument("--removed", type=int, nargs="*", default=list(TOME), help="tokens merged in every block")
    parser.add_argument(
        "--metrics", nargs="*", default=["keys", "keys-by-head", "attended-keys"], choices=list(METRICS)
    )
    parser.add_argument("--planned", nargs="*", type=float, default=[0.7, 0.6, 0.5, 0.4], help="shares of the MACs")
    parser.add_argument("--latency", action="store_true", help="time each graph beside the dense one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
