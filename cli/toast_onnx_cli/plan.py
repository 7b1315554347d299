"""`toast-onnx plan`: a budget in, a ratios file out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.errors import ConfigError
from toast_onnx.matching.study import Study, study
from toast_onnx.model import file_hash, load_model
from toast_onnx.planning.cost_table import CostTable, read_table, write_table
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import Ratios, dump_ratios
from toast_onnx.planning.width_costs import PARTS, dense_widths
from toast_onnx_cli.console import format_count, print_json, print_table, progress
from toast_onnx_cli.destinations import check_destinations, read_files
from toast_onnx_cli.numbers import FiniteRange
from toast_onnx_cli.planning_options import (
    Planning,
    Work,
    comma_list,
    counted,
    fractions,
    gather_planning,
    open_trials,
    planning_inputs,
    planning_options,
)

if TYPE_CHECKING:
    from toast_onnx_calibration.costs import Runtime
    from toast_onnx_calibration.planning import Budget

share = FiniteRange(0, 1, min_open=True, max_open=True)


@click.command("plan")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--macs", type=share, help="Multiply-accumulates to keep, as a fraction of the whole model's.")
@click.option("--params", type=share, help="Parameters to keep, as a fraction of the whole model's.")
@click.option("--latency", type=share, help="Latency to keep, as a fraction of the dense model's.")
@planning_options
@click.option(
    "--parts", callback=comma_list, default="qk,vo,fc2", show_default=True, help="What may shrink, besides heads."
)
@click.option(
    "--heads/--no-heads",
    "drop_heads",
    default=True,
    show_default=True,
    help="Whether whole heads may go where qk or vo may shrink.",
)
@click.option("--points", callback=fractions, default="0.25,0.6", show_default=True, help="Ratios that are measured.")
@click.option(
    "--sensitivity",
    "results",
    type=click.Path(path_type=Path),
    help="Results of `sensitivity` to start from; what is missing is measured and added.",
)
@click.option("--costs", type=click.Path(path_type=Path), help="Latency table that `costs` wrote, here or elsewhere.")
@click.option("--no-timing", is_flag=True, help="Trust the table: it was measured on another machine.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Ratios file; default MODEL.ratios.yaml.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(
    model: Path,
    macs: float | None,
    params: float | None,
    latency: float | None,
    parts: tuple[str, ...],
    drop_heads: bool,
    points: tuple[float, ...],
    results: Path | None,
    costs: Path | None,
    no_timing: bool,
    output: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Find the ratios for MODEL that fit a budget and hurt the output least.

    Each part of each block is pruned at a few ratios and run on the samples; closed-form losses say how the damage
    grows between and beyond them. The file written is for `prune --ratios`. No labels are needed.
    """
    from toast_onnx_calibration.planning import Budget

    given_budgets = {"macs": macs, "params": params, "latency": latency}
    chosen = [Budget(kind, value) for kind, value in given_budgets.items() if value is not None]  # type: ignore[arg-type]
    if len(chosen) != 1:
        raise click.UsageError("give one budget: --macs, --params or --latency")
    if not parts or any(p not in PARTS for p in parts):
        raise click.UsageError(f"--parts takes some of {', '.join(PARTS)}")
    if not drop_heads and "heads" in parts:
        raise click.UsageError("--no-heads contradicts heads in --parts: leave one of them out")
    if drop_heads and "heads" not in parts and {"qk", "vo"} & set(parts):
        parts = (*parts, "heads")
    if latency is None and (costs is not None or no_timing):
        raise click.UsageError("--costs and --no-timing go with --latency")
    if no_timing and costs is None:
        raise click.UsageError("--no-timing needs a table: give --costs")
    out = output or model.with_name(f"{model.stem}.ratios.yaml")
    # the two files that a plan may add to are no place for its result either
    check_destinations(
        [*read_files(model), *planning_inputs(given)], {"--sensitivity": results, "--costs": costs, "-o": out}
    )
    planning = gather_planning(given)
    dense = study(load_model(model), planning.shapes)
    table, runtime = (None, None) if latency is None else _costs(dense, planning, parts, costs, no_timing)
    if table is not None:
        parts = _timed(table, parts)
    with open_trials(dense, planning, parts) as work:
        document, ratios = _plan(dense, planning.settings, chosen[0], parts, points, results, table, runtime, work)
    if missed := _missed(document):
        click.echo(f"Note: {missed}", err=True)
    dump_ratios(ratios, out, _comment(document))
    if as_json:
        print_json({"ratios_file": str(out), **document})
    else:
        _print(document, out)


