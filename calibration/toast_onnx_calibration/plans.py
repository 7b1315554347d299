"""A plan: the ratios that fit a budget, with what was predicted and measured of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toast_onnx.errors import ConfigError
from toast_onnx.matching.study import Study, study
from toast_onnx.model import Model, file_hash
from toast_onnx.planning.cost_table import CostTable
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import Ratios, dump_ratios, format_ratios
from toast_onnx.planning.search import Found, PartChoice
from toast_onnx.planning.width_costs import TOKENS, Part, dense_widths
from toast_onnx.pruning import merge_tokens
from toast_onnx.report.tables import Shown, Side, Table, format_count
from toast_onnx.rewriting.rewrite import rewritten
from toast_onnx.tokens.points import study_tokens
from toast_onnx.tokens.schedule import exact_shares
from toast_onnx_calibration.costs import Runtime
from toast_onnx_calibration.planning import (
    Budget,
    LatencyCheck,
    meet_latency,
    plan_counted,
    plan_latency,
    predicted_choices,
    shares,
    time_plan,
)
from toast_onnx_calibration.sensitivity_results import resume
from toast_onnx_calibration.sensitivity_trials import Progress, measure, missing, trial_grid
from toast_onnx_calibration.token_planning import (
    FINALISTS,
    CountedPrices,
    Prices,
    Schedule,
    TimedPrices,
    Together,
    TokenTrials,
    check_merging,
    explore,
    open_token_trials,
    plan_together,
    reachable,
    trials_needed,
)
from toast_onnx_calibration.work import Work


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Ratios that fit a budget; `prune` takes it as it takes ratios.

    Attributes:
        ratios: for every block.
        document: what was asked for, predicted and measured, as plain data.
    """

    ratios: Ratios
    document: dict[str, Any]

    @property
    def missed(self) -> str | None:
        """By how much a measured latency budget is missed; None where it is not, or was not measured."""
        return _missed(self.document)

    @property
    def table(self) -> Table:
        """Kept counts of every block, costs and damages."""
        kept = self.document["kept"]
        parts = list(dict.fromkeys(p for widths in kept.values() for p in widths))
        left = (self.document["tokens"] or {}).get("left", {})
        columns = ("block", *parts, *(("tokens left",) if left else ()))
        rows = []
        for b in dict.fromkeys((*kept, *left)):
            row = [b, *(str(kept.get(b, {}).get(p, "")) for p in parts)]
            rows.append([*row, str(left.get(b, ""))] if left else row)
        align: list[Side] = ["right"] * len(columns)
        return Table("kept", columns, rows, align, tuple(_figures(self.document)))

    def save(self, path: str | Path) -> None:
        """Write a ratios file with what the plan was made from as comments, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
        """
        dump_ratios(self.ratios, path, _comment(self.document))

    def yaml(self) -> str:
        """The text of that file."""
        return format_ratios(self.ratios, _comment(self.document))

    def report(self) -> dict[str, Any]:
        """The plan as plain data."""
        return self.document


