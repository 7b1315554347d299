"""Planned ratios against uniform ones on DeiT-Tiny, and how well the plan's prediction ranks allocations.

    TOAST_DATA=/data python benchmarks/plan.py

The folder (`--data` or TOAST_DATA) holds weights/deit_tiny_patch16_224.safetensors, data/ilsvrc_val_300 and
data/calibration_256. The 256 unlabelled images plan; the 300 labelled ones judge and are used for nothing else. Uniform
ratios are not aligned, planned widths are multiples of 8; both graphs are pruned with the same selection and
compensation, one-shot unless `--corrections` names what follows it. `--latency 0.7` adds a plan for a latency budget,
timed on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import CALIBRATION, EVALUATION, export_deit, parser_with_data
from toast_onnx.finetune.local import LocalSettings
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import Ratios, parse_ratios
from toast_onnx.planning.search import Found, Kept, PartChoice, combinations, joined, search
from toast_onnx.planning.width_costs import Part, dense_widths, width_cost
from toast_onnx.pruning import prune
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.costs import measure_costs, onnxruntime_runtime
from toast_onnx_calibration.labels import open_labels
from toast_onnx_calibration.local import refine_locally
from toast_onnx_calibration.planning import (
    POINTS,
    TRIAL_SAMPLES,
    Budget,
    counted_groups,
    plan_counted,
    plan_latency,
    predicted_choices,
    statistics_for,
    time_plan,
)
from toast_onnx_calibration.sensitivity_results import resume
from toast_onnx_calibration.sensitivity_stream import Trials, read_samples
from toast_onnx_calibration.sensitivity_trials import Solver, identity_of, in_turn, measure, trial_grid
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_cli.console import print_table

PARTS: tuple[Part, ...] = ("qk", "vo", "fc2", "heads")
#: name -> how the blocks are corrected one after the other; None: not at all.
CORRECTIONS: dict[str, LocalSettings | None] = {"none": None, "refit": LocalSettings(steps=0), "local": LocalSettings()}
Refiner = Callable[[Any], Any] | None
ROWS = ("uniform", "planned, no heads", "planned")


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="toast-plan-benchmark-") as name:
        folder = options.work or Path(name)
        folder.mkdir(exist_ok=True)
        if not (folder / "dense.onnx").exists():
            export_deit(options.data / "weights" / "deit_tiny_patch16_224.safetensors", folder / "dense.onnx")
        look = study(load_model(folder / "dense.onnx"))
        settings = parse_ratios({"version": 1})
        started = time.perf_counter()
        solver, choices = planner(look, settings, folder, options)
        seconds = time.perf_counter() - started
        judge = open_judge(look, folder, options)
        results: dict[str, Any] = {"planning_seconds": seconds, "cuts": [], "budgets": budgets(look, choices)}
        refiners = {name: refiner(look, name, folder, options) for name in options.corrections}
        for cut in options.cuts:
            plans = planned(look, choices, cut)
            wanted = compared(look, settings, plans, cut)
            rows = compare(look, {title: wanted[title] for title in options.rows}, solver, judge, cut, refiners)
            kept = {title: plan.kept for title, plan in plans.items()}
            results["cuts"].append({"cut": cut, "comparison": rows, "kept": kept})
        if options.allocations:
            budget = 1 - options.cuts[0] * blocks_share(look)
            results["ranking"] = ranking(look, choices, solver, judge, budget, options.allocations)
        if options.latency:
            results["latency"] = latency(look, choices, options)
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)


def arguments() -> argparse.Namespace:
    parser = parser_with_data(__doc__)
    parser.add_argument(
        "--cuts", type=float, nargs="+", default=[0.35], help="shares of the blocks' MACs that go; the first is ranked"
    )
    parser.add_argument(
        "--corrections",
        nargs="+",
        choices=CORRECTIONS,
        default=["none"],
        help="what follows the closed form: nothing, means and last layers block by block, or local training",
    )
    parser.add_argument("--steps", type=int, default=LocalSettings.steps, help="of local training")
    parser.add_argument(
        "--local-views", type=int, default=0, help="views of each image for it (`compensation: {views: N}`)"
    )
    parser.add_argument("--samples", type=int, default=256, help="images to plan with")
    parser.add_argument("--views", type=int, default=0, help="views of each of them (`plan --views`, `prune --views`)")
    parser.add_argument("--trial-samples", type=int, default=TRIAL_SAMPLES, help="of them, the first that trials run")
    parser.add_argument("--points", type=float, nargs="+", default=POINTS, help="ratios measured for each part")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which ratios to compare")
    parser.add_argument("--allocations", type=int, default=10, help="random allocations to rank; 0: none")
    parser.add_argument("--latency", type=float, help="also plan for this share of the latency")
    parser.add_argument("--work", type=Path, help="keep what was measured here, and go on from it")
    return parser.parse_args()


def recipe(folder: Path, name: str, document: dict[str, Any]) -> str:
    """Preprocessing as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def calibration(folder: Path, options: argparse.Namespace) -> CalibrationOptions:
    """How the unlabelled images are read."""
    return CalibrationOptions(
        preprocess=recipe(folder, "calibration", CALIBRATION),
        samples=options.samples,
        views=options.views,
        threads=options.threads,
    )


