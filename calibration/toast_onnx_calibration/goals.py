"""Goals that speak of answers: the smallest model whose answers on samples that were held back are good enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from toast_onnx.errors import BudgetError, ConfigError
from toast_onnx_calibration.accuracy import wilson
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.comparing import compare
from toast_onnx_calibration.evaluating import evaluate
from toast_onnx_calibration.prepared import Note, silent

#: Halvings of the range of multiply-accumulates in which the smallest model is looked for, and where it starts.
STEPS, LEAST = 5, 0.25

P = TypeVar("P")


@dataclass(frozen=True)
class Goal:
    """What a result should be.

    Attributes:
        kind: macs, params, latency, max_drop or max_error.
        value: a fraction of the dense model's, points, or a relative error.
    """

    kind: str
    value: float


@dataclass(frozen=True)
class Judged:
    """How a model did on samples that were not used for planning.

    Attributes:
        loss: what the goal limits: points, or a relative error.
        text: the same in words, with the interval.
    """

    loss: float
    text: str


def smallest_within(
    goal: Goal, plan: Callable[[float], P], judge: Callable[[P], Judged], note: Note = silent
) -> tuple[float, P, Judged]:
    """Find by bisection the least share of the multiply-accumulates at which a model is still good enough.

    Args:
        goal: the largest loss.
        plan: the plan of a share.
        judge: prunes by a plan and measures.
        note: told how each model that was tried did.

    Returns:
        The share, its plan, and how its model did.

    Raises:
        ConfigError: not even the largest model that was tried is good enough.
    """
    low, high = LEAST, 1.0
    best: tuple[float, P, Judged] | None = None
    nearest: Judged | None = None
    for _ in range(STEPS):
        share = (low + high) / 2
        try:
            planned = plan(share)
        except BudgetError:
            low = share
            continue
        found = judge(planned)
        note(f"{share:.3f} of the MACs: {found.text}")
        if found.loss <= goal.value:
            high, best = share, (share, planned, found)
        else:
            low, nearest = share, found
    if best is None:
        seen = f"; the nearest one had {nearest.text}" if nearest is not None else ""
        raise ConfigError(
            f"no model below {high:.2f} of the MACs is within {goal.value:g}{seen}; allow more, or give more samples"
        )
    return best


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` samples."""
    return wilson(round(share * count), count)


def judge_model(
    goal: Goal,
    dense: Path,
    candidate: Path,
    data: str,
    labels: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    options: CalibrationOptions,
) -> Judged:
    """How far a model falls behind the dense one on samples that were held back.

    Args:
        goal: what is limited.
        dense: the model it was made from.
        candidate: the pruned one.
        data: samples.
        labels: for accuracy; None compares answers.
        shapes: concrete input shapes.
        options: how samples are read; those it holds back count.

    Raises:
        ConfigError: the goal speaks of answers, and the outputs are no class scores.
    """
    reading: dict[str, Any] = {
        "preprocess": options.preprocess,
        "samples": options.samples,
        "seed": options.seed,
        "hold": options.hold,
        "threads": options.threads,
    }
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
