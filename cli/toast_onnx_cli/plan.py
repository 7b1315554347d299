"""`toast-onnx plan`: a budget in, a ratios file out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.planning.width_costs import PARTS, TOKENS
from toast_onnx_cli.commands import toast_command
from toast_onnx_cli.console import print_json, say_note, show_table
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL, beside
from toast_onnx_cli.numbers import FiniteRange
from toast_onnx_cli.planners import open_planner, trial_samples_for
from toast_onnx_cli.planning_options import (
    comma_list,
    dry_run_option,
    fractions,
    gather_planning,
    planning_inputs,
    planning_options,
    show_foreseen,
    target_option,
    with_ties,
)
from toast_onnx_cli.streams import as_file, is_stream

share = FiniteRange(0, 1, min_open=True, max_open=True)


@toast_command(
    "plan",
    "plan model.onnx --data images/ --macs 0.6",
    "plan model.onnx --data images/ --latency 0.7 --costs model.costs.json",
)
@click.argument("model", type=MODEL)
@click.option("--macs", type=share, help="Multiply-accumulates to keep, as a fraction of the whole model's.")
@click.option("--params", type=share, help="Parameters to keep, as a fraction of the whole model's.")
@click.option("--latency", type=share, help="Latency to keep, as a fraction of the dense model's.")
@planning_options
@click.option(
    "--parts",
    callback=comma_list,
    default="tokens,qk,vo,fc2",
    show_default=True,
    help="What may shrink, besides heads.",
)
@click.option(
    "--heads/--no-heads",
    "drop_heads",
    default=True,
    show_default=True,
    help="Whether whole heads may go where qk or vo may shrink.",
)
@target_option
@click.option(
    "--tie-heads/--no-tie-heads",
    "tie",
    default=None,
    help="Keep one width in Q/K and V/Proj, a multiple of 8 from 16; by default with --target tensorrt.",
)
@click.option("--points", callback=fractions, default="0.25,0.6", show_default=True, help="Ratios that are measured.")
@click.option(
    "--trial-samples",
    type=click.IntRange(1),
    help="Samples that are run for each; by default what --sensitivity was measured on, else 128.",
)
@click.option(
    "--sensitivity",
    "results",
    type=FILE,
    help="Results of `sensitivity` to start from; what is missing is measured and added.",
)
@click.option("--costs", type=FILE, help="Latency table that `costs` wrote, here or elsewhere.")
@click.option("--no-timing", is_flag=True, help="Trust the table: it was measured on another machine.")
@click.option("-o", "--output", type=FILE, help="Default MODEL.ratios.yaml; - for standard output.")
@dry_run_option
@result_options
def command(
    model: Path,
    macs: float | None,
    params: float | None,
    latency: float | None,
    parts: tuple[str, ...],
    drop_heads: bool,
    target: str,
    tie: bool | None,
    points: tuple[float, ...],
    trial_samples: int | None,
    results: Path | None,
    costs: Path | None,
    no_timing: bool,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Find the ratios for MODEL that fit a budget and hurt the output least.

    Each part of each block is pruned at a few ratios and run on the samples; closed-form losses say how the damage
    grows between and beyond them. The file written is for `prune --ratios`. No labels are needed.
    """
    from toast_onnx_calibration.planning import Budget
    from toast_onnx_calibration.reachable import check_reachable
    from toast_onnx_calibration.sensitivity_results import known
    from toast_onnx_calibration.sensitivity_trials import missing, trial_grid

    given_budgets = {"macs": macs, "params": params, "latency": latency}
    chosen = [Budget(kind, value) for kind, value in given_budgets.items() if value is not None]  # type: ignore[arg-type]
    if is_stream(output) and as_json:
        raise click.UsageError("-o - and --json both print a document; give one of them")
    if len(chosen) != 1:
        raise click.UsageError("give one budget: --macs, --params or --latency")
    parts = _planned_parts(parts, drop_heads)
    if latency is None and (costs is not None or no_timing):
        raise click.UsageError("--costs and --no-timing go with --latency")
    if no_timing and costs is None:
        raise click.UsageError("--no-timing needs a table: give --costs")
    out = output or beside(model, ".ratios.yaml")
    # the two files that a plan may add to are no place for its result either
    check_destinations(
        [*read_files(model), *planning_inputs(given)],
        {"--sensitivity": results, "--costs": costs, "-o": as_file(out)},
        ["--sensitivity", "--costs"],
    )
    planning = gather_planning(given)
    planning = replace(planning, settings=with_ties(planning.settings, target, tie))
    dense = study(load_model(model), planning.shapes)
    check_reachable(dense, planning.settings, chosen[0], parts)
    if dry_run:
        narrow = tuple(p for p in parts if p != TOKENS)
        grid = missing(trial_grid(dense, planning.settings, narrow, points), known(results))
        show_foreseen(dense, planning, parts, grid, as_json, True, trial_samples_for(trial_samples, results))
        return
    kind = chosen[0].kind
    with open_planner(dense, planning, parts, points, results, kind, costs, no_timing, trial_samples) as planner:
        plan = planner.plan(chosen[0])
    if plan.missed:
        say_note(plan.missed)
    if is_stream(out):
        click.echo(plan.yaml(), nl=False)
        return
    plan.save(out)
    if as_json:
        print_json({"ratios_file": str(out), **plan.report()})
    else:
        show_table(plan.table)
        click.echo(f"ratios: {out}")


def _planned_parts(parts: tuple[str, ...], drop_heads: bool) -> tuple[str, ...]:
    """The parts that may shrink, heads with their dimensions unless they are to stay."""
    if not parts or any(p not in (*PARTS, TOKENS) for p in parts):
        raise click.UsageError(f"--parts takes some of {', '.join((TOKENS, *PARTS))}")
    if not drop_heads and "heads" in parts:
        raise click.UsageError("--no-heads contradicts heads in --parts: leave one of them out")
    return (*parts, "heads") if drop_heads and "heads" not in parts and {"qk", "vo"} & set(parts) else parts