def planner(
    look: Study, settings: Ratios, folder: Path, options: argparse.Namespace
) -> tuple[Solver, list[PartChoice]]:
    """Statistics, measured points and predictions, from the unlabelled images."""
    images, work = options.data / "data" / "calibration_256", folder / "planning"
    work.mkdir(exist_ok=True)
    reading = calibration(folder, options)
    if not (folder / "statistics.npz").exists():
        calibrate(look, images, folder / "statistics.npz", statistics_for(look, settings, PARTS), reading)
    statistics = CalibratedStatistics(look, folder / "statistics.npz")
    samples = read_samples(look, images, reading, work)
    trials = Trials(look, samples, reading, work).on_first(options.trial_samples)
    solver = Solver(look, settings, statistics)
    results = folder / "sensitivity.json"
    found = resume(results, identity_of(look, trials, len(samples.rows), settings, statistics), "kl", None)
    grid = trial_grid(look, settings, PARTS, options.points)

    def note(done: int, total: int, what: str, seconds: float | None) -> None:
        if done % 12 == 0:
            print(f"planning: {done}/{total} {what}", file=sys.stderr)

    measure(
        in_turn(lambda t: trials.damage(solver.weights({t.block: cast(dict[Part, int], t.kept)}))),
        grid,
        found,
        results,
        note,
    )
    return solver, predicted_choices(look, settings, statistics, found, PARTS)


def open_judge(look: Study, folder: Path, options: argparse.Namespace) -> Trials:
    """The labelled images, for judging only."""
    images, work = options.data / "data" / "ilsvrc_val_300", folder / "judging"
    work.mkdir(exist_ok=True)
    reading = CalibrationOptions(preprocess=recipe(folder, "evaluation", EVALUATION), threads=options.threads)
    labels = open_labels(images / "labels.csv", images)
    return Trials(look, read_samples(look, images, reading, work), reading, work, labels=labels)


def blocks_share(look: Study) -> float:
    """The blocks' part of the model's MACs."""
    blocks = sum(width_cost(look.view, look.counted, b, "macs").at(dense_widths(b)) for b in look.match.blocks)
    return blocks / graph_macs(look.view, look.counted)


def planned(look: Study, choices: list[PartChoice], cut: float) -> dict[str, Found]:
    """Plans that take a share of the blocks' MACs, without and with whole heads."""
    budget = Budget("macs", 1 - cut * blocks_share(look))
    thinned = [c for c in choices if c.part != "heads"]
    return {
        "planned, no heads": plan_counted(look, thinned, budget),
        "planned": plan_counted(look, choices, budget),
    }


def refiner(look: Study, correction: str, folder: Path, options: argparse.Namespace) -> Refiner:
    """What corrects pruned blocks on the unlabelled images."""
    local = CORRECTIONS[correction]
    if local is None:
        return None
    if local.steps:
        local = replace(local, steps=options.steps, views=options.local_views)
    images = options.data / "data" / "calibration_256"
    reading = calibration(folder, options)
    return lambda new: refine_locally(look, new, images, reading, local)


def compared(look: Study, settings: Ratios, plans: dict[str, Found], cut: float) -> dict[str, Ratios]:
    """Uniform and planned ratios by their title."""
    uniform = parse_ratios({"version": 1, "attention": {"qk": cut, "vo": cut}, "ffn": {"fc2": cut}, "align": 1})
    dense = [dense_widths(b) for b in look.match.blocks]
    return {"uniform": uniform} | {t: planned_ratios(settings, plan.kept, dense) for t, plan in plans.items()}


def compare(
    look: Study,
    wanted: dict[str, Ratios],
    solver: Solver,
    judge: Trials,
    cut: float,
    refiners: dict[str, Refiner],
) -> list[dict[str, Any]]:
    """All ratios, pruned, corrected and proven by the library, on images not used for planning."""
    whole = {"macs": graph_macs(look.view, look.counted), "top1": judge.dense_top1(), "kl": 0.0}
    rows: list[dict[str, Any]] = [{"ratios": "dense", "correction": "none"} | whole]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "pruned.onnx"
        for title, ratios in wanted.items():
            for correction, refine in refiners.items():
                pruned = prune(look, ratios, solver.statistics, refine=refine)
                save_model(pruned.model, path)
                small = study(load_model(path))
                row = {"ratios": title, "correction": correction, "macs": graph_macs(small.view, small.counted)}
                rows.append(row | judge.damage(pruned.weights))
                print(json.dumps({"cut": cut} | rows[-1]), file=sys.stderr, flush=True)
    return rows


