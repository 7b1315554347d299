"""`toast-onnx sweep`: one model at several sizes, measured once; a table and a page at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.errors import ConfigError, ToastError
from toast_onnx.files import write_bytes
from toast_onnx.matching.study import Study, study
from toast_onnx.model import file_hash, load_model
from toast_onnx.planning.presets import read_ratios
from toast_onnx.planning.ratios import Ratios
from toast_onnx.planning.strict_json import read_json
from toast_onnx.wellformed import blame_model
from toast_onnx_cli.calibration_options import DATA_HELP, calibration_options, gather_options
from toast_onnx_cli.collections import can_draw, collection_options, show_collection, write_collection_page
from toast_onnx_cli.commands import toast_command
from toast_onnx_cli.console import say_note
from toast_onnx_cli.destinations import check_destinations, is_overwriting, read_files, result_options
from toast_onnx_cli.goals import HELD, holdable, measure_all, plan_for, planned_settings, refuse_unreachable
from toast_onnx_cli.models import FILE, MODEL, beside
from toast_onnx_cli.planners import open_planner
from toast_onnx_cli.planning_options import Planning, fractions, target_option, with_ties
from toast_onnx_cli.prune_run import Job, run_job
from toast_onnx_cli.shapes import shape_option
from toast_onnx_cli.solving import solve_on_option
from toast_onnx_cli.workers import open_executor, workers_option

if TYPE_CHECKING:
    from toast_onnx_calibration.calibrating import CalibrationOptions
    from toast_onnx_calibration.goals import Goal

FORMAT = "toast-onnx/sweep/1"
_MOST_BYTES = 1 << 20


def _shares(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    return tuple(dict.fromkeys(fractions(ctx, param, value))) if value is not None else ()


@toast_command("sweep", "sweep model.onnx --macs 0.8,0.6 --data images/")
@click.argument("model", type=MODEL)
@click.option("--macs", callback=_shares, metavar="SHARES", help="Multiply-accumulates to keep, such as 0.8,0.6,0.5.")
@click.option("--params", callback=_shares, metavar="SHARES", help="Parameters to keep, instead.")
@click.option("--data", required=True, metavar="DATA", help=DATA_HELP)
@click.option("-o", "--output", type=FILE, help="Folder; default MODEL.sweep.")
@click.option("--compensation", type=click.Choice(["ridge", "bias", "none"]), help="Instead of ridge.")
@calibration_options
@click.option("--split-shared", is_flag=True, help="Give places that share weights a copy each; files may grow.")
@target_option
@click.option("--no-images", is_flag=True, help="Keep no pictures of samples whose answers changed.")
@click.option("--seed", type=click.IntRange(0), help="Of drawn samples, made-up tokens and the twin's inputs.")
@shape_option
@workers_option
@solve_on_option
@collection_options
@result_options
def command(
    model: Path,
    macs: tuple[float, ...],
    params: tuple[float, ...],
    data: str,
    output: Path | None,
    compensation: str | None,
    split_shared: bool,
    target: str,
    no_images: bool,
    seed: int | None,
    shapes: dict[str, tuple[int, ...]],
    ray: str | None,
    sort: str | None,
    as_csv: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Prune MODEL to several sizes, and show what each costs.

    Each size is planned, pruned and proven as by `prune --macs`; statistics and the trials that plans are made from are
    measured once, and kept in the folder. The same command goes on where it stopped, and adds sizes that are new. A
    size that cannot be reached is told, and the others go on; the exit status is 1 then.
    """
    from toast_onnx_calibration.goals import Goal

    if bool(macs) == bool(params):
        raise click.UsageError("say the sizes once: --macs 0.8,0.6 or --params 0.8,0.6")
    if as_csv and as_json:
        raise click.UsageError("give either --csv or --json")
    folder = output or beside(model, ".sweep")
    page, record = folder / "report.html", folder / "sweep.json"
    drawn = can_draw()
    goals = [Goal("macs" if macs else "params", share) for share in macs or params]
    paths = {goal: folder / f"{model.stem}.{goal.kind}-{goal.value:g}.onnx" for goal in goals}
    dense = study(load_model(model), shapes)
    if not folder.is_dir():
        check_destinations([*read_files(model), data], {"-o": folder})
        folder.mkdir()
    elif not record.is_file():  # what lies there is not ours
        check_destinations(read_files(model), {f"-o ({path.name})": path for path in paths.values()})
    settings = with_ties(planned_settings(Ratios(), compensation), target)
    given["hold_back"] = given["hold_back"] or holdable(data, settings, given, HELD)
    reading = gather_options(settings, seed, given)
    _check_same(record, _asked(dense, data, settings, reading, shapes, target, split_shared))
    same = _prune_words(given | {"compensation": compensation, "seed": seed, "target": target, "data": data}, shapes)
    same += ["--split-shared"] * split_shared + ["--no-images"] * no_images
    problems: dict[Goal, str] = {}
    with blame_model(model), ExitStack() as stack:
        planner, executor = None, stack.enter_context(open_executor(ray))
        statistics = folder / "statistics.npz"
        for goal in goals:
            out = paths[goal]
            if _is_done(out, goal) and not is_overwriting():
                say_note(f"{out.name} is there already; --overwrite makes it anew")
                continue
            try:
                refuse_unreachable(dense, settings, goal)
                if planner is None:
                    if not statistics.is_file():
                        measure_all(dense, data, statistics, reading, executor)
                    planning = Planning(data, settings, statistics, None, None, shapes, reading, ray)
                    opened = open_planner(dense, planning, results=folder / "sensitivity.json")
                    planner = stack.enter_context(opened)
                ratios = out.with_name(f"{out.stem}.ratios.yaml")
                plan_for(planner, goal).save(ratios)
                job = Job(
                    dense,
                    data,
                    statistics,
                    reading,
                    shapes,
                    split_shared=split_shared,
                    target=target,
                    planned=True,
                    images=not no_images,
                )
                told = {"goal": {goal.kind: goal.value, "judged": None}, "expects": None}
                words = ["prune", str(model), f"--{goal.kind}", repr(goal.value), *same]
                run_job(job, read_ratios(str(ratios)), out, out.with_suffix(".json"), told, words)
            except ConfigError as error:
                problems[goal] = " ".join(str(error).split())
                say_note(f"{goal.kind} {goal.value:g}: {problems[goal]}")
    _end(folder, page if drawn else None, sort, as_csv, as_json, problems)


