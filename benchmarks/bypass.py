"""A linear path around each feed-forward network, paid for with hidden units: python benchmarks/bypass.py

Dropped hidden units can be predicted from the kept ones alone, which costs nothing (`prune` does it), or from these and
from what the network reads, through one more matrix product of some rank beside it. A rank costs as much as a hidden
unit, a whole C x C matrix as much as C / 2. Units are chosen by second-order elimination on what the path leaves of
them, then fc2 and the path are fitted together by ridge, and at a lower rank the path is the best one of that rank
behind the kept units. Attention stays dense, statistics are those of the dense model; the errors are those of each
block's network on the calibration images, relative to the variance of its output.

Needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors, data/ilsvrc_val_300 and
data/calibration_256.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import Tensor
from torch.nn.functional import gelu

from benchmarks.deit import evaluation_images, load_deit, parser_with_data
from benchmarks.refit_trials import (
    CHANNELS,
    Layers,
    calibration_images,
    chunks,
    classify,
    embed,
    kl,
    run_blocks,
    single,
)
from toast_onnx.importance.moments import Moments, merge
from toast_onnx.importance.second_order import default_batch, keep_second_order
from toast_onnx_cli.console import print_table

CLASS_WEIGHT = 20.0


@dataclass(frozen=True)
class Network:
    """What is left of a feed-forward network.

    Attributes:
        units: (K,) that stay.
        w2: (K, C).
        path: (C, C) from what the network reads to what it gives.
        bias: (C,).
        error: of the output, relative to its variance.
    """

    units: np.ndarray
    w2: Tensor
    path: Tensor
    bias: Tensor
    error: float


def main() -> None:
    parser = parser_with_data(__doc__)
    parser.add_argument("--ratio", type=float, default=0.35, help="share of the hidden units that is to be saved")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 16, 32, 64, CHANNELS])
    parser.add_argument("--ridge", type=float, default=1e-6, help="of the mean eigenvalue")
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--images", type=int, help="evaluation images; all by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    images, labels = evaluation_images(options.data / "data" / "ilsvrc_val_300", options.images)
    module = load_deit(options.data / "weights" / "deit_tiny_patch16_224.safetensors")
    layers = [Layers.of_module(block) for block in module.blocks]
    seen, _ = calibration_images(options.data / "data" / "calibration_256", options.samples)
    moments = measured(module, layers, seen)
    judged = torch.from_numpy(images)
    dense = run_blocks(module, layers, judged)
    hidden = layers[0].layers["fc2"][0].shape[0]
    rows = []
    for rank in options.ranks:
        units = hidden - round(options.ratio * hidden) - min(rank, CHANNELS // 2)
        left = [reduced(each, m, units, rank, options.ridge) for each, m in zip(layers, moments, strict=True)]
        found = run(module, layers, left, judged)
        top1 = float((classify(module, found).argmax(1).numpy() == labels).mean())
        errors = [each.error for each in left]
        rows.append({"rank": rank, "units": units, "kl": kl(module, dense, found), "top1": top1, "errors": errors})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    cells = [
        [str(r["rank"]), str(r["units"]), f"{r['top1']:.1%}", f"{r['kl']:.3f}"]
        + [f"{r['errors'][b]:.3f}" for b in (0, len(layers) // 2, len(layers) - 1)]
        for r in rows
    ]
    heading = ("rank of the path", "units kept", "top-1", "KL", "error, first block", "middle", "last")
    print_table(heading, cells, title=f"DeiT-Tiny, feed-forward networks alone, {len(labels)} images")


def measured(module: Any, layers: Sequence[Layers], images: Tensor) -> list[Moments]:
    """Moments of every network's hidden units and of what it reads, side by side."""
    found, x = [], embed(module, images)
    for each in layers:
        middle = chunks(lambda t, e=each: t + e("proj", e.contexts(e.norm(0, t))), x)
        parts, behind = [], []
        for t in middle.split(16):
            read = each.norm(1, t)
            hidden = gelu(each("fc1", read))
            weights = torch.ones(t.shape[:2])
            weights[:, 0] = CLASS_WEIGHT
            rows = torch.cat([hidden, read], -1).flatten(0, 1).numpy()
            parts.append(Moments.of(rows, weights.flatten().numpy()))
            behind.append(t + each("fc2", hidden))
        found.append(merge(parts))
        x = torch.cat(behind)
    return found


def reduced(layers: Layers, moments: Moments, kept: int, rank: int, ridge: float) -> Network:
    """The network with `kept` units and a path of some rank, 0 for none."""
    w2, b2 = (t.double().numpy() for t in layers.layers["fc2"])
    s, hidden = moments.covariance, len(w2)
    target = np.concatenate([w2, np.zeros((CHANNELS, w2.shape[1]))])  # of units and inputs side by side
    inputs = np.eye(len(s))[:, hidden:]
    alone = inputs @ directions(s[hidden:, hidden:], inputs.T @ s @ target, rank)  # the best path with no units
    rest = s[:hidden, :hidden] - _predicted(s, alone)[:hidden, :hidden]
    jitter = 1e-6 * np.trace(rest) / hidden * np.eye(hidden)
    units = np.sort(keep_second_order(rest + jitter, w2, kept, default_batch(hidden)))
    chosen = np.eye(len(s))[:, units]
    # Of what the kept units leave of the inputs, and of what they leave to be explained.
    unknown = s - _predicted(s, chosen)
    beside = inputs @ directions(inputs.T @ unknown @ inputs, inputs.T @ unknown @ target, rank)
    read = np.concatenate([chosen, beside], axis=1)
    a = read.T @ s @ read
    weights = np.linalg.solve(a + ridge * np.trace(a) / len(a) * np.eye(len(a)), read.T @ s @ target)
    missed = target - read @ weights
    error = float(np.sum(missed * (s @ missed)) / np.sum(target * (s @ target)))
    path, bias = (beside @ weights[kept:])[hidden:], b2 + moments.mean @ missed
    return Network(units, single(weights[:kept]), single(path), single(bias), error)


def directions(covariance: np.ndarray, cross: np.ndarray, rank: int) -> np.ndarray:
    """(C, rank) of the inputs whose regression explains most (Izenman 1975)."""
    regular = covariance + 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    root = np.linalg.cholesky(regular)
    left = np.linalg.svd(np.linalg.solve(root, cross), full_matrices=False)[0]
    return np.asarray(np.linalg.solve(root.T, left[:, :rank]))


def _predicted(s: np.ndarray, read: np.ndarray) -> np.ndarray:
    """The part of a covariance that is known with these combinations (n, k) of its channels."""
    if not read.shape[1]:
        return np.zeros_like(s)
    a, cross = read.T @ s @ read, read.T @ s
    return np.asarray(cross.T @ np.linalg.solve(a + 1e-6 * np.trace(a) / len(a) * np.eye(len(a)), cross))


def run(module: Any, layers: Sequence[Layers], left: Sequence[Network], images: Tensor) -> Tensor:
    """Normalised token 0 behind the last block, (images, C)."""

    def network(read: Tensor, each: Layers, new: Network) -> Tensor:
        hidden = gelu(each("fc1", read)[..., torch.from_numpy(new.units)])
        return hidden @ new.w2 + read @ new.path + new.bias

    x = embed(module, images)
    for each, new in zip(layers, left, strict=True):
        x = chunks(lambda t, e=each: t + e("proj", e.contexts(e.norm(0, t))), x)
        x = chunks(lambda t, e=each, n=new: t + network(e.norm(1, t), e, n), x)
    return module.norm(x[:, 0])


if __name__ == "__main__":
    main()
