"""`toast-onnx prune`: a ratios file and a model in, a smaller proven model and its report out."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.planning.presets import PREFIX, find_preset, read_ratios
from toast_onnx.planning.ratios import Ratios
from toast_onnx.solving.compensations import COMPENSATIONS
from toast_onnx.wellformed import blame_model
from toast_onnx_cli.calibration_options import (
    STATISTICS_HELP,
    calibration_options,
    check_sample_options,
    data_help,
    gather_options,
    say_idle_views,
)
from toast_onnx_cli.commands import json_option, toast_command
from toast_onnx_cli.console import print_json
from toast_onnx_cli.destinations import check_destinations, overwrite_option, read_files
from toast_onnx_cli.goals import (
    BUDGETS,
    HELD,
    HELD_FOR_GOAL,
    Asked,
    check_judging,
    gather_goal,
    goal_options,
    holdable,
    measure_all,
    planned_settings,
    refuse_unreachable,
    write_plan,
)
from toast_onnx_cli.links import links_option
from toast_onnx_cli.models import FILE, MODEL, beside
from toast_onnx_cli.planners import open_planner
from toast_onnx_cli.planning_options import Planning, target_option, with_ties
from toast_onnx_cli.prune_run import Job, run_job
from toast_onnx_cli.prune_summary import summary
from toast_onnx_cli.replay import replay
from toast_onnx_cli.shapes import shape_option
from toast_onnx_cli.solving import solve_on_option
from toast_onnx_cli.streams import as_file, is_stream, ratios_given
from toast_onnx_cli.words import given_words

if TYPE_CHECKING:
    from toast_onnx_calibration.goals import Judged


@toast_command(
    "prune",
    "prune model.onnx --macs 0.6 --data images/",
    "prune model.onnx --max-drop 2 --data images/",
    "prune model.onnx --ratios ratios.yaml -o small.onnx",
)
@click.argument("model", type=MODEL, required=False)
@click.option("--replay", "repeated", type=FILE, metavar="JSON", help="Repeat a report's run.")
@click.option("--ratios", metavar="FILE", help="File, - for standard input, or a preset such as paper:deit_small@2.7.")
@goal_options
@click.option("-o", "--output", type=FILE, help="Pruned model; default MODEL.pruned.onnx.")
@click.option("--report", type=FILE, help="JSON; default beside the pruned model, - for standard output.")
@click.option("--data", metavar="DATA", help=data_help("Measure activations on"))
@click.option("--statistics", type=FILE, help=STATISTICS_HELP)
@calibration_options
@click.option(
    "--compensation",
    type=click.Choice(list(COMPENSATIONS)),
    help="How weights make up for what went, instead of what the ratios file says.",
)
@click.option("--skip-unprunable", is_flag=True, help="Leave parts alone that cannot be pruned, instead of stopping.")
@click.option("--normalize", is_flag=True, help="Write norms that are spelled out as LayerNormalization (opset >= 17).")
@links_option
@click.option("--force-synthetic", is_flag=True, help="Without data, also prune blocks with no norm in front.")
@click.option("--split-shared", is_flag=True, help="Give places that share weights a copy each; files may grow.")
@target_option
@click.option("--no-check", is_flag=True, help="Do not prove the result with the padded twin.")
@click.option("--no-images", is_flag=True, help="Keep no pictures of samples whose answers changed.")
@click.option("--seed", type=click.IntRange(0), help="Of drawn samples, made-up tokens and the twin's inputs.")
@shape_option
@solve_on_option
@overwrite_option
@json_option
def command(
    model: Path | None,
    repeated: Path | None,
    ratios: str | None,
    output: Path | None,
    report: Path | None,
    data: str | None,
    statistics: Path | None,
    compensation: str | None,
    skip_unprunable: bool,
    normalize: bool,
    force_synthetic: bool,
    split_shared: bool,
    target: str,
    no_check: bool,
    no_images: bool,
    seed: int | None,
    shapes: dict[str, tuple[int, ...]],
    as_json: bool,
    **given: Any,
) -> None:
    """Make MODEL smaller: as ratios say, or as a goal needs.

    A goal (--macs, --params, --latency, --max-drop, --max-error) is planned on --data, and the ratios found are written
    beside the result. --max-drop looks for the smallest model within it, judged on samples that no plan saw.

    With --data (or `calibration: data:` in the ratios file) or --statistics, what is kept and the new weights follow
    from real activations; without, from the weights and made-up tokens. No labels are read.

    --replay runs the command that a report holds once more, in the same folder, and makes sure that the same bytes come
    out.
    """
    if repeated is not None:
        if model is not None or ratios is not None:
            raise click.UsageError("--replay takes model and settings from the report; give -o at most")
        replay(repeated, output, command)
        return
    if model is None:
        raise click.MissingParameter(param_type="argument", param_hint="'MODEL'")
    if data is not None and statistics is not None:
        raise click.UsageError("give either --data or --statistics")
    goal = gather_goal(given, ratios, data)
    out = output or beside(model, ".pruned.onnx")
    report = report or out.with_suffix(".json")
    planned = None if goal is None else out.with_name(f"{out.stem}.ratios.yaml")
    check_destinations(
        [*read_files(model), ratios, statistics, data, given["preprocess"], given["labels"], given["sensitivity"]],
        # large weights go to a file of their own beside the model
        {
            "-o": out,
            "-o (its weights)": out.with_name(f"{out.name}.data"),
            "--report": as_file(report),
            "-o (its ratios)": planned,
        },
    )
    settings = Ratios() if ratios is None else ratios_given(ratios)
    data = data or (settings.calibration.data if statistics is None else None)
    check_sample_options(given, data or settings.calibration.data)
    dense = study(load_model(model), shapes)
    wished = HELD_FOR_GOAL if goal is not None and goal.kind not in BUDGETS else HELD
    given["hold_back"] = given["hold_back"] or holdable(data, settings, given, wished)
    judged: Judged | None = None
    with blame_model(model), ExitStack() as stack:
        if goal is not None:
            assert data is not None
            assert planned is not None
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="toast-goal-")))
            reading = gather_options(settings, seed, given)
            planning = with_ties(planned_settings(settings, compensation), target)
            check_judging(goal, data, reading)
            refuse_unreachable(dense, planning, goal)
            asked = Asked(dense, data, given["labels"], reading, shapes, target, split_shared)
            measured = measure_all(dense, data, folder / "statistics.npz", reading)
            with open_planner(
                dense,
                Planning(data, planning, measured, None, None, shapes, reading),
                results=given["sensitivity"] or folder / "sensitivity.json",
                kind="latency" if goal.kind == "latency" else "macs",
            ) as planner:
                judged = write_plan(goal, asked, planned, folder, planner, measured, skip_unprunable)
            settings = read_ratios(str(planned))
        if compensation is not None:
            kind = settings.compensation.model_copy(update={"kind": compensation})
            settings = settings.model_copy(update={"compensation": kind})
        reading = gather_options(settings, seed, given)
        say_idle_views(reading, statistics)
        published = ratios is not None and ratios.startswith(PREFIX) and settings.compensation.kind == "none"
        job = Job(
            dense,
            data,
            statistics if goal is None else measured,
            reading,
            shapes,
            skip_unprunable=skip_unprunable,
            normalize=normalize,
            force_synthetic=force_synthetic,
            split_shared=split_shared,
            target=target,
            check=not no_check,
            planned=goal is not None,
            images=not no_images,
        )
        told = {
            "goal": None
            if goal is None
            else {goal.kind: goal.value, "judged": None if judged is None else judged.text},
            "expects": find_preset(ratios).expects if published and ratios is not None else None,
        }
        document = run_job(job, settings, out, as_file(report), told, given_words())
    if as_json or is_stream(report):
        print_json(document)
    else:
        click.echo(summary(document, out, report))
        if planned is not None:
            click.echo(f"ratios: {planned}" + (f"; {judged.text}" if judged is not None else ""))
