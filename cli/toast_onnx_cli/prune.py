"""`toast-onnx prune`: a ratios file and a model in, a smaller proven model and its report out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ToastError
from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.planning.presets import PREFIX, find_preset, read_ratios
from toast_onnx.planning.ratios import Ratios
from toast_onnx.pruning import even_out, prune
from toast_onnx.report.pruning import save_with_report
from toast_onnx.solving.compensations import COMPENSATIONS
from toast_onnx.wellformed import blame_model
from toast_onnx_cli.calibration_options import (
    DATA_HELP,
    calibration_options,
    check_sample_options,
    gather_options,
    sample_progress,
)
from toast_onnx_cli.console import print_json, progress, say_note, say_notes
from toast_onnx_cli.destinations import check_destinations, overwrite_option, read_files
from toast_onnx_cli.goals import (
    BUDGETS,
    HELD,
    HELD_FOR_GOAL,
    Asked,
    gather_goal,
    goal_options,
    holdable,
    measure_all,
    plan_words,
    write_plan,
)
from toast_onnx_cli.links import links_option
from toast_onnx_cli.planning_options import with_ties
from toast_onnx_cli.prune_inputs import find_statistics, proof_samples, refinement, samples_to_refine
from toast_onnx_cli.prune_summary import even_notes, head_notes, summary
from toast_onnx_cli.shapes import shape_option

if TYPE_CHECKING:
    from toast_onnx_calibration.calibrating import CalibrationOptions
    from toast_onnx_calibration.goals import Judged

#: Samples that are run again, where none could be held back, to see what became of the answers.
FEW = 32


@click.command("prune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--ratios", metavar="FILE", help="Ratios file, or a preset such as paper:deit_small@2.7.")
@goal_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Pruned model; default MODEL.pruned.onnx.")
@click.option("--report", type=click.Path(path_type=Path), help="JSON report; default beside the pruned model.")
@click.option("--data", metavar="DATA", help=f"Measure activations on: {DATA_HELP[0].lower()}{DATA_HELP[1:]}")
@click.option("--statistics", type=click.Path(path_type=Path), help="Statistics that `calibrate` wrote, not --data.")
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
@click.option(
    "--target",
    type=click.Choice(["any", "tensorrt"]),
    default="any",
    show_default=True,
    help="tensorrt keeps every attention at one head size, for fused kernels.",
)
@click.option("--no-check", is_flag=True, help="Do not prove the result with the padded twin.")
@click.option("--seed", type=click.IntRange(0), help="Of drawn samples, made-up tokens and the twin's inputs.")
@shape_option
@overwrite_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: Path,
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
    """
    if data is not None and statistics is not None:
        raise click.UsageError("give either --data or --statistics")
    goal = gather_goal(given, ratios, data)
    out = output or model.with_name(f"{model.stem}.pruned.onnx")
    report = report or out.with_suffix(".json")
    planned = None if goal is None else out.with_name(f"{out.stem}.ratios.yaml")
    check_destinations(
        [*read_files(model), ratios, statistics, data, given["preprocess"], given["labels"], given["sensitivity"]],
        # large weights go to a file of their own beside the model
        {
            "-o": out,
            "-o (its weights)": out.with_name(f"{out.name}.data"),
            "--report": report,
            "-o (its ratios)": planned,
        },
    )
    settings = Ratios() if ratios is None else read_ratios(ratios)
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
            asked = Asked(dense, data, given["labels"], reading, shapes, target, split_shared)
            words = [*plan_words(given, shapes, seed), "--target", target]
            measured = measure_all(dense, data, folder, reading)
            words += ["--statistics", str(measured)]
            words += ["--sensitivity", str(given["sensitivity"] or folder / "sensitivity.json")]
            words += ["--compensation", compensation] if compensation in ("none", "bias", "ridge") else []
            judged = write_plan(goal, asked, planned, folder, measured, words, skip_unprunable)
            settings = read_ratios(str(planned))
        settings = with_ties(settings, target)
        if compensation is not None:
            kind = settings.compensation.model_copy(update={"kind": compensation})
            settings = settings.model_copy(update={"compensation": kind})
        published = ratios is not None and ratios.startswith(PREFIX) and settings.compensation.kind == "none"
        expects = find_preset(ratios).expects if published and ratios is not None else None
        calibration = gather_options(settings, seed, given)
        seed = calibration.seed
        samples = samples_to_refine(settings, data, statistics)
        sources = (data, statistics) if goal is None else (None, measured)
        found = stack.enter_context(find_statistics(dense, settings, *sources, calibration))
        steps = len(dense.match.blocks) * (1 if samples is None else 2) + 1
        with progress("pruning", steps) as advance:
            pruned = prune(
                dense,
                settings,
                found,
                check=not no_check,
                skip_unprunable=skip_unprunable,
                normalize=normalize,
                seed=seed,
                progress=lambda note: advance(1, note),
                refine=refinement(dense, settings, samples, calibration, advance),
                samples=proof_samples(dense, settings, data, statistics, calibration) if not no_check else (),
                force_synthetic=force_synthetic,
                split_shared=split_shared,
            )
        if target == "tensorrt":
            pruned, evened = even_out(dense, pruned, check=not no_check, seed=seed)
            say_notes(even_notes(evened))
        if normalize:
            say_note(f"{pruned.normalized} spelled-out norms became LayerNormalization")
        say_notes([*dense.notes, *pruned.notes, *head_notes(dense, pruned)])
        for result in pruned.local:
            if result.note is not None and settings.compensation.kind == "local":
                say_note(f"block {result.block} keeps its closed-form weights: {result.note}")
        source = {"source": found.source} if isinstance(found, SyntheticStatistics) else found.to_document()
    options = {
        "ratios": settings.to_document(),
        "goal": None if goal is None else {goal.kind: goal.value, "judged": None if judged is None else judged.text},
        "expects": expects,
        "seed": seed,
        "check": not no_check,
        "skip_unprunable": skip_unprunable,
        "normalize": normalize,
        "target": target,
    }
    recipe = source.get("preprocessing")
    if isinstance(recipe, Mapping):
        from toast_onnx_calibration.recipe_files import keep_recipe

        keep_recipe(pruned.model.proto, recipe)

    def answers(draft: Path) -> dict[str, Any]:
        found = None if data is None else _agreement(model, draft, data, calibration, shapes)
        return {"preprocessing": recipe, "agreement": found}

    document = save_with_report(pruned, dense, source, options, out, report, check=not no_check, more=answers)
    if as_json:
        print_json(document)
    else:
        click.echo(summary(document, out, report))
        if planned is not None:
            click.echo(f"ratios: {planned}" + (f"; {judged.text}" if judged is not None else ""))


def _agreement(
    dense: Path, out: Path, data: str, options: CalibrationOptions, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    """What became of the answers on samples that were held back; None, and a note, where that cannot be measured."""
    from toast_onnx_calibration.comparing import compare

    try:
        with sample_progress("comparing") as show:
            found = compare(
                dense,
                out,
                data,
                preprocess=options.preprocess,
                samples=options.samples if options.hold else min(options.samples or FEW, FEW),
                seed=options.seed,
                provider=options.provider,
                batch=options.batch,
                threads=options.threads,
                rounds=0,
                hold=options.hold,
                shapes=shapes,
                progress=show,
            )
    except ToastError as error:
        say_note(f"agreement was not measured: {error}")
        return None
    return {"samples": found.samples, "held_back": options.hold > 1, "outputs": found.outputs, "worst": found.worst}
