"""Two choices in reducing feed-forward networks, on DeiT-Tiny: python benchmarks/ffn_reduction.py

*Batches.* Hidden units go by second-order elimination; `removed at a time` says how many between two updates of the
inverse. The table holds batches against exact elimination, one unit at a time: the error of a block's output once fc2
is fitted again, relative to the output's energy, and processor seconds a block.

*Merging.* In place of dropping a unit, its fc1 column can be joined to that of the kept unit it correlates with most,
where the correlation lies above a threshold, each weighted by its part in the output; fc2 is fitted again in either
case. All blocks' feed-forward networks are reduced, attention stays dense; top-1 and the mean KL divergence from the
dense model.

Statistics come from the dense model on unlabelled images, one thread. Needs timm, safetensors and, in TOAST_DATA or
--data, weights/deit_tiny_patch16_224.safetensors, data/ilsvrc_val_300 and data/calibration_256.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import CALIBRATION, evaluation_images, export, load_deit, logits, parser_with_data
from toast_onnx.importance.ffn import select_ffn_second_order
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.second_order import default_batch
from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.solving.ffn import solve_ffn
from toast_onnx_calibration.agreement import divergences
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_cli.console import print_table


@dataclass(frozen=True)
class Mlp:
    """The two layers of a feed-forward network, y = act(x w1 + b1) w2 + b2.

    Attributes:
        w1: (C, F).
        b1: (F,).
        w2: (F, C).
        b2: (C,).
    """

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray


def main() -> None:
    options = arguments()
    weights = options.data / "weights" / "deit_tiny_patch16_224.safetensors"
    dense = load_deit(weights)
    layers = [mlp_of(block.mlp) for block in dense.blocks]
    with tempfile.TemporaryDirectory(prefix="toast-ffn-") as name:
        folder = Path(name)
        path = export(dense, folder / "dense.onnx")
        moments = hidden_moments(path, options, folder)
        kept_count = len(layers[0].b1) - round(options.ratio * len(layers[0].b1))
        document = {
            "kept": kept_count,
            "batches": batch_rows(layers, moments, kept_count, options),
            "merging": merging_rows(dense, path, layers, moments, kept_count, folder, options),
        }
    if options.json:
        print(json.dumps(document, indent=1))
        return
    blocks = [f"block {block}" for block in options.blocks]
    print_table(
        ("removed at a time", *blocks, "seconds"),
        [
            [str(row["batch"]), *(f"{e:.5f}" for e in row["errors"]), f"{row['seconds']:.2f}"]
            for row in document["batches"]
        ],
        title=f"relative error, {kept_count} of {len(layers[0].b1)} units kept, {options.samples} images",
    )
    print_table(
        ("method", "merged units", "top-1", "KL"),
        [[r["method"], str(r["merged"]), f"{r['top1']:.1%}", f"{r['kl']:.3f}"] for r in document["merging"]],
        title=f"DeiT-Tiny, {kept_count} units kept in every block",
    )


def arguments() -> argparse.Namespace:
    parser = parser_with_data(__doc__)
    parser.add_argument("--ratio", type=float, default=0.35, help="fraction of the hidden units removed")
    parser.add_argument("--samples", type=int, default=128, help="calibration images")
    parser.add_argument("--images", type=int, help="evaluation images; all by default")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 6, 10], help="blocks of the batches")
    parser.add_argument("--batches", type=int, nargs="+", help="units at a time; 1, 4, the default, 64 and all")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.3, 0.6], help="correlations merged above")
    return parser.parse_args()


def hidden_moments(model: Path, options: argparse.Namespace, folder: Path) -> list[Moments]:
    """Moments of the hidden activations of every block, on the calibration images."""
    recipe, out = folder / "calibration.yaml", folder / f"{model.stem}.npz"
    recipe.write_text(yaml.safe_dump(CALIBRATION))
    settings = CalibrationOptions(preprocess=str(recipe), samples=options.samples, threads=options.threads)
    look = study(load_model(model))
    calibrate(look, options.data / "data" / "calibration_256", out, everything(look, {"hidden"}), settings)
    measured = CalibratedStatistics(look, out)
    return [measured.hidden(block.index) for block in look.match.blocks]


def batch_rows(
    layers: Sequence[Mlp], moments: Sequence[Moments], kept: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each number of units removed between two updates."""
    units = len(layers[0].b1)
    rows = []
    for batch in options.batches or (1, 4, default_batch(units), 64, units - kept):
        errors, seconds = [], 0.0
        for block in options.blocks:
            started = time.process_time()
            chosen = select_ffn_second_order(moments[block], layers[block].w2, kept, batch)
            seconds += time.process_time() - started
            errors.append(output_error(layers[block], moments[block], chosen))
        rows.append({"batch": batch, "errors": errors, "seconds": seconds / len(options.blocks)})
        print(f"{batch} at a time: {', '.join(f'{e:.5f}' for e in errors)}", file=sys.stderr, flush=True)
    return rows