def _costs(
    dense: Study, planning: Planning, parts: tuple[str, ...], path: Path | None, no_timing: bool
) -> tuple[CostTable, Runtime | None]:
    """The table, and what the planned model is timed with; a table that is not there yet is measured and written."""
    from toast_onnx_calibration.costs import measure_costs, onnxruntime_runtime

    table = None
    if path is not None and path.exists():
        table = read_table(path, dense, file_hash(dense.view.model.path))
        if table.runtime.get("program") != "onnxruntime" and not no_timing:
            raise ConfigError(
                f"{path} was measured with {table.runtime.get('program')}; add --no-timing, because a planned model "
                "can be timed with onnxruntime only"
            )
    elif no_timing:
        raise ConfigError(f"{path} does not exist; `toast-onnx costs` writes a cost table")
    if no_timing:
        assert table is not None
        return table, None
    batch = table.batch if table is not None else 1
    running = planning.calibration
    runtime = onnxruntime_runtime(batch, running.threads, running.provider, shapes=planning.shapes)
    if table is None:
        with progress("timing widths") as advance:
            table = measure_costs(dense, runtime, parts, planning.settings.align, progress=counted(advance))  # type: ignore[arg-type]
        if path is not None:
            write_table(table, path)
    return table, runtime


def _timed(table: CostTable, parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts that a table has times for, or all where it has none; says what is left out."""
    known = tuple(part for part in parts if any(each.part == part for each in table.parts))
    if known and known != parts:
        lacking = ", ".join(part for part in parts if part not in known)
        click.echo(
            f"Note: the cost table has no times for {lacking}, which stay as they are; `toast-onnx costs` measures "
            "them into a new table",
            err=True,
        )
    return known or parts


def _plan(
    dense: Study,
    settings: Ratios,
    budget: Budget,
    parts: tuple[str, ...],
    points: tuple[float, ...],
    results: Path | None,
    table: CostTable | None,
    runtime: Runtime | None,
    work: Work,
) -> tuple[dict[str, Any], Ratios]:
    """The plan as plain data, and as ratios."""
    from toast_onnx_calibration.planning import plan_counted, plan_latency, predicted_choices, shares
    from toast_onnx_calibration.sensitivity import identity_of, measure, missing, resume, trial_grid

    metric = "kl" if work.trials.classes else "relative_error"
    found = resume(
        results, identity_of(dense, work.trials, settings, work.statistics), metric, work.trials.dense_top1()
    )
    grid = trial_grid(dense, settings, parts, points)
    with progress("measuring", len(missing(grid, found))) as advance:
        measure(work.trials, work.solver, grid, found, results, counted(advance))
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
    return document, ratios


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


def _print(document: dict[str, Any], out: Path) -> None:
    parts = list(dict.fromkeys(p for kept in document["kept"].values() for p in kept))
    rows = [[b, *(str(kept.get(p, "")) for p in parts)] for b, kept in document["kept"].items()]
    print_table(["block", *parts], rows, title="kept", align=["right"] * (len(parts) + 1))
    reached = document["reached"]
    click.echo(
        "; ".join(
            f"{label} {format_count(reached[kind]['dense'])} -> {format_count(reached[kind]['planned'])} "
            f"({reached[kind]['share']:.3f})"
            for kind, label in (("macs", "MACs"), ("params", "parameters"))
        )
    )
    if "latency" in document and document["latency"]["measured_share"] is not None:
        click.echo(f"latency: {document['latency']['measured_share']:.3f} of the dense model's, measured")
    measured = document["measured"].get("kl", document["measured"].get("relative_error"))
    click.echo(
        f"damage: {document['predicted']['metric']} {document['predicted']['damage']:.4f} predicted"
        + ("" if measured is None else f", {measured:.4f} measured on the samples planned with")
    )
    click.echo(f"ratios: {out}")
