"""What a closed-form pass over the pruned blocks may fit beside their last layers: python benchmarks/refit_trials.py

`prune --data` fits fc2 of every block once more, to what the dense model has behind the block (docs/method.md). Here
other layers are fitted in the same way, each in front of the ones behind it: `qkv` to the dense model's own values in
the kept dimensions, `proj` to the residual stream behind the attention, `fc1` to the kept units before the activation.
The strength of each ridge comes from four folds of images. Further trials: token 0 may count more in the last blocks,
images may be shown mirrored as well, and a matrix may be fitted in front of the classifier.

`--views` measures views of every image, too, in which the model sees other classes, as `prune --views` does; `--steps`
and `--step` change how they are made.

Every trial also gives KL on the calibration images themselves, and with fewer `--samples` than there are on the other
ones: how much of the fit is theirs alone.

Needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors, data/ilsvrc_val_300 and
data/calibration_256. The fits run in PyTorch on DeiT-Tiny's own layers; pruning is the library's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from benchmarks.deit import (
    CALIBRATION,
    evaluation_images,
    export_deit,
    load_deit,
    parser_with_data,
    uniform_ratios,
)
from toast_onnx.finetune import views
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx.solving.refit import STRENGTHS, Lack
from toast_onnx.solving.weights import BlockWeights
from toast_onnx_calibration.agreement import divergences
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import GRADIENT, everything
from toast_onnx_calibration.recipes import parse_recipe
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import open_source
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_cli.console import print_table

HEADS, CHANNELS, FOLDS, CHUNK = 3, 192, 4, 16
FITS = ("qkv", "proj", "fc1", "fc2")
#: Weights of token 0 that the last four blocks choose among with `--late`.
LATE = (20.0, 100.0, 1000.0)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    data: Path = options.data
    images, labels = evaluation_images(data / "data" / "ilsvrc_val_300", options.images)
    judged = torch.from_numpy(images)
    module = load_deit(data / "weights" / "deit_tiny_patch16_224.safetensors")
    with tempfile.TemporaryDirectory(prefix="toast-refit-") as name:
        folder = Path(name)
        look = study(load_model(export_deit(data / "weights" / "deit_tiny_patch16_224.safetensors", folder / "d.onnx")))
        seen, others = calibration_images(data / "data" / "calibration_256", options.samples)
        found = statistics(look, data / "data" / "calibration_256", folder, options)
        torch.set_grad_enabled(False)  # behind the statistics, which may take gradients
        dense = [Layers.of_module(block) for block in module.blocks]
        scores, own = (run_blocks(module, dense, x) for x in (judged, seen))
        apart = run_blocks(module, dense, others) if len(others) else None
        shown = torch.cat([seen, seen.flip(-1)]) if options.mirrored else seen
        rows = []
        for ratio in options.ratios:
            ratios = uniform_ratios(
                {"select": "subspace"}, {"score": options.score}, {"kind": "ridge"}, ratio, heads=True
            )
            new = prune(look, parse_ratios(ratios), found).weights
            for text in options.fits:
                fits = [] if text == "none" else text.split(",")
                blocks = [layers.pruned(new[i]) for i, layers in enumerate(dense)]
                fitted = fit_blocks(module, dense, blocks, shown, fits, options.late)
                outs = run_blocks(module, fitted, judged)
                answers = run_blocks(module, fitted, seen)
                row = {"removed": ratio, "fitted": text, "kl": kl(module, scores, outs)}
                row["top1"] = float((classify(module, outs).argmax(1).numpy() == labels).mean())
                row["kl_head"] = kl(module, scores, outs + head_change(own, answers)(outs))
                row["kl_calibration"] = kl(module, own, answers)
                row["kl_others"] = None if apart is None else kl(module, apart, run_blocks(module, fitted, others))
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    cells = [
        [f"{r['removed']:g}", r["fitted"], f"{r['top1']:.1%}"]
        + ["-" if r[key] is None else f"{r[key]:.3f}" for key in ("kl", "kl_head", "kl_calibration", "kl_others")]
        for r in rows
    ]
    heading = ("removed", "fitted", "top-1", "KL", "with head", "KL, calibration", "KL, other images")
    print_table(heading, cells, title=f"DeiT-Tiny, {len(labels)} images")


def arguments() -> argparse.Namespace:
    parser = parser_with_data(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.35], help="share of qk, vo and fc2 removed")
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--views", type=int, default=0, help="views of each of them")
    parser.add_argument("--steps", type=int, default=views.STEPS, help="steps that make a view")
    parser.add_argument("--step", type=float, default=views.STEP, help="length of a step, of the image's deviation")
    parser.add_argument("--images", type=int, help="evaluation images; all by default")
    parser.add_argument("--score", default="second-order", choices=["second-order", "fisher"])
    parser.add_argument(
        "--fits", nargs="+", type=_fits, default=["none", "fc2", "proj,fc2", "fc1,fc2", "qkv,fc2", "qkv,proj,fc1,fc2"]
    )
    parser.add_argument("--late", action="store_true", help="the last four blocks choose how much token 0 counts")
    parser.add_argument("--mirrored", action="store_true", help="show the images mirrored, too")
    return parser.parse_args()


def _fits(text: str) -> str:
    """A list of layers such as proj,fc2, as an option's type."""
    if text != "none" and not set(text.split(",")) <= set(FITS):
        raise argparse.ArgumentTypeError(f"'{text}' is not none or some of {', '.join(FITS)}, apart by commas")
    return text


