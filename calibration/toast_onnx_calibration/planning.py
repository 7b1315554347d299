"""From measured sensitivity to widths within a budget: multiply-accumulates, parameters, or latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

import numpy as np

from toast_onnx.choosing.at_once import blocks_at_once
from toast_onnx.choosing.losses import loss_curves
from toast_onnx.errors import ConfigError
from toast_onnx.importance.scores import ffn_score
from toast_onnx.importance.statistics import Statistics
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study
from toast_onnx.model import save_model
from toast_onnx.planning.cost_table import CostTable
from toast_onnx.planning.macs import graph_macs, graph_params, node_macs
from toast_onnx.planning.prediction import damage_curve
from toast_onnx.planning.ratios import Ratios, resolve
from toast_onnx.planning.search import (
    Found,
    Group,
    Kept,
    PartChoice,
    aligned_widths,
    combinations,
    group_choices,
    joined,
    search,
)
from toast_onnx.planning.width_costs import (
    PARTS,
    Counted,
    Part,
    Resource,
    dense_widths,
    prunable_widths,
    width_cost,
    width_cost_at,
    width_step,
)
from toast_onnx.planning.widths import fused_head_dim
from toast_onnx.threads import shared_work
from toast_onnx_calibration.costs import Runtime, no_smaller_width, variant
from toast_onnx_calibration.needs import GRADIENT, Wanted, everything
from toast_onnx_calibration.sensitivity_results import Sensitivity

P = TypeVar("P")
BudgetKind = Literal["macs", "params", "latency"]
#: Fractions removed at which every part of every block is measured.
POINTS = (0.25, 0.6)
#: Samples that this is measured on unless told otherwise; the plan itself is judged on all.
TRIAL_SAMPLES = 128
#: A latency that was measured this close to the budget is met.
TOLERANCE = 0.03
#: Rounds of measuring a planned model and correcting the budget for what the table did not see.
ROUNDS = 5

_STATISTICS: dict[Part, str] = {"heads": "context", "qk": "qk", "vo": "context", "fc1": "inputs", "fc2": "hidden"}


@dataclass(frozen=True)
class Budget:
    """What may be left.

    Attributes:
        kind: macs, params or latency.
        share: of the whole dense model, above 0 and below 1.
    """

    kind: BudgetKind
    share: float


@dataclass(frozen=True)
class LatencyCheck:
    """A planned model timed in turns with the dense one.

    Attributes:
        share: planned over dense latency.
        dense_milliseconds: latency of the dense model in the same rounds.
        rounds: how often the plan was corrected before.
    """

    share: float
    dense_milliseconds: float
    rounds: int

    def meets(self, budget: Budget) -> bool:
        """Whether the planned model is as fast as asked, within `TOLERANCE`; a faster one is, too."""
        return self.share <= budget.share * (1 + TOLERANCE)


def statistics_for(study: Study, settings: Ratios, parts: Sequence[Part]) -> Wanted:
    """The statistics that solving and predicting need for some parts of all blocks."""
    names = {_STATISTICS[part] for part in parts}
    scores = [settings.ffn.score, *(o.ffn.score for o in settings.blocks if o.ffn.score is not None)]
    by_tokens = any(ffn_score(score).needs == "tokens" for score in scores)
    names |= {part for part in parts if part in ("fc1", "fc2") and by_tokens}
    by_gradients = any(ffn_score(score).needs == "gradients" for score in scores)
    names |= {GRADIENT} if "fc2" in parts and by_gradients else set()
    return everything(study, names)


def check_settings(settings: Ratios) -> None:
    """Refuse settings that a plan cannot speak of.

    Raises:
        ConfigError: channels chosen at run time, sequential statistics, or the paper's rounding.
    """
    if settings.ffn.mode == "runtime" or any(o.ffn.mode == "runtime" for o in settings.blocks):
        raise ConfigError("ffn.mode: runtime leaves the graph's widths as they are; plan with mode: static")
    if settings.compensation.statistics == "sequential":
        raise ConfigError(
            "plans are made from one-shot statistics: leave compensation.statistics: sequential out here, and put it "
            "into the planned file for prune"
        )
    if settings.rounding == "paper":
        raise ConfigError("rounding: paper belongs to the published schedules; leave it out to plan aligned widths")


def predicted_choices(
    study: Study,
    settings: Ratios,
    statistics: Statistics,
    found: Sensitivity,
    parts: Sequence[Part] = ("qk", "vo", "fc2"),
    table: CostTable | None = None,
    threads: int | None = None,
) -> list[PartChoice]:
    """What each part may keep, with the damage predicted from its losses and measured points.

    Args:
        study: the dense model.
        settings: selection, compensation and alignment.
        statistics: of the dense model.
        found: measured points; a part without any stays dense.
        parts: what may shrink.
        table: only widths it knows are offered; None offers all aligned ones.
        threads: that look at blocks; None takes `OMP_NUM_THREADS`, or one a core.

    Raises:
        ConfigError: there is no choice at all; the message says why.
    """
    blocks = study.match.blocks
    resolved = resolve(settings, [b.name for b in blocks], [b.node_names for b in blocks])

    def offered_by(block: Block) -> list[PartChoice]:
        widths, setting, choices = prunable_widths(block), resolved[block.index], []
        measured = {p: found.measured(block.index, p) for p in PARTS if p in parts and p in widths}
        present: list[Part] = [part for part, points in measured.items() if points]
        tied: set[Part] = {"qk", "vo"} if _ties(settings, block) else set()
        if not tied <= set(present):  # one of them stays dense, and so the other does
            present = [part for part in present if part not in tied]
        curves = loss_curves(study, block, present, setting, settings.compensation.kind, statistics)
        for part in present:
            offered = aligned_widths(widths[part], width_step(block, part, settings.align))
            if table is not None:
                offered = tuple(k for k in offered if k in table.widths(block.index, part))
            if part in tied:
                offered = tuple(k for k in offered if k in (widths[part], fused_head_dim(k)))
            if len(offered) > 1:
                damage = damage_curve(curves[part], measured[part])
                damages = tuple(float(damage[k]) for k in offered)
                choices.append(PartChoice(block.index, part, offered, damages, part in tied))
        return choices

    choices = list(chain.from_iterable(shared_work(offered_by, blocks, threads, blocks_at_once(study))))
    if not choices:
        raise ConfigError(_why_no_choice(study, settings, found, parts))
    return choices


def _ties(settings: Ratios, block: Block) -> bool:
    """Whether Q/K and V/Proj of a block keep the same width, as `widths.tied_head_dims` says it."""
    a = block.attention
    return settings.attention.tie and a is not None and a.qk_dim == a.vo_dim


def _why_no_choice(study: Study, settings: Ratios, found: Sensitivity, parts: Sequence[Part]) -> str:
    """What left every part with its dense width alone: the graph, the alignment, the measured points or the table."""
    blocks = study.match.blocks
    if settings.attention.tie and not {"fc1", "fc2", "heads"} & set(parts) and len({"qk", "vo"} & set(parts)) == 1:
        return "no part can shrink: heads are tied, and qk and vo keep one width; plan both of them"
    if (reason := no_smaller_width(blocks, parts, settings.align)) is not None:
        return reason
    if not any(found.measured(block.index, part) for block in blocks for part in parts):
        return (
            "no part was measured at a smaller width: at this alignment the ratios tried round to the dense ones; "
            "measure at larger ratios (plan --points), or lower the alignment"
        )
    return (
        "no part has both a measured damage and a smaller width that the alignment and the cost table share; measure "
        "the table with the alignment of the plan"
    )


def counted_groups(
    study: Study, choices: Sequence[PartChoice], resource: Resource, macs: Counted | None = None
) -> tuple[list[Group], float]:
    """Groups for a budget of multiply-accumulates or parameters, and the dense model's total.

    Args:
        study: the dense model.
        choices: what the parts may keep.
        resource: `macs` or `params`.
        macs: of every node, where tokens are merged; None takes those of the dense model.
    """
    blocks = study.match.blocks
    nodes = macs or (lambda i: node_macs(study.view, study.counted, i))
    costs = {b.index: width_cost_at(study.view, nodes, b, resource) for b in blocks}
    dense = {b.index: dense_widths(b) for b in blocks}
    total = graph_macs(study.view, study.counted) if resource == "macs" else graph_params(study.view)
    return group_choices(choices, costs, dense), float(total)


def latency_groups(
    choices: Sequence[PartChoice], table: CostTable, tokens: Mapping[int, float] | None = None
) -> tuple[list[Group], float]:
    """Groups for a budget of milliseconds (what an option saves is a negative cost), and the dense model's total.

    Args:
        choices: what the parts may keep.
        table: measured costs.
        tokens: block number -> share of its work that is left where tokens are merged; a width saves as much less.
    """
    groups, left = [], tokens or {}
    for members in joined(choices):
        block, parts = members[0].block, tuple(m.part for m in members)
        widths, damages = combinations(members)
        part_of = left.get(block, 1.0)
        costs = [-part_of * table.saved_together(block, dict(zip(parts, map(int, row), strict=True))) for row in widths]
        groups.append(Group(block, parts, widths, np.array(costs), damages))
    return groups, table.dense_milliseconds


def plan_counted(study: Study, choices: Sequence[PartChoice], budget: Budget) -> Found:
    """Kept counts within a budget of multiply-accumulates or parameters.

    Raises:
        ConfigError: the budget cannot be reached.
    """
    assert budget.kind != "latency"
    groups, total = counted_groups(study, choices, budget.kind)
    return search(groups, budget.share, total, budget.kind)


def plan_latency(
    study: Study, choices: Sequence[PartChoice], table: CostTable, budget: Budget, runtime: Runtime | None
) -> tuple[Found, LatencyCheck | None]:
    """Kept counts within a budget of latency; where it can be measured here, corrected until the model meets it.

    A table adds up parts that were measured one at a time. What it gets wrong is measured on the planned model itself,
    and the next plan aims that much lower or higher. Where no round meets the budget, the nearest plan is
    returned, and its `LatencyCheck.meets` says so.

    Args:
        study: the dense model.
        choices: what the parts may keep.
        table: measured costs.
        budget: the latency that may be left.
        runtime: what the table was measured with; None where that is on another machine.

    Raises:
        ConfigError: the budget cannot be reached.
    """
    groups, total = latency_groups(choices, table)

    def plan_at(aim: float) -> Found:
        return search(groups, aim, total, "latency")

    if runtime is None:
        return plan_at(budget.share), None
    return meet_latency(plan_at, lambda found, rounds: time_plan(study, found.kept, runtime, rounds), budget)


def meet_latency(
    plan_at: Callable[[float], P], clock: Callable[[P, int], LatencyCheck], budget: Budget
) -> tuple[P, LatencyCheck]:
    """Plan, time the plan, and aim lower or higher until the measured latency is what was asked for.

    Args:
        plan_at: the plan for a share of the latency as the table sees it.
        clock: measures a plan; told how many were measured before.
        budget: the latency that may be left.

    Returns:
        The nearest plan of all rounds, one that meets the budget before any that does not.

    Raises:
        ConfigError: the budget cannot be reached.
    """
    found, aim = plan_at(budget.share), budget.share
    best: tuple[tuple[bool, float], P, LatencyCheck] | None = None
    for number in range(ROUNDS):
        check = clock(found, number)
        miss = abs(check.share / budget.share - 1)
        rank = (not check.meets(budget), miss)
        if best is None or rank < best[0]:
            best = (rank, found, check)
        if miss <= TOLERANCE:
            break
        # The saving, not the latency, is what the table scales: aim so that the observed saving comes out right.
        gained = max(1 - check.share, 1e-3) / max(1 - aim, 1e-3)
        aim = 1 - (1 - budget.share) / gained
        try:
            found = plan_at(aim)
        except ConfigError:
            break
    assert best is not None
    return best[1], best[2]


def time_plan(
    study: Study,
    kept: Kept,
    runtime: Runtime,
    rounds: int = 0,
    removed: Mapping[int, int] | None = None,
    settings: Ratios | None = None,
) -> LatencyCheck:
    """Latency of the model at some kept counts as a share of the dense model's, measured now.

    Args:
        study: the dense model.
        kept: block number -> part -> kept count.
        runtime: what to measure with.
        rounds: how often the plan was corrected before.
        removed: block number -> tokens merged away behind its attention.
        settings: whose way of merging tokens is taken; None for the default.
    """
    with TemporaryDirectory(prefix="toast-plan-") as name:
        path = Path(name) / "planned.onnx"
        save_model(variant(study, kept, removed, settings), path, check=False)
        dense, planned = runtime.timer([study.view.model.path, path])
    return LatencyCheck(planned / dense, dense, rounds)


def shares(study: Study, kept: Kept) -> dict[str, float]:
    """Multiply-accumulates and parameters at some kept counts, as shares of the dense model's."""
    found: dict[str, float] = {}
    resource: Resource
    for resource, total in (
        ("macs", graph_macs(study.view, study.counted)),
        ("params", graph_params(study.view)),
    ):
        removed = 0.0
        for block in study.match.blocks:
            cost, dense = width_cost(study.view, study.counted, block, resource), dense_widths(block)
            removed += cost.at(dense) - cost.at({**dense, **kept.get(block.index, {})})
        found[resource] = 1 - removed / total
    return found