def _prune_words(given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What `prune` is told to make one size alone, as `sweep` was told to make all of them."""
    known = {name: value for name, value in given.items() if value is not None}
    words = [word for name, value in known.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, *(w for name, sizes in shapes.items() for w in ("--shape", f"{name}={'x'.join(map(str, sizes))}"))]


def _end(
    folder: Path, page: Path | None, sort: str | None, as_csv: bool, as_json: bool, problems: Mapping[Goal, str]
) -> None:
    """Table, page (where it can be made) and exit status."""
    from toast_onnx.report.collection import of_runs
    from toast_onnx.report.page_sources import find_runs

    missed = {f"{goal.kind} {goal.value:g}": text for goal, text in problems.items()}
    if any(folder.glob("*.onnx")):
        together = [each.ordered(sort) for each in of_runs(find_runs([folder]))]
        if page is not None:
            write_collection_page(together, folder.name, page, list(missed.items()))
        show_collection(together, as_json, as_csv, {"missed": missed})
        if page is not None and not (as_csv or as_json):
            click.echo(f"page: {page}")
    if missed:
        raise ConfigError(f"not made: {', '.join(f'{name} ({text})' for name, text in missed.items())}")


def _asked(
    dense: Study,
    data: str,
    settings: Ratios,
    reading: CalibrationOptions,
    shapes: Mapping[str, tuple[int, ...]],
    target: str,
    split_shared: bool,
) -> dict[str, Any]:
    """What all sizes of a folder have in common, as plain data."""
    return {
        "model_sha256": file_hash(dense.view.model.path),
        "data": data,
        "compensation": settings.compensation.kind,
        "preprocess": reading.preprocess,
        "samples": reading.samples,
        "views": reading.views,
        "seed": reading.seed,
        "tokens": reading.tokens,
        "class_weight": reading.class_weight,
        "hold": reading.hold,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "target": target,
        "split_shared": split_shared,
    }


def _check_same(record: Path, asked: dict[str, Any]) -> None:
    """Keep what a folder is for, or refuse to mix two kinds of results in it.

    Raises:
        ConfigError: it holds results of another model, other data or other options.
    """
    if not record.is_file():
        write_bytes(record, (json.dumps({"format": FORMAT, "asked": asked}, indent=1) + "\n").encode())
        return
    found = read_json(record, limit=_MOST_BYTES)
    known = found.get("asked") if isinstance(found, dict) else None
    known = known if isinstance(known, dict) else {}
    other = [key for key in asked if known.get(key) != asked[key]]
    if other:
        raise ConfigError(
            f"{record.parent} holds results of another {other[0].replace('_', ' ')} ({known.get(other[0])}); give "
            "another folder with -o"
        )


def _is_done(out: Path, goal: Goal) -> bool:
    """Whether a size is there whole: a report that belongs to the model beside it and was made for that size."""
    try:
        found: Any = read_json(out.with_suffix(".json"), limit=64 << 20)
        made = found["options"]["goal"][goal.kind], found["pruned"]["sha256"]
        return made == (goal.value, file_hash(out))
    except (ToastError, OSError, KeyError, TypeError):
        return False
