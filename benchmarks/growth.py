"""How time grows with the model: python benchmarks/growth.py WORK [--model NAME ...] [--step NAME ...]

Runs steps of `scale.py` on models of five sizes with random weights, written into the folder WORK (8.5 GB with all
statistics, which are of 16 images), and fits the slope of processor seconds on logarithmic scales: against
multiply-accumulates for what reads, runs and writes a model, against parameters for what solves. Results are kept in
WORK/growth.json, so that models and steps can be run one by one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scale import run_step, write_model
from toast_onnx import load

IMAGES = 16
MODELS = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
)
STEPS = ("inspect", "weights", "statistics", "half")
#: Columns of the table: title, what it grows with, the steps whose seconds count, and those whose seconds do not.
COLUMNS = (
    ("inspect", "macs", ("inspect",), ()),
    (f"calibrate on {IMAGES} images", "macs", ("statistics",), ()),
    ("rewrite", "macs", ("weights",), ()),
    ("solve", "parameters", ("half",), ("weights",)),
)


def size(model: Path) -> dict[str, float]:
    """Multiply-accumulates and parameters of a model."""
    report = load(model).report()
    return {"macs": report["macs"], "parameters": report["params"]}


def seconds(found: Mapping[str, Any], counted: tuple[str, ...], less: tuple[str, ...]) -> float | None:
    """Processor seconds of some steps less those of others; None where one was not run."""
    if not {*counted, *less} <= found.keys():
        return None
    return float(sum(found[step]["cpu_s"] for step in counted) - sum(found[step]["cpu_s"] for step in less))


def slope(x: list[float], y: list[float]) -> float:
    """Of the line through log x and log y with the least squared error."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def rows(done: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table's lines, slopes last."""
    models = [name for name in MODELS if name in done]
    yield "| | GMACs | parameters, M | " + " | ".join(title for title, *_ in COLUMNS) + " |"
    yield "|---|---:|---:|" + "---:|" * len(COLUMNS)
    for name in models:
        found = done[name]
        taken = [seconds(found, counted, less) for _, _, counted, less in COLUMNS]
        cells = " | ".join("-" if each is None else f"{each:.1f}" for each in taken)
        yield f"| {name} | {found['macs'] / 1e9:.1f} | {found['parameters'] / 1e6:.0f} | {cells} |"
    slopes = []
    for _, against, counted, less in COLUMNS:
        pairs = [(float(done[n][against]), seconds(done[n], counted, less)) for n in models]
        known = [(x, y) for x, y in pairs if y is not None]
        slopes.append(f"{slope(*map(list, zip(*known, strict=True))):.2f}" if len(known) > 1 else "-")
    yield "| slope | | | " + " | ".join(slopes) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and statistics, kept, and results, removed")
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--step", nargs="*", choices=STEPS, default=list(STEPS))
    options = parser.parse_args()
    store = options.work / "growth.json"
    done = json.loads(store.read_text()) if store.exists() else {}
    for name in options.model:
        model = write_model(options.work, name)
        found = done.setdefault(name, {})
        found.update(size(model))
        for step in options.step:
            found[step] = run_step(step, model, IMAGES)
            store.write_text(json.dumps(done, indent=1))
    print(*rows(done), sep="\n")


if __name__ == "__main__":
    main()
