"""`prune` from a goal: a plan for a budget, or the smallest one whose answers are still good enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.errors import ConfigError
from toast_onnx.matching.study import Study
from toast_onnx.model import save_model
from toast_onnx.planning.ratios import Ratios
from toast_onnx.pruning import prune
from toast_onnx_cli.calibration_options import LABELS_HELP, sample_progress
from toast_onnx_cli.commands import options
from toast_onnx_cli.console import is_quiet, say_note
from toast_onnx_cli.models import FILE
from toast_onnx_cli.numbers import FiniteRange
from toast_onnx_cli.planners import PARTS
from toast_onnx_cli.planning_options import with_ties

if TYPE_CHECKING:
    from toast_onnx_calibration.calibrating import CalibrationOptions
    from toast_onnx_calibration.executing import Executor
    from toast_onnx_calibration.goals import Goal, Judged
    from toast_onnx_calibration.planning import Budget
    from toast_onnx_calibration.plans import Plan, Planner

#: Fewer samples than that are all measured on: too few to spare any.
FEWEST = 64
BUDGETS = ("macs", "params", "latency")
#: One of so many samples is held back to judge by: of a plan by its damage, of a result by its agreement.
HELD_FOR_GOAL, HELD = 2, 8

_share = FiniteRange(0, 1, min_open=True, max_open=True)


#: The options of `gather_goal`.
goal_options = options(
    click.option("--macs", type=_share, help="Plan for this fraction of the multiply-accumulates, not --ratios."),
    click.option("--params", type=_share, help="Plan for this fraction of the parameters."),
    click.option("--latency", type=_share, help="Plan for this fraction of the latency."),
    click.option(
        "--max-drop",
        type=FiniteRange(0, 100),
        metavar="POINTS",
        help="The smallest model that loses at most so many points of agreement, or of accuracy with --labels.",
    ),
    click.option(
        "--max-error",
        type=FiniteRange(0, min_open=True),
        help="The same for outputs that are no class scores: their largest relative error.",
    ),
    click.option("--labels", metavar="LABELS", help=f"For --max-drop: {LABELS_HELP}"),
    click.option("--sensitivity", type=FILE, help="Results of `sensitivity` that plans start from."),
)


def gather_goal(given: Mapping[str, Any], ratios: str | None, data: str | None) -> Goal | None:
    """The goal on the command line; None where a ratios file says what goes.

    Raises:
        click.UsageError: neither, both, or something that a goal needs is missing.
    """
    from toast_onnx_calibration.goals import Goal

    goals = [Goal(k, given[k]) for k in (*BUDGETS, "max_drop", "max_error") if given[k] is not None]
    if len(goals) + (ratios is not None) > 1:
        raise click.UsageError("say what goes once: --ratios, --macs, --params, --latency, --max-drop or --max-error")
    if ratios is None and not goals:
        raise click.UsageError(
            "say what goes: a goal such as --macs 0.6 --data images/, or --ratios FILE, where two lines are enough: "
            "`version: 1` and `attention: {qk: 0.5, vo: 0.5}`"
        )
    if goals and data is None:
        raise click.UsageError(f"--{goals[0].kind.replace('_', '-')} is planned on samples; add --data images/")
    if given["labels"] is not None and not (goals and goals[0].kind == "max_drop"):
        raise click.UsageError("--labels goes with --max-drop")
    return goals[0] if goals else None


def plan_for(planner: Planner, budget: Goal) -> Plan:
    """The plan of a budget, shown on stderr.

    Raises:
        ConfigError: the budget cannot be reached.
    """
    plan = planner.plan(budget_of(budget))
    if plan.missed:
        say_note(plan.missed)
    if not is_quiet():
        click.echo(plan.table.text(), err=True)
    return plan


def budget_of(goal: Goal) -> Budget:
    """A goal that is a budget, as plans know it."""
    from toast_onnx_calibration.planning import Budget

    return Budget(goal.kind, goal.value)  # type: ignore[arg-type]


def refuse_unreachable(dense: Study, settings: Ratios, goal: Goal) -> None:
    """Refuse a budget that no widths reach before anything is measured.

    Raises:
        BudgetError: it cannot be reached; says what can.
    """
    from toast_onnx_calibration.reachable import check_reachable

    if goal.kind in BUDGETS:
        check_reachable(dense, settings, budget_of(goal), PARTS)


def planned_settings(settings: Ratios, compensation: str | None) -> Ratios:
    """What plans are made for: the closed forms alone, because no plan can train."""
    if compensation not in ("none", "bias", "ridge"):
        return settings
    changed = settings.compensation.model_copy(update={"kind": compensation})
    return settings.model_copy(update={"compensation": changed})


@dataclass(frozen=True)
class Asked:
    """What plans are judged on.

    Attributes:
        dense: the model.
        data: samples.
        labels: as for `labels.open_labels`; None judges by agreement.
        options: how samples are read, and how many of them are held back.
        shapes: concrete input shapes.
        target: as for `with_ties`.
        split_shared: as for `prune`.
    """

    dense: Study
    data: str
    labels: str | None
    options: CalibrationOptions
    shapes: Mapping[str, tuple[int, ...]]
    target: str
    split_shared: bool


def holdable(data: str | None, settings: Ratios, given: Mapping[str, Any], wished: int) -> int | None:
    """The wished share of samples to hold back; None where there are too few to spare any."""
    if data is None:
        return None
    from toast_onnx_calibration.sources import count_samples

    count = count_samples(data)
    drawn = min(count or 0, given["samples"] or settings.calibration.samples or count or 0)
    return wished if drawn >= FEWEST else None


def measure_all(
    dense: Study, data: str, path: Path, options: CalibrationOptions, executor: Executor | None = None
) -> Path:
    """Statistics of everything that plans and their weights may need, measured once into a file."""
    from toast_onnx_calibration.calibrating_shards import calibrate_on
    from toast_onnx_calibration.executing import Here

    with sample_progress("calibrating") as show:
        calibrate_on(executor or Here(), dense, data, path, None, options, show)
    return path


def write_plan(
    goal: Goal, asked: Asked, out: Path, folder: Path, planner: Planner, statistics: Path, skip_unprunable: bool
) -> Judged | None:
    """Write the plan of a goal; how it was judged, where the goal is a loss."""
    model = asked.dense.view.model.path
    if goal.kind in BUDGETS:
        plan_for(planner, goal).save(out)
        return None
    from toast_onnx_calibration.goals import Goal, Judged, judge_model, smallest_within
    from toast_onnx_calibration.statistics import CalibratedStatistics

    found, candidate = CalibratedStatistics(asked.dense, statistics), folder / "candidate.onnx"

    def judge(planned: Plan) -> Judged:
        small = prune(
            asked.dense,
            with_ties(planned.ratios, asked.target),
            found,
            check=False,
            skip_unprunable=skip_unprunable,
            seed=asked.options.seed,
            split_shared=asked.split_shared,
            threads=asked.options.threads,
        )
        save_model(small.model, candidate, check=False)
        return judge_model(goal, model, candidate, asked.data, asked.labels, asked.shapes, asked.options)

    def plan(share: float) -> Plan:
        refuse_unreachable(asked.dense, planner.settings, Goal("macs", share))
        return plan_for(planner, Goal("macs", share))

    share, best, judged = smallest_within(goal, plan, judge, say_note)
    best.save(out)
    return Judged(judged.loss, f"{share:.3f} of the MACs, {judged.text}")


def check_judging(goal: Goal, data: str, options: CalibrationOptions) -> None:
    """Refuse a goal that speaks of answers where no samples can be spared to judge by.

    Raises:
        ConfigError: there are too few.
    """
    if goal.kind not in BUDGETS and options.hold < 2:
        raise ConfigError(
            f"{data}: --{goal.kind.replace('_', '-')} is judged on samples that are held back; give {FEWEST} or "
            "more, in a folder or a .npz file"
        )
