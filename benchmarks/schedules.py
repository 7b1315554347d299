"""The schedules published with ToaSt, all nine models of the paper: python benchmarks/schedules.py

Every `paper:` preset is applied to the model it belongs to, exported with random weights: widths, costs and speed do
not depend on their values, accuracy does and is not measured. The presets rank hidden units on images; here, without
any, they are ranked by their weights, which changes none of the numbers below. GMACs are the authors' figure, ours in
their accounting (which describes selection at run time), and the static graph's own. Milliseconds are medians of one
image in ONNX Runtime, one thread, dense and pruned in turns. With `--count` nothing is timed and models are exported
without storage for their weights, which is enough to count; ViT-H wants 12 GB of memory without it.

Needs timm. `--results` keeps what is measured in a file, so that models can be measured one at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import export
from tests import zoo
from tests.weightless import export_weightless
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.engines.ortbench import benchmark
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, save_model, stored_bytes
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.presets import Preset, list_presets
from toast_onnx.pruning import prune
from toast_onnx_cli.console import print_table

COLUMNS = (
    *(
        "preset",
        "published GMACs",
        "ours, their way",
        "static graph",
        "dense",
        "params, M",
        "dense",
        "file, MB",
        "dense",
    ),
    *("ms", "dense", "speed-up"),
)


def main() -> None:
    options = arguments()
    rows = json.loads(options.results.read_text()) if options.results and options.results.exists() else []
    for model in dict.fromkeys(p.model for p in list_presets()):
        presets = [p for p in list_presets() if p.model == model]
        if (options.models and presets[0].short not in options.models) or presets[0].name in {r["name"] for r in rows}:
            continue
        with tempfile.TemporaryDirectory(prefix="toast-schedules-") as name:
            rows += counted(presets, Path(name)) if options.count else measured(presets, Path(name), options.rounds)
        print(f"{model}: done", file=sys.stderr, flush=True)
        if options.results:
            options.results.write_text(json.dumps(rows, indent=1))
    order = [p.name for p in list_presets()]
    rows = sorted((r for r in rows if r["name"] in order), key=lambda r: order.index(r["name"]))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print_table(COLUMNS, [cells(row) for row in rows])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    short = list(dict.fromkeys(p.short for p in list_presets()))
    parser.add_argument("--models", nargs="+", choices=short, help="only these")
    parser.add_argument("--count", action="store_true", help="count only: no files, no latency")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--results", type=Path, help="JSON file of rows: what it holds is not measured again")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    return parser.parse_args()


def measured(presets: list[Preset], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model's schedules, with files and latency."""
    dense = folder / "dense.onnx"
    export(random_model(presets[0].model), dense)
    look = study(load_model(dense))
    rows = []
    for preset in presets:
        path = folder / "pruned.onnx"
        save_model(pruned(look, preset).model, path)
        after = study(load_model(path))
        _, timing = benchmark([dense, path], [1], threads=1, warmup=2, rounds=rounds)
        summary = timing.summary()
        rows.append(
            row(preset, look, graph_macs(after.view, after.counted), graph_params(after.view))
            | {"bytes": stored_bytes(path), "dense_bytes": stored_bytes(dense)}
            | {"ms": 1000 * float(np.median(timing.seconds)), "dense_ms": 1000 * float(np.median(timing.baseline))}
            | {"speedup": summary["speedup"]}
        )
    return rows


def counted(presets: list[Preset], folder: Path) -> list[dict[str, Any]]:
    """Rows of one model's schedules without files or latency."""
    look = study(load_model(export_weightless(presets[0].model, folder)))
    rows = []
    for preset in presets:
        view = GraphView(pruned(look, preset, check=False).model)
        rows.append(row(preset, look, graph_macs(view, Facts(view, look.counted_shapes)), graph_params(view)))
    return rows


def random_model(name: str) -> Any:
    """timm's module with a 1000-class head and the weights it starts from."""
    zoo.declare_torchvision_operators()
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=1000).eval()


def pruned(look: Study, preset: Preset, check: bool = True) -> Any:
    """The schedule applied, hidden units ranked by their weights."""
    ratios = preset.ratios()
    ratios = ratios.model_copy(update={"ffn": ratios.ffn.model_copy(update={"score": "l1"})})
    return prune(look, ratios, SyntheticStatistics(look), check=check)


def row(preset: Preset, look: Study, macs: int, params: int) -> dict[str, Any]:
    return {
        "name": preset.name,
        "published": published(preset),
        "theirs": preset.gmacs,
        "static": macs / 1e9,
        "dense": graph_macs(look.view, look.counted) / 1e9,
        "params": params,
        "dense_params": graph_params(look.view),
    }


def published(preset: Preset) -> float:
    """The authors' figure, as the packaged table has it."""
    from importlib import resources

    from toast_onnx.planning.strict_yaml import read_document

    with resources.as_file(resources.files("toast_onnx.planning") / "paper_schedules.yaml") as path:
        document: Any = read_document(path)
    return float(document[preset.model]["budgets"][preset.budget]["gmacs"])


def cells(row: dict[str, Any]) -> list[str]:
    counts = [f"{row[k]:.3f}" for k in ("published", "theirs", "static", "dense")]
    counts += [f"{row[k] / 1e6:.2f}" for k in ("params", "dense_params")]
    if "ms" not in row:
        return [row["name"], *counts, *["-"] * 5]
    sizes = [f"{row[k] / 1e6:.1f}" for k in ("bytes", "dense_bytes")]
    times = [f"{row[k]:.1f}" for k in ("ms", "dense_ms")]
    return [row["name"], *counts, *sizes, *times, f"{row['speedup']:.2f}"]


if __name__ == "__main__":
    main()
