"""`prune` from a goal: a plan for a budget, or the smallest one whose answers are still good enough."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from toast_onnx.errors import BudgetError, ConfigError
from toast_onnx.external import links_followed
from toast_onnx_cli.console import say_note
from toast_onnx_cli.numbers import FiniteRange

BUDGETS = ("macs", "params", "latency")
#: Halvings of the range of multiply-accumulates in which the smallest model is looked for, and where it starts.
STEPS, LEAST = 5, 0.25
#: One of so many samples is held back to judge by: of a plan by its damage, of a result by its agreement.
HELD_FOR_GOAL, HELD = 2, 8

_share = FiniteRange(0, 1, min_open=True, max_open=True)


def goal_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds the options of `gather_goal`."""
    options = (
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
        click.option("--labels", metavar="LABELS", help="For --max-drop: CSV with file and label, or 'folders'."),
        click.option(
            "--sensitivity", type=click.Path(path_type=Path), help="Results of `sensitivity` that plans start from."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True)
class Goal:
    """What a result should be.

    Attributes:
        kind: macs, params, latency, max_drop or max_error.
        value: a fraction of the dense model's, points, or a relative error.
    """

    kind: str
    value: float


def gather_goal(given: Mapping[str, Any], ratios: str | None, data: str | None) -> Goal | None:
    """The goal on the command line; None where a ratios file says what goes.

    Raises:
        click.UsageError: neither, both, or something that a goal needs is missing.
    """
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


def plan_ratios(budget: Goal, model: Path, data: str, out: Path, words: list[str]) -> None:
    """Write a ratios file for a budget, as `toast-onnx plan` does with these words; its tables go to stderr.

    Raises:
        ToastError: as `plan` does.
    """
    from toast_onnx_cli.plan import command as plan

    given = [str(model), "--data", data, f"--{budget.kind}", repr(budget.value), "-o", str(out), "--overwrite", *words]
    given += [] if links_followed() else ["--no-links"]
    parent = click.get_current_context(silent=True)
    with redirect_stdout(sys.stderr), plan.make_context("plan", given, parent=parent) as context:
        plan.invoke(context)


def plan_words(given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], seed: int | None) -> list[str]:
    """What `plan` is told of samples, as it was told to `prune`."""
    options = ("preprocess", "samples", "tokens", "class_weight", "provider", "batch", "threads", "memory", "hold_back")
    words = [] if seed is None else ["--seed", str(seed)]
    for name in options:
        if given[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(given[name])]
    for name, sizes in shapes.items():
        words += ["--shape", f"{name}={'x'.join(map(str, sizes))}"]
    return words


@dataclass(frozen=True)
class Judged:
    """How a model did on samples that were not used for planning.

    Attributes:
        loss: what the goal limits: points, or a relative error.
        text: the same in words, with the interval.
    """

    loss: float
    text: str


def smallest_within(goal: Goal, plan: Callable[[float], None], judge: Callable[[], Judged]) -> tuple[float, Judged]:
    """Find by bisection the least share of the multiply-accumulates at which a model is still good enough.

    Args:
        goal: the largest loss.
        plan: makes the plan of a share the present one.
        judge: prunes by the present plan and measures.

    Returns:
        The share, whose plan is the present one, and how its model did.

    Raises:
        ConfigError: not even the largest model that was tried is good enough.
    """
    low, high = LEAST, 1.0
    best: tuple[float, Judged] | None = None
    nearest: Judged | None = None
    for _ in range(STEPS):
        share = (low + high) / 2
        try:
            plan(share)
        except BudgetError:
            low = share
            continue
        found = judge()
        say_note(f"{share:.3f} of the MACs: {found.text}")
        if found.loss <= goal.value:
            high, best = share, (share, found)
        else:
            low, nearest = share, found
    if best is None:
        seen = f"; the nearest one had {nearest.text}" if nearest is not None else ""
        raise ConfigError(
            f"no model below {high:.2f} of the MACs is within {goal.value:g}{seen}; allow more, or give more samples"
        )
    plan(best[0])
    return best


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` samples."""
    from toast_onnx_calibration.accuracy import wilson

    return wilson(round(share * count), count)


def judge_model(
    goal: Goal,
    dense: Path,
    candidate: Path,
    data: str,
    labels: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    reading: Mapping[str, Any],
) -> Judged:
    """How far a model falls behind the dense one on samples that were held back.

    Args:
        goal: what is limited.
        dense: the model it was made from.
        candidate: the pruned one.
        data: samples.
        labels: for accuracy; None compares answers.
        shapes: concrete input shapes.
        reading: how samples are read, with `hold`.

    Raises:
        ConfigError: the goal speaks of answers, and the outputs are no class scores.
    """
    from toast_onnx_calibration.comparing import compare
    from toast_onnx_calibration.evaluating import evaluate

    if labels is not None:
        before, after = (evaluate(path, data, labels, **reading).accuracy for path in (dense, candidate))
        assert before is not None
        assert after is not None
        low, high = interval(after.top1 / after.samples, after.samples)
        was, now = before.top1 / before.samples, after.top1 / after.samples
        text = (
            f"accuracy {now:.1%} (95 %: {low:.1%} to {high:.1%}), dense {was:.1%}, on {after.samples} held-back samples"
        )
        return Judged(100 * (was - now), text)
    found = compare(dense, candidate, data, rounds=0, shapes=shapes, **reading)
    scores = next((o for o in found.outputs.values() if "top1_agreement" in o), None)
    if goal.kind == "max_error":
        error = max(o["relative_error"] for o in found.outputs.values())
        return Judged(error, f"relative error {error:.3g} on {found.samples} held-back samples")
    if scores is None:
        raise ConfigError(f"{dense}: no output holds class scores, so --max-drop says nothing; use --max-error")
    same = scores["top1_agreement"]
    low, high = interval(same, found.samples)
    text = f"agreement {same:.1%} (95 %: {low:.1%} to {high:.1%}) on {found.samples} held-back samples"
    return Judged(100 * (1 - same), text)