@dataclass(frozen=True)
class Planner:
    """Plans for any number of budgets from the same measurements; what it says of one does not depend on the others.

    Attributes:
        dense: the model.
        settings: selection, scores, compensation and alignment.
        parts: heads, qk, vo, fc1, fc2, and tokens, which take part in a budget of multiply-accumulates, and in one of
            latency where the table has times for them; merging removes no parameters.
        points: ratios that are measured.
        results: file of sensitivity results to start from and to add to; None keeps none.
        table: latencies; needed for a budget of latency.
        runtime: what the table was measured with; None where that is elsewhere.
        work: what damages are measured with.
        measuring: opens, for a number of trials, what is called after each.
    """

    dense: Study
    settings: Ratios
    parts: tuple[str, ...]
    points: tuple[float, ...]
    results: Path | None
    table: CostTable | None
    runtime: Runtime | None
    work: Work
    measuring: Callable[[int], AbstractContextManager[Progress | None]] = lambda _: nullcontext()

    @cached_property
    def choices(self) -> list[PartChoice]:
        """What every part may keep, with damages, after measuring what is missing; empty without widths."""
        narrow = tuple(p for p in self.parts if p != TOKENS)
        if not narrow:
            return []
        return _choices(
            self.dense,
            self.settings,
            narrow,
            self.points,
            self.results,
            self.table,
            self.work,
            self.metric,
            self.measuring,
        )

    @cached_property
    def tokens(self) -> TokenTrials | None:
        """What measures merging; None where it is not asked for or not possible."""
        return (
            open_token_trials(self.dense, self.settings, self.work.trials, self.work.merged)
            if TOKENS in self.parts
            else None
        )

    @property
    def metric(self) -> str:
        """The damage that adds up."""
        return "kl" if self.work.trials.classes else "relative_error"

    def plan(self, budget: Budget) -> Plan:
        """Measure what is missing and search.

        Args:
            budget: what may be left.

        Raises:
            ConfigError: the budget cannot be reached.
        """
        dense, settings, work, table, choices = self.dense, self.settings, self.work, self.table, self.choices
        metric = self.metric
        widths = [dense_widths(b) for b in dense.match.blocks]
        line = table.merged_line() if table is not None and budget.kind == "latency" else None
        tokens = self.tokens if budget.kind == "macs" or line is not None else None
        if not choices and tokens is None:
            raise ConfigError(_nothing(dense, self.parts, budget))
        schedule, timed = None, None
        if tokens is not None:
            tokens = tokens.afresh()
            prices: Prices = CountedPrices(dense, tokens.macs)
            if table is not None and line is not None:
                prices = TimedPrices(dense, tokens.macs, table, line)
            finalists, timed = _together(dense, settings, choices, budget, tokens, prices, self.runtime, self.measuring)
            judged = [_measured(dense, settings, widths, f.widths, f.schedule, tokens, work) for f in finalists]
            best = min(range(len(finalists)), key=lambda k: judged[k].damage[metric])
            plan, schedule, predicted = finalists[best].widths, finalists[best].schedule, finalists[best].damage
            found = judged[best]
        else:
            if budget.kind == "latency":
                assert table is not None
                plan, timed = plan_latency(dense, choices, table, budget, self.runtime)
            else:
                plan = plan_counted(dense, choices, budget)
            predicted = plan.damage
            found = _measured(dense, settings, widths, plan, None, None, work)
        ratios, measured = found.ratios, found.damage
        reached = shares(dense, plan.kept) | found.shares
        totals = {"macs": graph_macs(dense.view, dense.counted), "params": graph_params(dense.view)}
        document: dict[str, Any] = {
            "model": dense.view.model.path.name,
            "model_sha256": file_hash(dense.view.model.path),
            "budget": {"kind": budget.kind, "share": budget.share},
            "reached": {
                kind: {"share": part, "dense": totals[kind], "planned": round(part * totals[kind])}
                for kind, part in reached.items()
            },
            "predicted": {"metric": _metric(metric), "damage": predicted},
            "measured": measured,
            "samples": len(work.judge.samples.rows),
            "trial_samples": len(work.trials.samples.rows),
            "statistics_sha256": None if work.narrowing is None else work.narrowing.sha256,
            "kept": {str(b): dict(kept) for b, kept in plan.kept.items()},
            "tokens": None if schedule is None or tokens is None else _tokens(tokens, schedule),
            "ratios": ratios.to_document(),
        }
        if table is not None:
            document["latency"] = {
                "predicted_share": plan.cost / table.dense_milliseconds,
                "measured_share": None if timed is None else timed.share,
                "met": None if timed is None else timed.meets(budget),
                "dense_milliseconds": table.dense_milliseconds if timed is None else timed.dense_milliseconds,
                "runtime": table.runtime,
                "batch": table.batch,
            }
        return Plan(ratios, document)