def ranking(
    look: Study, choices: list[PartChoice], solver: Solver, judge: Trials, budget: float, count: int
) -> dict[str, Any]:
    """Random allocations of equal MACs: what was predicted for them, what was measured, and the rank correlation."""
    rows = []
    for seed in range(count):
        kept = random_allocation(look, choices, budget, seed)
        damage = judge.damage(solver.weights(kept))
        rows.append({"predicted": predicted_damage(choices, kept), "measured": damage["kl"], "top1": damage["top1"]})
        print(f"allocation {seed}: {rows[-1]}", file=sys.stderr)
    correlation = spearmanr([r["predicted"] for r in rows], [r["measured"] for r in rows]).statistic
    return {"allocations": rows, "spearman": float(correlation)}


def predicted_damage(choices: Sequence[PartChoice], kept: Kept) -> float:
    """Sum of the predicted damages of all parts at some kept counts, interpolated between widths on offer."""
    total = 0.0
    for members in joined(choices):
        at = [
            replace(m, widths=(count, m.dense), damages=(float(np.interp(count, m.widths, m.damages)), 0.0))
            for m in members
            for count in [kept.get(m.block, {}).get(m.part, m.dense)]
        ]
        total += float(combinations(at)[1][0])
    return total


def random_allocation(look: Study, choices: list[PartChoice], budget: float, seed: int) -> Kept:
    """Widths within the budget that know nothing of the model: a random price for each part's removed fraction."""
    rng = np.random.default_rng(seed)
    priced = []
    for c in choices:
        price = np.exp(rng.normal(0, 1))
        priced.append(PartChoice(c.block, c.part, c.widths, tuple(price * (1 - k / c.dense) ** 2 for k in c.widths)))
    groups, total = counted_groups(look, priced, "macs")
    return search(groups, budget, total, "macs").kept


def budgets(look: Study, choices: list[PartChoice]) -> list[dict[str, Any]]:
    """How closely budgets are met."""
    rows = []
    totals = {"macs": graph_macs(look.view, look.counted), "params": graph_params(look.view)}
    for kind, share in (("macs", 0.6), ("macs", 0.4), ("params", 0.7), ("params", 0.5)):
        found = plan_counted(look, choices, Budget(kind, share))  # type: ignore[arg-type]
        rows.append({"budget": kind, "asked": share, "reached": found.cost / totals[kind]})
    return rows


def latency(look: Study, choices: list[PartChoice], options: argparse.Namespace) -> dict[str, Any]:
    """A plan for a latency budget, and the planned model timed again."""
    started = time.perf_counter()
    runtime = onnxruntime_runtime(1, options.threads)
    table = measure_costs(look, runtime, PARTS)
    measuring = time.perf_counter() - started
    known = [
        PartChoice(c.block, c.part, tuple(k for k, _ in pairs), tuple(d for _, d in pairs))
        for c in choices
        if (pairs := [(k, d) for k, d in zip(c.widths, c.damages, strict=True) if k in table.widths(c.block, c.part)])
    ]
    found, check = plan_latency(look, known, table, Budget("latency", options.latency), runtime)
    again = time_plan(look, found.kept, runtime)
    return {
        "asked": options.latency,
        "by_table": found.cost / table.dense_milliseconds,
        "measured": check.share if check is not None else None,
        "corrections": check.rounds if check is not None else None,
        "measured_again": again.share,
        "dense_milliseconds": again.dense_milliseconds,
        "table_seconds": measuring,
    }


def show(results: dict[str, Any]) -> None:
    """Tables."""
    for found in results["cuts"]:
        rows = [
            [r["ratios"], r["correction"], f"{r['macs'] / 1e9:.3f}", f"{r['top1']:.1%}", f"{r['kl']:.3f}"]
            for r in found["comparison"]
        ]
        title = f"{found['cut']:.0%} of the blocks' MACs removed; planned in {results['planning_seconds']:.0f} s"
        print_table(("ratios", "corrected", "GMACs", "top-1", "KL"), rows, title=title)
    if "ranking" in results:
        ranking = results["ranking"]
        cells = [
            [str(i), f"{r['predicted']:.3f}", f"{r['measured']:.3f}"] for i, r in enumerate(ranking["allocations"])
        ]
        title = f"random allocations of equal MACs, Spearman {ranking['spearman']:.2f}"
        print_table(("allocation", "predicted", "measured"), cells, title=title)
    cells = [[r["budget"], f"{r['asked']:g}", f"{r['reached']:.4f}"] for r in results["budgets"]]
    print_table(("budget", "asked", "reached"), cells, title="budgets")
    if "latency" in results:
        found = results["latency"]
        print(
            f"latency: asked {found['asked']:g}, measured {found['measured']:.3f} after {found['corrections']} "
            f"corrections, again {found['measured_again']:.3f} of {found['dense_milliseconds']:.1f} ms; "
            f"table in {found['table_seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
