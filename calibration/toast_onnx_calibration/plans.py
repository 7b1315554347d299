"""A plan: the ratios that fit a budget, with what was predicted and measured of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toast_onnx.matching.study import Study
from toast_onnx.model import file_hash
from toast_onnx.planning.cost_table import CostTable
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import Ratios, dump_ratios
from toast_onnx.planning.width_costs import dense_widths
from toast_onnx.report.tables import Side, Table, format_count
from toast_onnx_calibration.costs import Runtime
from toast_onnx_calibration.planning import Budget, plan_counted, plan_latency, predicted_choices, shares
from toast_onnx_calibration.sensitivity_trials import Progress, identity_of, measure, missing, resume, trial_grid
from toast_onnx_calibration.work import Work


@dataclass(frozen=True, repr=False)
class Plan:
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
        rows = [[b, *(str(widths.get(p, "")) for p in parts)] for b, widths in kept.items()]
        align: list[Side] = ["right"] * (len(parts) + 1)
        return Table("kept", ("block", *parts), rows, align, tuple(_figures(self.document)))

    def save(self, path: str | Path) -> None:
        """Write a ratios file with what the plan was made from as comments, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
        """
        dump_ratios(self.ratios, path, _comment(self.document))

    def report(self) -> dict[str, Any]:
        """The plan as plain data."""
        return self.document

    def __repr__(self) -> str:
        return self.table.text()

    def _repr_html_(self) -> str:
        return self.table.html()


def make_plan(
    dense: Study,
    settings: Ratios,
    budget: Budget,
    parts: tuple[str, ...],
    points: tuple[float, ...],
    results: Path | None,
    table: CostTable | None,
    runtime: Runtime | None,
    work: Work,
    measuring: Callable[[int], AbstractContextManager[Progress | None]] = lambda _: nullcontext(),
) -> Plan:
    """Measure what is missing and search.

    Args:
        dense: the model.
        settings: selection, scores, compensation and alignment.
        budget: what may be left.
        parts: heads, qk, vo, fc1, fc2.
        points: ratios that are measured.
        results: file of sensitivity results to start from and to add to; None keeps none.
        table: latencies; needed for a budget of latency.
        runtime: what the table was measured with; None where that is elsewhere.
        work: what damages are measured with.
        measuring: opens, for a number of trials, what is called after each.

    Raises:
        ConfigError: the budget cannot be reached.
    """
    metric = "kl" if work.trials.classes else "relative_error"
    found = resume(
        results, identity_of(dense, work.trials, settings, work.statistics), metric, work.trials.dense_top1()
    )
    grid = trial_grid(dense, settings, parts, points)
    with measuring(len(missing(grid, found))) as progress:
        measure(work.trials, work.solver, grid, found, results, progress)
    choices = predicted_choices(dense, settings, work.statistics, found, parts, table)  # type: ignore[arg-type]
    timed = None
    if budget.kind == "latency":
        assert table is not None
        plan, timed = plan_latency(dense, choices, table, budget, runtime)
    else:
        plan = plan_counted(dense, choices, budget)
    widths = [dense_widths(b) for b in dense.match.blocks]
    smaller = {b: {p: k for p, k in kept.items() if k < widths[b][p]} for b, kept in plan.kept.items()}
    new = work.solver.weights({b: kept for b, kept in smaller.items() if kept})
    measured = work.trials.damage(new) if new else {}
    ratios = planned_ratios(settings, plan.kept, widths)
    totals = {"macs": graph_macs(dense.view, dense.counted), "params": graph_params(dense.view)}
    document: dict[str, Any] = {
        "model": dense.view.model.path.name,
        "model_sha256": file_hash(dense.view.model.path),
        "budget": {"kind": budget.kind, "share": budget.share},
        "reached": {
            kind: {"share": part, "dense": totals[kind], "planned": round(part * totals[kind])}
            for kind, part in shares(dense, plan.kept).items()
        },
        "predicted": {"metric": _metric(metric), "damage": plan.damage},
        "measured": measured,
        "samples": len(work.trials.samples.rows),
        "statistics_sha256": work.statistics_sha256,
        "kept": {str(b): dict(kept) for b, kept in plan.kept.items()},
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
