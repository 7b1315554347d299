"""Widths, tokens, or both, at equal multiply-accumulates on DeiT-Tiny: python benchmarks/widths_or_tokens.py

For every share of the MACs three plans are made from the same measurements on unlabelled images, as `plan --macs` makes
them: widths alone (heads, qk, vo, fc2), tokens alone, and both. Each is written by `prune` and judged on labelled
images that took no part, by the mean KL divergence from dense and by top-1. --plot draws them.

Needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors, data/ilsvrc_val_300 and
data/calibration_256; --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml

from benchmarks.deit import CALIBRATION, evaluation_images, export_deit, logits, parser_with_data
from toast_onnx.errors import ConfigError
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import Ratios
from toast_onnx.planning.search import PartChoice
from toast_onnx.planning.width_costs import TOKENS, Part, dense_widths
from toast_onnx.pruning import prune
from toast_onnx.tokens.schedule import exact_shares
from toast_onnx_calibration.agreement import divergences
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.planning import POINTS, Budget, plan_counted, predicted_choices
from toast_onnx_calibration.sensitivity_results import resume
from toast_onnx_calibration.sensitivity_trials import measure, trial_grid
from toast_onnx_calibration.token_planning import (
    CountedPrices,
    Together,
    TokenTrials,
    explore,
    open_token_trials,
    plan_together,
)
from toast_onnx_calibration.work import Work, open_work
from toast_onnx_cli.console import print_table

WIDTHS: tuple[Part, ...] = ("heads", "qk", "vo", "fc2")
#: Shares of the MACs at which schedules are measured; the surface through all of them serves every share.
EXPLORED = (0.7, 0.5)


def main() -> None:
    options = arguments()
    data: Path = options.data
    images, labels = evaluation_images(data / "data" / "ilsvrc_val_300")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="toast-widths-or-tokens-") as name:
        folder = Path(name)
        path = export_deit(data / "weights" / "deit_tiny_patch16_224.safetensors", folder / "dense.onnx")
        dense, settings = study(load_model(path)), Ratios()
        scores = logits(path, images, options.threads).astype(np.float64)
        recipe = folder / "calibration.yaml"
        recipe.write_text(yaml.safe_dump(CALIBRATION))
        reading = CalibrationOptions(preprocess=str(recipe), samples=options.samples, threads=options.threads)
        with open_work(dense, data / "data" / "calibration_256", settings, (TOKENS, *WIDTHS), reading) as work:
            choices = widths_on_offer(dense, settings, work)
            tokens = open_token_trials(dense, settings, work.trials, work.merged)
            assert tokens is not None
            for share in EXPLORED:
                surface = explore(tokens, share)
            for share in options.shares:
                for what in ("widths", "tokens", "both"):
                    plan = planned(what, dense, choices, share, tokens, surface)
                    if plan is None:
                        continue
                    row = {"what": what} | judged(dense, settings, plan, tokens, work, folder)
                    found = logits(folder / "planned.onnx", images, options.threads).astype(np.float64)
                    row["kl"] = float(divergences(scores, found).mean())
                    row["top1"] = float((found.argmax(1) == labels).mean())
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr)
    if options.plot is not None:
        draw(rows, options.plot)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    columns = ("what", "MACs", "parameters", "KL", "top-1")
    cells = [[r["what"], *(f"{r[k]:.3f}" for k in ("macs", "params", "kl")), f"{100 * r['top1']:.1f} %"] for r in rows]
    print_table(columns, cells, title="DeiT-Tiny, planned without labels or training")


def widths_on_offer(dense: Study, settings: Ratios, work: Work) -> list[PartChoice]:
    """What every part may keep, with damages, as `plan` measures and predicts them."""
    assert work.narrowing is not None
    found = resume(None, work.identity(), "kl", None)
    measure(work.damages, trial_grid(dense, settings, WIDTHS, POINTS), found)
    return predicted_choices(dense, settings, work.narrowing.statistics, found, WIDTHS)


def planned(
    what: str, dense: Study, choices: Sequence[PartChoice], share: float, tokens: TokenTrials, surface: Any
) -> Together | None:
    """The plan of least predicted damage; None where the share cannot be reached."""
    try:
        if what == "widths":
            return Together(plan_counted(dense, choices, Budget("macs", share)), None)
        offered = choices if what == "both" else ()
        return plan_together(offered, share, tokens, surface, CountedPrices(dense, tokens.macs))[0]
    except ConfigError as e:
        print(f"{what} at {share:g}: {e}", file=sys.stderr)
        return None


def judged(
    dense: Study, settings: Ratios, plan: Together, tokens: TokenTrials, work: Work, folder: Path
) -> dict[str, Any]:
    """Write a plan's model; what it costs."""
    assert work.narrowing is not None
    merge = exact_shares(tokens.tokens, plan.schedule.removed) if plan.schedule else ()
    ratios = planned_ratios(settings, plan.widths.kept, [dense_widths(b) for b in dense.match.blocks], merge)
    save_model(prune(dense, ratios, work.narrowing.statistics).model, folder / "planned.onnx")
    look = study(load_model(folder / "planned.onnx"))
    return {
        "macs": graph_macs(look.view, look.counted) / graph_macs(dense.view, dense.counted),
        "params": graph_params(look.view) / graph_params(dense.view),
        "tokens": plan.schedule.removed if plan.schedule else {},
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """KL over MACs, one line each for widths, tokens and both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for what, marker, colour in (("widths", "s", "#b4532a"), ("tokens", "o", "#2a6fb4"), ("both", "D", "#2f8f4e")):
        points = sorted((r["macs"], r["kl"]) for r in rows if r["what"] == what)
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=what)
    axes.set(xlabel="multiply-accumulates left", ylabel="KL from dense (nats)", yscale="log")
    axes.invert_xaxis()
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    axes.set_title("DeiT-Tiny, 300 images, no training", loc="left", fontsize=10)
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = parser_with_data(__doc__)
    parser.add_argument("--samples", type=int, default=256, help="images to plan with")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], help="shares of the MACs"
    )
    parser.add_argument("--plot", type=Path, help="draw KL over MACs to this image")
    return parser.parse_args()


if __name__ == "__main__":
    main()
