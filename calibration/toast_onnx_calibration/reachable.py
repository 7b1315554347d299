"""Budgets that no widths reach, told before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import Ratios
from toast_onnx.planning.search import PartChoice, aligned_widths
from toast_onnx.planning.width_costs import TOKENS, prunable_widths, width_step
from toast_onnx.tokens.points import study_tokens
from toast_onnx_calibration.planning import Budget, plan_counted


def check_reachable(study: Study, settings: Ratios, budget: Budget, parts: Sequence[str]) -> None:
    """Refuse a budget that the narrowest widths are above; the least is known from the widths alone.

    Says nothing of latency, which is measured, nor of multiply-accumulates where merging tokens may save some, too.

    Args:
        study: the dense model.
        settings: their alignment counts.
        budget: what may be left.
        parts: what may shrink.

    Raises:
        BudgetError: says what the least is.
    """
    merges = TOKENS in parts and any(point.reason is None for point in study_tokens(study).points)
    if budget.kind == "latency" or (budget.kind == "macs" and merges):
        return
    choices = []
    for block in study.match.blocks:
        for part, width in prunable_widths(block).items():
            offered = aligned_widths(width, width_step(block, part, settings.align))
            if part in parts and len(offered) > 1:
                choices.append(PartChoice(block.index, part, offered, tuple(0.0 for _ in offered)))
    if choices:
        plan_counted(study, choices, budget)