def _together(
    dense: Study,
    settings: Ratios,
    choices: list[PartChoice],
    budget: Budget,
    tokens: TokenTrials,
    prices: Prices,
    runtime: Runtime | None,
    measuring: Callable[[int], AbstractContextManager[Progress | None]],
) -> tuple[list[Together], LatencyCheck | None]:
    """Plans of tokens and widths to judge; where latency can be measured here, the one that meets it."""
    if not choices:
        check_merging(tokens, budget.share, prices)
    aim = max(prices.macs(budget.share), reachable(tokens)) if choices else prices.macs(budget.share)
    with measuring(trials_needed(tokens)) as progress:
        surface = explore(tokens, aim, progress)
    if budget.kind != "latency" or runtime is None:
        return plan_together(choices, budget.share, tokens, surface, prices)[:FINALISTS], None

    def plan_at(share: float) -> Together:
        return plan_together(choices, share, tokens, surface, prices)[0]

    def clock(found: Together, rounds: int) -> LatencyCheck:
        removed = found.schedule.removed if found.schedule else {}
        return time_plan(dense, found.widths.kept, runtime, rounds, removed, settings)

    plan, timed = meet_latency(plan_at, clock, budget)
    return [plan], timed


@dataclass(frozen=True)
class _Measured:
    """A plan tried whole.

    Attributes:
        ratios: that make it.
        damage: measure -> value; empty where nothing is removed.
        shares: costs counted on the graph, where tokens are merged or queries are learned.
    """

    ratios: Ratios
    damage: dict[str, float]
    shares: dict[str, float]


def _choices(
    dense: Study,
    settings: Ratios,
    parts: tuple[str, ...],
    points: tuple[float, ...],
    results: Path | None,
    table: CostTable | None,
    work: Work,
    metric: str,
    measuring: Callable[[int], AbstractContextManager[Progress | None]],
) -> list[PartChoice]:
    """What every part may keep, with damages, after measuring what is missing."""
    assert work.narrowing is not None
    found = resume(results, work.identity(), metric, work.trials.dense_top1())
    grid = trial_grid(dense, settings, parts, points)
    with measuring(len(missing(grid, found))) as progress:
        measure(work.damages, grid, found, results, progress, work.left)
    statistics, threads = work.narrowing.statistics, work.narrowing.solver.threads
    return predicted_choices(dense, settings, statistics, found, parts, table, threads)  # type: ignore[arg-type]


def _measured(
    dense: Study,
    settings: Ratios,
    widths: list[dict[Part, int]],
    plan: Found,
    schedule: Schedule | None,
    tokens: TokenTrials | None,
    work: Work,
) -> _Measured:
    """Everything a plan removes, removed together and run on the samples."""
    smaller = {b: {p: k for p, k in kept.items() if k < widths[b][p]} for b, kept in plan.kept.items()}
    smaller = {b: kept for b, kept in smaller.items() if kept}
    new = work.narrowing.solver.weights(smaller) if smaller and work.narrowing is not None else {}
    if schedule is None or tokens is None:
        # what only made learned queries goes with them, and no width says so
        counted = _left(dense, rewritten(dense, new)) if new and dense.learned else {}
        return _Measured(planned_ratios(settings, plan.kept, widths), work.judge.damage(new) if new else {}, counted)
    ratios = planned_ratios(settings, plan.kept, widths, exact_shares(tokens.tokens, schedule.removed))
    _, merged, _ = merge_tokens(dense, rewritten(dense, new) if new else dense.source, ratios)
    return _Measured(ratios, work.judge.damage_of(merged), _left(dense, merged))


def _left(dense: Study, smaller: Model) -> dict[str, float]:
    """Shares of multiply-accumulates and parameters that a model has of the dense one's."""
    look = study(smaller, dense.counted_shapes)
    return {
        "macs": graph_macs(look.view, look.counted) / graph_macs(dense.view, dense.counted),
        "params": graph_params(look.view) / graph_params(dense.view),
    }