def output_error(mlp: Mlp, moments: Moments, kept: np.ndarray) -> float:
    """Expected squared error of the output once fc2 is fitted to the kept units, relative to the output's variance."""
    w2 = mlp.w2.astype(np.float64)
    lost = w2.copy()
    lost[kept] -= solve_ffn(kept, w2, mlp.b2, moments).w2
    s = moments.covariance
    return float(np.sum(lost * (s @ lost)) / np.sum(w2 * (s @ w2)))


def merging_rows(
    dense: Any,
    path: Path,
    layers: Sequence[Mlp],
    moments: Sequence[Moments],
    kept: int,
    folder: Path,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Dropping, then merging above each threshold, judged on labelled images."""
    images, labels = evaluation_images(options.data / "data" / "ilsvrc_val_300", options.images)
    wanted = logits(path, images, options.threads).astype(np.float64)

    def judge(method: str, merged: int, model: Path) -> dict[str, Any]:
        found = logits(model, images, options.threads).astype(np.float64)
        top1 = float((found.argmax(axis=1) == labels).mean())
        row = {"method": method, "merged": merged, "top1": top1, "kl": float(divergences(wanted, found).mean())}
        print(f"{method}: {top1:.1%}, KL {row['kl']:.4f}", file=sys.stderr, flush=True)
        return row

    chosen = [select_ffn_second_order(m, mlp.w2, kept) for mlp, m in zip(layers, moments, strict=True)]
    dropped = [refitted(mlp, k, m) for mlp, k, m in zip(layers, chosen, moments, strict=True)]
    rows = [judge("dense", 0, path), judge("dropped", 0, export(with_mlps(dense, dropped), folder / "dropped.onnx"))]
    for threshold in options.thresholds:
        joined = [merged_fc1(mlp, k, m, threshold) for mlp, k, m in zip(layers, chosen, moments, strict=True)]
        # Merged units beside the old ones, without a say in the output: the same function, so that the regression of
        # the old output on the merged units sees the dense model's inputs.
        beside = [
            Mlp(
                np.concatenate([mlp.w1, w1], axis=1),
                np.concatenate([mlp.b1, b1]),
                np.concatenate([mlp.w2, np.zeros((kept, mlp.w2.shape[1]), mlp.w2.dtype)]),
                mlp.b2,
            )
            for mlp, (w1, b1, _) in zip(layers, joined, strict=True)
        ]
        both = hidden_moments(export(with_mlps(dense, beside), folder / "beside.onnx"), options, folder)
        last = np.arange(len(layers[0].b1), len(layers[0].b1) + kept)
        merged = [refitted(mlp, last, m) for mlp, m in zip(beside, both, strict=True)]
        model = export(with_mlps(dense, merged), folder / "merged.onnx")
        rows.append(judge(f"merged above {threshold:g}", sum(count for *_, count in joined), model))
    return rows


def refitted(mlp: Mlp, kept: np.ndarray, moments: Moments) -> Mlp:
    """The kept units alone, with the fc2 that comes closest to the output of all."""
    new = solve_ffn(kept, mlp.w2, mlp.b2, moments)
    return Mlp(mlp.w1[:, kept], mlp.b1[kept], new.w2, new.b2)


def merged_fc1(mlp: Mlp, kept: np.ndarray, moments: Moments, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """fc1 of the kept units (C, K), (K,) with alike dropped units joined to them, and how many were.

    A unit's part in the output is its standard deviation times the length of its row of W2.
    """
    covariance = moments.covariance
    spread = np.sqrt(np.diagonal(covariance) + 1e-12)
    part = spread * np.linalg.norm(mlp.w2, axis=1)
    gone = np.setdiff1d(np.arange(len(spread)), kept)
    alike = (covariance / np.outer(spread, spread))[np.ix_(gone, kept)]
    nearest, close = alike.argmax(axis=1), alike.max(axis=1) > threshold
    w1, b1 = mlp.w1[:, kept].copy(), mlp.b1[kept].copy()
    for place in np.unique(nearest[close]):
        group = np.concatenate([kept[[place]], gone[close & (nearest == place)]])
        share = part[group] / part[group].sum()
        w1[:, place], b1[place] = mlp.w1[:, group] @ share, mlp.b1[group] @ share
    return w1, b1, int(close.sum())


def mlp_of(module: Any) -> Mlp:
    """The weights of timm's module, columns as outputs."""
    w1, w2 = (layer.weight.detach().numpy().T for layer in (module.fc1, module.fc2))
    return Mlp(w1, module.fc1.bias.detach().numpy(), w2, module.fc2.bias.detach().numpy())


def with_mlps(dense: Any, layers: Sequence[Mlp]) -> Any:
    """The model with other feed-forward networks, of any width."""
    import torch

    model = copy.deepcopy(dense)
    for block, mlp in zip(model.blocks, layers, strict=True):
        for layer, w, b in ((block.mlp.fc1, mlp.w1, mlp.b1), (block.mlp.fc2, mlp.w2, mlp.b2)):
            layer.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(w.T, np.float32)))
            layer.bias = torch.nn.Parameter(torch.from_numpy(np.asarray(b, np.float32)))
            layer.in_features, layer.out_features = w.shape
    return model


if __name__ == "__main__":
    main()