def calibration_images(folder: Path, samples: int) -> tuple[Tensor, Tensor]:
    """(samples, 3, 224, 224) as `--samples` draws them, and the other images of the folder."""
    inputs = [ModelInput("input", ("batch", 3, 224, 224), np.dtype(np.float32))]
    recipe = parse_recipe(CALIBRATION, "calibration")
    drawn = {row for chunk in open_source(folder, inputs, recipe, samples=samples) for row in chunk.rows}
    arrays: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for chunk in open_source(folder, inputs, recipe):
        taken = np.array([row in drawn for row in chunk.rows])
        for side in arrays:
            arrays[side].append(chunk.arrays["input"][taken == side])
    return torch.from_numpy(np.concatenate(arrays[True])), torch.from_numpy(np.concatenate(arrays[False]))


def statistics(look: Study, images: Path, folder: Path, options: argparse.Namespace) -> CalibratedStatistics:
    """Statistics of the dense model."""
    views.STEPS, views.STEP = options.steps, options.step
    recipe = folder / "calibration.yaml"
    recipe.write_text(yaml.safe_dump(CALIBRATION))
    how = CalibrationOptions(
        preprocess=str(recipe), samples=options.samples, views=options.views, threads=options.threads
    )
    parts = {"qk", "context", "hidden"} | ({GRADIENT} if options.score == "fisher" else set())
    calibrate(look, images, folder / "statistics.npz", everything(look, parts), how)
    return CalibratedStatistics(look, folder / "statistics.npz")