def _tokens(tokens: TokenTrials, schedule: Schedule) -> dict[str, Any]:
    """What becomes of the tokens, for the document."""
    left: dict[str, int] = {}
    for tower in tokens.macs.towers:
        counts = tower.counts(schedule.removed)
        left |= {str(p.block): counts.left(stage + 1) for stage, p in enumerate(tower.points)}
    return {
        "entering": [tower.sequence.count for tower in tokens.macs.towers],
        "removed": {str(b): r for b, r in sorted(schedule.removed.items())},
        "left": left,
        "macs_share": schedule.macs / tokens.macs.dense,
    }


def _nothing(dense: Study, parts: tuple[str, ...], budget: Budget) -> str:
    """Why a plan has nothing to choose."""
    if parts == (TOKENS,) and budget.kind == "params":
        return "merging tokens removes no parameters; plan it with --macs or --latency, or give widths in --parts"
    if parts == (TOKENS,) and budget.kind == "latency" and study_tokens(dense).mergeable:
        return "the cost table has no times with merged tokens, or merging is not faster here; give widths in --parts"
    reasons = dict.fromkeys(p.reason for p in study_tokens(dense).points if p.reason)
    return f"tokens cannot be merged in this model: {next(iter(reasons), 'it has no blocks')}; give widths in --parts"


def _metric(metric: str) -> str:
    return metric if metric == "kl" else f"{metric} squared"


def _missed(document: dict[str, Any]) -> str | None:
    """By how much a measured plan misses its latency budget; None where it does not, or was not measured."""
    latency = document.get("latency", {})
    if latency.get("met") is not False:
        return None
    return (
        f"the latency budget of {document['budget']['share']:g} is missed: the planned model takes "
        f"{latency['measured_share']:.3f} of the dense model's latency, the best of all corrections; "
        "plan more parts, or lower the alignment"
    )


def _comment(document: dict[str, Any]) -> str:
    """What the plan was made for and from, for the head of the ratios file."""
    budget, predicted = document["budget"], document["predicted"]
    lines = [
        f"planned for {document['model']} (sha256 {document['model_sha256']})",
        f"budget: --{budget['kind']} {budget['share']:g}",
        *(
            f"{kind}: {entry['planned']} of {entry['dense']} ({entry['share']:.4f})"
            for kind, entry in document["reached"].items()
        ),
    ]
    if "latency" in document:
        latency = document["latency"]
        measured = latency["measured_share"]
        lines.append(
            f"latency: {latency['predicted_share']:.3f} of dense by the table, "
            + ("not measured here" if measured is None else f"{measured:.3f} measured")
            + f" ({latency['runtime'].get('program')}, batch {latency['batch']})"
        )
    if missed := _missed(document):
        lines.append(missed)
    lines.append(f"predicted damage: {predicted['metric']} {predicted['damage']:.4f}, the sum over parts")
    if document["measured"]:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in document["measured"].items())
        lines.append(f"measured together on the {document['samples']} samples planned with: {figures}")
    if document["statistics_sha256"] is not None:
        lines.append(f"statistics: sha256 {document['statistics_sha256']}")
    return "\n".join(lines)


def _figures(document: dict[str, Any]) -> list[str]:
    """Costs and damages, a line each."""
    reached = document["reached"]
    lines = [
        "; ".join(
            f"{label} {format_count(reached[kind]['dense'])} -> {format_count(reached[kind]['planned'])} "
            f"({reached[kind]['share']:.3f})"
            for kind, label in (("macs", "MACs"), ("params", "parameters"))
        )
    ]
    if "latency" in document and document["latency"]["measured_share"] is not None:
        lines.append(f"latency: {document['latency']['measured_share']:.3f} of the dense model's, measured")
    measured = document["measured"].get("kl", document["measured"].get("relative_error"))
    lines.append(
        f"damage: {document['predicted']['metric']} {document['predicted']['damage']:.4f} predicted"
        + ("" if measured is None else f", {measured:.4f} measured on the samples planned with")
    )
    return lines
