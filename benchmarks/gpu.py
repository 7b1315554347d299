"""Latency of pruned models on a GPU: dense, aligned, tied, unaligned, merged and quantized, engine against ONNX.

    python benchmarks/gpu.py                              # DeiT-B and Swin-T, batch 1, 8, 64, fp16, under ten minutes
    python benchmarks/gpu.py --provider cpu               # on the model of examples/, where no GPU is
    python benchmarks/gpu.py model.onnx --provider cuda

Every variant is timed in turns with the dense model under ONNX Runtime. Where TensorRT builds engines here, each is
built in fp16 too, with how many of its attentions became one kernel; where trtexec and a GPU are at hand the engines
are timed as well. No data are needed: weights may be random, and speed does not depend on them. What does not fit into
`--minutes` any more is left out and named.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import toast_onnx as toast
from benchmarks.deit import export, import_timm
from toast_onnx.engines import cuda, trtbench, trtexec
from toast_onnx.engines.build import BuildRequest, build
from toast_onnx.engines.convert import convert_file
from toast_onnx.engines.ortbench import benchmark
from toast_onnx.engines.trtexec import BenchSettings
from toast_onnx.errors import ToastError
from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.providers import PROVIDERS
from toast_onnx_calibration.quantizing import QuantizeOptions, quantize

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_vit.onnx"
MODELS = ("deit_base_patch16_224", "swin_tiny_patch4_window7_224")
#: A third of the widths goes in each; they differ in the sizes that stay.
VARIANTS: dict[str, dict[str, Any]] = {
    "aligned": {"align": 8, "attention": {"qk": 0.5, "vo": 0.25}, "ffn": {"fc2": 0.35}},
    "tied": {"align": 8, "attention": {"qk": 0.35, "vo": 0.35, "tie": True}, "ffn": {"fc2": 0.35}},
    "unaligned": {"align": 1, "attention": {"qk": 0.36, "vo": 0.34}, "ffn": {"fc2": 0.347}},
    "merged": {"tokens": {"merge": 0.04}},
}


def main() -> None:
    """Make the variants of every model, measure them, and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--provider", choices=PROVIDERS, default="tensorrt")
    parser.add_argument("--batch", nargs="+", type=int, help="1 8 64; on the CPU 1 8")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=10, help="start nothing new after so many")
    parser.add_argument("--no-engines", action="store_true", help="do not build engines")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    on_cpu = arguments.provider == "cpu"
    batches = arguments.batch or ([1, 8] if on_cpu else [1, 8, 64])
    print(f"provider {arguments.provider}, {'fp32' if on_cpu else 'fp16'}, GPU: {cuda.gpu_name() or 'none'}\n")
    print("| model | variant | batch | ms | spread | of dense | engine ms | fused attentions |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with TemporaryDirectory(prefix="toast-gpu-") as name:
        folder = Path(name)
        for model in arguments.models or ([EXAMPLE] if on_cpu else exported(folder)):
            made = dict(variants(model, folder, end))
            engines = {} if arguments.no_engines else dict(built(made, folder, max(batches), end))
            for batch in batches:
                if time.monotonic() > end:
                    print(f"\n{model.stem}, batch {batch}: left out, the time is up\n")
                    continue
                for row in rows(model.stem, made, engines, batch, arguments.provider, arguments.rounds, folder):
                    print(row, flush=True)


def exported(folder: Path) -> Iterator[Path]:
    """DeiT-B and Swin-T with random weights."""
    for name in MODELS:
        path = folder / f"{name}.onnx"
        export(import_timm().create_model(name).eval(), path)
        yield path


def variants(model: Path, folder: Path, end: float) -> Iterator[tuple[str, Path]]:
    """The dense model and what is made of it; what a model does not allow is named and left out."""
    yield "dense", model
    for name, settings in VARIANTS.items():
        out = folder / f"{model.stem}.{name}.onnx"
        if time.monotonic() > end:
            continue
        try:
            small = toast.prune(model, parse_ratios({"version": 1, **settings}), skip_unprunable=True, check=False)
            small.save(out)
        except ToastError as error:
            print(f"\n{model.stem}, {name}: {error}\n")
            continue
        yield name, out
    tied, out = folder / f"{model.stem}.tied.onnx", folder / f"{model.stem}.int8.onnx"
    if not tied.exists() or time.monotonic() > end:
        return
    look = study(load_model(tied))
    (shape,) = look.counted_shapes.values()
    np.save(folder / "noise.npy", np.random.default_rng(0).standard_normal((8, *shape[1:])).astype(np.float32))
    try:
        quantize(tied, folder / "noise.npy", out, QuantizeOptions(method="minmax", batch=4))
    except ToastError as error:
        print(f"\n{model.stem}, int8: {error}\n")
        return
    yield "tied, int8", out


def built(made: dict[str, Path], folder: Path, most: int, end: float) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Engines of the variants in fp16, and how many attentions became one kernel; none where nothing builds them."""
    for name, path in made.items():
        if time.monotonic() > end:
            return
        engine = folder / f"{path.stem}.engine"
        try:
            record = build(path, engine, BuildRequest(precision="fp16", batch=(1, min(8, most), most)))
        except ToastError as error:
            print(f"\n{path.stem}: no engine: {error}\n")
            continue
        attention = record["attention"] or {"fused": None, "found": "?"}
        fused = "?" if attention["fused"] is None else attention["fused"]
        yield name, (engine, f"{fused} of {attention['found']}")


def rows(
    model: str,
    made: dict[str, Path],
    engines: dict[str, tuple[Path, str]],
    batch: int,
    provider: str,
    rounds: int,
    folder: Path,
) -> Iterator[str]:
    """One row a variant, timed in turns."""
    timings = benchmark([ready(p, provider, folder) for p in made.values()], [batch], provider=provider, rounds=rounds)
    timed = engine_times([path for path, _ in engines.values()], batch)
    for name, timing in zip(made, timings, strict=True):
        found = timing.summary()
        path, fused = engines.get(name, (None, ""))
        milliseconds = "" if path not in timed else f"{timed[path]:.3f}"
        yield (
            f"| {model} | {name} | {batch} | {found['median_ms']:.3f} | {found['spread']:.1%} "
            f"| {1 / found['speedup']:.2f} | {milliseconds} | {fused} |"
        )


def ready(path: Path, provider: str, folder: Path) -> Path:
    """The model in the precision that is timed: float32 on the CPU, fp16 elsewhere; int8 stays as it is."""
    if provider == "cpu" or path.name.endswith("int8.onnx"):
        return path
    half = folder / f"{path.stem}.fp16.onnx"
    if not half.exists():
        convert_file(path, half, precision="fp16")
    return half


def engine_times(engines: Sequence[Path], batch: int) -> dict[Path, float]:
    """Milliseconds of each engine by trtexec; nothing where trtexec or a GPU is missing."""
    if not engines:
        return {}
    targets = [trtbench.open_target(engine, [batch]) for engine in engines]
    program = trtexec.find_trtexec(trtbench.common_backend(targets))
    if program is None or cuda.gpu_name() is None:
        return {}
    results = trtbench.measure(trtexec.ask(program), targets, [batch], BenchSettings(duration=1.0), rounds=2)
    return {engine: float(r["median_ms"]) for engine, r in zip(engines, results, strict=True)}


if __name__ == "__main__":
    main()