@dataclass
class Layers:
    """The layers of a block as (weight (in, out), bias (out,)) by name, and its norms."""

    norms: tuple[torch.nn.LayerNorm, torch.nn.LayerNorm]
    layers: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of_module(cls, block: Any) -> Layers:
        """Those of a block of timm's."""
        named = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
        return cls((block.norm1, block.norm2), {k: (v.weight.T.clone(), v.bias.clone()) for k, v in named.items()})

    def pruned(self, new: BlockWeights) -> Layers:
        """The block with its new weights."""
        a, f = new.attention, new.ffn
        if a is None or a.proj is None or f is None or f.fc2 is None or f.units is None:
            raise ValueError("all parts of a block must be pruned")
        heads = [part for part in (a.q, a.k, a.v) if part is not None]
        weight, bias = self.layers["fc1"]
        return Layers(
            self.norms,
            {
                "qkv": (_joined([h.weight for h in heads]), _joined([h.bias for h in heads])),
                "proj": (single(a.proj.weight.reshape(-1, CHANNELS)), single(a.proj.bias)),
                "fc1": (weight[:, torch.from_numpy(f.units)], bias[torch.from_numpy(f.units)]),
                "fc2": (single(f.fc2[0]), single(f.fc2[1])),
            },
        )

    def __call__(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.layers[name]
        return x @ weight + bias

    def norm(self, k: int, x: Tensor) -> Tensor:
        """What norm k makes of x (..., C)."""
        n = self.norms[k]
        return layer_norm(x, (CHANNELS,), n.weight, n.bias, n.eps)

    def contexts(self, x: Tensor) -> Tensor:
        """(images, tokens, heads x dim) that the projection reads, of a normalised x."""
        images, tokens, _ = x.shape
        values = self.layers["proj"][0].shape[0]
        queries = (self.layers["qkv"][0].shape[1] - values) // 2
        q, k, v = (
            part.reshape(images, tokens, HEADS, -1).transpose(1, 2)
            for part in self("qkv", x).split([queries, queries, values], -1)
        )
        weights = (q @ k.transpose(-1, -2) * 64**-0.5).softmax(-1)  # the scale is the dense head's
        return (weights @ v).transpose(1, 2).reshape(images, tokens, -1)


def single(array: np.ndarray) -> Tensor:
    """An array as a tensor in single precision."""
    return torch.from_numpy(np.asarray(array, np.float32))


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    """(C, heads, dim) or (heads, dim) of Q, K and V side by side, heads and dimensions as one axis."""
    return single(np.concatenate([p.reshape(*p.shape[:-2], -1) for p in parts], axis=-1))


def chunks(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A function of some images at a time."""
    return torch.cat([function(*(x[i : i + CHUNK] for x in inputs)) for i in range(0, len(inputs[0]), CHUNK)])


def embed(module: Any, images: Tensor) -> Tensor:
    """Tokens in front of the first block, (images, tokens, C)."""
    return chunks(lambda x: module._pos_embed(module.patch_embed(x)), images)


def run_blocks(module: Any, blocks: Sequence[Layers], images: Tensor) -> Tensor:
    """Normalised token 0 behind the last block, (images, C)."""
    x = embed(module, images)
    for block in blocks:
        x = chunks(lambda t, b=block: t + b("proj", b.contexts(b.norm(0, t))), x)
        x = chunks(lambda t, b=block: t + b("fc2", gelu(b("fc1", b.norm(1, t)))), x)
    return module.norm(x[:, 0])


def classify(module: Any, tokens: Tensor) -> Tensor:
    """Scores of the classes."""
    return module.head(tokens)


def kl(module: Any, dense: Tensor, other: Tensor) -> float:
    """Mean KL divergence of the answers to two sets of tokens (images, C)."""
    p, q = (classify(module, t).double().numpy() for t in (dense, other))
    return float(divergences(p, q).mean())


def fit_blocks(
    module: Any, dense: Sequence[Layers], blocks: list[Layers], images: Tensor, fits: Sequence[str], late: bool
) -> list[Layers]:
    """Fit some layers of each block in turn, the dense and the pruned model advancing side by side (in place)."""
    wanted = embed(module, images)
    made = wanted.clone()
    for b, (old, new) in enumerate(zip(dense, blocks, strict=True)):
        counts = LATE if late and b >= len(blocks) - 4 else LATE[:1]
        x, y = old.norm(0, wanted), new.norm(0, made)
        if "qkv" in fits:
            fit(new, "qkv", y, (x - y) @ new.layers["qkv"][0], counts)
        middle, read = wanted + chunks(lambda t, o=old: o("proj", o.contexts(t)), x), chunks(new.contexts, y)
        if "proj" in fits:
            fit(new, "proj", read, middle - made - new("proj", read), counts)
        made = made + new("proj", read)
        x, y = old.norm(1, middle), new.norm(1, made)
        if "fc1" in fits:
            fit(new, "fc1", y, (x - y) @ new.layers["fc1"][0], counts)
        wanted = middle + chunks(lambda t, o=old: o("fc2", gelu(o("fc1", t))), x)
        hidden = gelu(new("fc1", y))
        if "fc2" in fits:
            fit(new, "fc2", hidden, wanted - made - new("fc2", hidden), counts)
        made = made + new("fc2", hidden)
    return blocks


def fit(new: Layers, name: str, read: Tensor, lacking: Tensor, counts: Sequence[float]) -> None:
    """Add the ridge regression of what a layer's output lacks, (images, tokens, m), on what it reads (in place).

    The strength, and how much token 0 counts, are those of the least error on held-out folds, where it counts as much
    as the largest of `counts`.
    """
    judges = folds(read, lacking, max(counts))
    best = (np.inf, Lack.of(np.zeros((1, 1)), np.zeros((1, 1)), [1.0]), 0.0)
    for count in counts:
        parts = folds(read, lacking, count)
        left = dict.fromkeys(STRENGTHS, 0.0)
        for f, judge in enumerate(judges):
            others = merged([p for k, p in enumerate(parts) if k != f])
            for strength in STRENGTHS:
                left[strength] += judge.left(*others.change(strength))
        strength = min(left, key=left.__getitem__)
        if left[strength] < best[0]:
            best = (left[strength], merged(parts), strength)
    weight, bias = best[1].change(best[2])
    old = new.layers[name]
    new.layers[name] = (old[0] + single(weight), old[1] + single(bias))


def folds(read: Tensor, lacking: Tensor, count: float) -> list[Lack]:
    """Sums over every fourth image, token 0 counted `count` times; an image and its mirrored one lie in one fold."""
    weights = np.ones(read.shape[1])
    weights[0] = count
    found = []
    for f in range(FOLDS):
        parts = [
            Lack.of(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), np.tile(weights, len(x)))
            for x, y in zip(read[f::FOLDS].split(CHUNK), lacking[f::FOLDS].split(CHUNK), strict=True)
        ]
        found.append(merged(parts))
    return found


def merged(parts: Sequence[Lack]) -> Lack:
    """Sums over all."""
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def head_change(dense: Tensor, pruned: Tensor) -> Callable[[Tensor], Tensor]:
    """What to add to tokens in front of the classifier: ridge regression of what they lack on what they are.

    Strength 10: the best of all for the 300 images, so this says what such a matrix could give at most.
    """
    weight, bias = Lack.of(pruned, dense - pruned, np.ones(len(pruned))).change(10.0)
    return lambda tokens: tokens @ single(weight) + single(bias)


if __name__ == "__main__":
    main()
