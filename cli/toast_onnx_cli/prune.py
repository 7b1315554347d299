"""`toast-onnx prune`: a ratios file and a model in, a smaller proven model and its report out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from toast_onnx.choosing.blocks import heads_rounded_away
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.engines.even_heads import Evened
from toast_onnx.errors import ConfigError, ToastError
from toast_onnx.finetune.local import LocalResult
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model
from toast_onnx.planning.presets import PREFIX, find_preset, read_ratios
from toast_onnx.planning.ratios import Ratios
from toast_onnx.pruning import Pruned, Refine, even_out, prune
from toast_onnx.report.pruning import save_with_report
from toast_onnx.solving.compensations import COMPENSATIONS
from toast_onnx.solving.weights import BlockWeights
from toast_onnx.wellformed import blame_model
from toast_onnx_cli.calibration_options import (
    DATA_HELP,
    calibration_options,
    check_sample_options,
    gather_options,
    sample_progress,
)
from toast_onnx_cli.console import Advance, format_bytes, format_count, print_json, progress, say_note
from toast_onnx_cli.destinations import check_destinations, overwrite_option, read_files
from toast_onnx_cli.goals import (
    BUDGETS,
    HELD,
    HELD_FOR_GOAL,
    Goal,
    Judged,
    gather_goal,
    goal_options,
    judge_model,
    plan_ratios,
    plan_words,
    smallest_within,
)
from toast_onnx_cli.links import links_option
from toast_onnx_cli.shapes import shape_option

if TYPE_CHECKING:
    from toast_onnx_calibration.calibrating import CalibrationOptions
    from toast_onnx_calibration.sequential import SequentialStatistics
    from toast_onnx_calibration.statistics import CalibratedStatistics

#: Predicted error of a part, relative to what it gives, beyond which the summary warns: with data, 35 % removed
#: of DeiT-T come to 0.30 (10 of 79 points lost), half to 0.40 (on another ViT-Tiny more than 40 of 83 points).
LARGE_ERROR = 0.35


#: Below this agreement the summary gives advice, and below the next it says so first.
BAD, HARDLY = 0.9, 0.5
#: Fewer samples than that are all measured on; of those so many are run again to see what became of the answers.
FEWEST, FEW = 64, 32
#: Samples drawn unless told otherwise, as `calibration.samples` of a ratios file.
SAMPLES = Ratios().calibration.samples


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
    given["hold_back"] = given["hold_back"] or _holdable(data, settings, given, wished)
    judged: Judged | None = None
    with blame_model(model), ExitStack() as stack:
        if goal is not None:
            assert data is not None
            assert planned is not None
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="toast-goal-")))
            asked = _Asked(dense, data, given["labels"], given["hold_back"] or 0, shapes, target, split_shared)
            words = plan_words(given, shapes, seed)
            measured = _measure_all(dense, data, folder, gather_options(settings, seed, given))
            words += ["--statistics", str(measured)]
            words += ["--sensitivity", str(given["sensitivity"] or folder / "sensitivity.json")]
            words += ["--compensation", compensation] if compensation in ("none", "bias", "ridge") else []
            judged = _plan(goal, asked, planned, folder, measured, words, seed or 0, skip_unprunable)
            settings = read_ratios(str(planned))
        settings = tied(settings, target)
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
            _show_notes(even_notes(evened))
        if normalize:
            say_note(f"{pruned.normalized} spelled-out norms became LayerNormalization")
        _show_notes([*dense.notes, *pruned.notes, *head_notes(dense, pruned)])
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


@dataclass(frozen=True)
class _Asked:
    """What plans are judged on.

    Attributes:
        dense: the model.
        data: samples.
        labels: as for `labels.open_labels`; None judges by agreement.
        hold: one of so many samples is held back.
        shapes: concrete input shapes.
        target: as for `tied`.
        split_shared: as for `prune`.
    """

    dense: Study
    data: str
    labels: str | None
    hold: int
    shapes: Mapping[str, tuple[int, ...]]
    target: str
    split_shared: bool


def tied(settings: Ratios, target: str) -> Ratios:
    """Settings that keep one head size for a target whose fused kernels want it, unless they say otherwise."""
    if target != "tensorrt" or settings.given("attention.tie"):
        return settings
    return settings.model_copy(update={"attention": settings.attention.model_copy(update={"tie": True})})


def _holdable(data: str | None, settings: Ratios, given: Mapping[str, Any], wished: int) -> int | None:
    """The wished share of samples to hold back; None where there are too few to spare any."""
    if data is None:
        return None
    from toast_onnx_calibration.sources import count_samples

    count = count_samples(data)
    drawn = min(count or 0, given["samples"] or settings.calibration.samples or count or 0)
    return wished if drawn >= FEWEST else None


def _measure_all(dense: Study, data: str, folder: Path, options: CalibrationOptions) -> Path:
    """Statistics of everything that a plan and its weights may need, measured once."""
    from toast_onnx_calibration.calibrating import calibrate

    path = folder / "statistics.npz"
    with sample_progress("calibrating") as show:
        calibrate(dense, data, path, None, options, show)
    return path


def _plan(
    goal: Goal,
    asked: _Asked,
    out: Path,
    folder: Path,
    statistics: Path,
    words: list[str],
    seed: int,
    skip_unprunable: bool,
) -> Judged | None:
    """Write the plan of a goal; how it was judged, where the goal is a loss."""
    model = asked.dense.view.model.path
    if goal.kind in BUDGETS:
        plan_ratios(goal, model, asked.data, out, words)
        return None
    if asked.hold < 2:
        raise ConfigError(
            f"{asked.data}: --{goal.kind.replace('_', '-')} is judged on samples that are held back; give {FEWEST} or "
            "more, in a folder or a .npz file"
        )
    from toast_onnx.model import save_model
    from toast_onnx_calibration.statistics import CalibratedStatistics

    options = dict(zip(words[::2], words[1::2], strict=True))
    reading: dict[str, Any] = {
        "preprocess": options.get("--preprocess"),
        "samples": int(options["--samples"]) if "--samples" in options else SAMPLES,
        "seed": seed,
        "hold": asked.hold,
        "threads": int(options["--threads"]) if "--threads" in options else None,
    }
    found, candidate = CalibratedStatistics(asked.dense, statistics), folder / "candidate.onnx"

    def judge() -> Judged:
        ratios = tied(read_ratios(str(out)), asked.target)
        small = prune(
            asked.dense,
            ratios,
            found,
            check=False,
            skip_unprunable=skip_unprunable,
            seed=seed,
            split_shared=asked.split_shared,
        )
        save_model(small.model, candidate, check=False)
        return judge_model(goal, model, candidate, asked.data, asked.labels, asked.shapes, reading)

    def plan(share: float) -> None:
        plan_ratios(Goal("macs", share), model, asked.data, out, words)

    share, judged = smallest_within(goal, plan, judge)
    return Judged(judged.loss, f"{share:.3f} of the MACs, {judged.text}")


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


def samples_to_refine(ratios: Ratios, data: str | None, statistics: Path | None) -> str | None:
    """Where the samples are that blocks are corrected on, one after the other; None without such correction.

    `compensation: local` needs samples, also beside a statistics file; `ridge` uses them where they are at hand anyway.

    Args:
        ratios: the ratios file; its `calibration: data:` counts where `data` is None.
        data: what was given on the command line.
        statistics: file of earlier measurements.

    Raises:
        ConfigError: there are no samples.
        BackendError: PyTorch is not installed.
    """
    if ratios.compensation.kind == "ridge":
        return data or (ratios.calibration.data if statistics is None else None)
    if ratios.compensation.kind != "local":
        return None
    samples = data or ratios.calibration.data
    if samples is None:
        raise ConfigError(
            "compensation: local trains blocks on calibration samples: give them with --data, or choose kind: ridge"
        )
    from toast_onnx.finetune.local import require_torch

    require_torch()
    return samples


def refinement(
    dense: Study, ratios: Ratios, samples: str | None, options: CalibrationOptions, advance: Advance
) -> Refine | None:
    """What corrects the new weights on samples, None where there are none.

    Args:
        dense: the model.
        ratios: the ratios file.
        samples: as `samples_to_refine` found them.
        options: how to read and run them.
        advance: called after every block.
    """
    if samples is None:
        return None
    from toast_onnx.finetune.local import LocalSettings
    from toast_onnx_calibration.local import refine_locally

    trains = ratios.compensation.kind == "local"
    chosen = LocalSettings(class_weight=options.class_weight, seed=options.seed)
    chosen = chosen if trains else replace(chosen, steps=0)
    note = "training" if trains else "matching means"

    def refine(new: Mapping[int, BlockWeights]) -> tuple[dict[int, BlockWeights], tuple[LocalResult, ...]]:
        return refine_locally(dense, new, samples, options, chosen, lambda block: advance(1, f"{note} {block}"))

    return refine


def proof_samples(
    dense: Study, ratios: Ratios, data: str | None, statistics: Path | None, options: CalibrationOptions
) -> Sequence[Mapping[str, np.ndarray]]:
    """Samples that the proof runs on besides what it makes up; none without data.

    Args:
        dense: the model.
        ratios: the ratios file; its `calibration: data:` counts where neither of the next two is given.
        data: where samples are.
        statistics: file of earlier measurements.
        options: how to read them.
    """
    data = data or (ratios.calibration.data if statistics is None else None)
    if data is None:
        return ()
    from toast_onnx_calibration.calibrating import first_samples

    return first_samples(dense, data, options)


@contextmanager
def find_statistics(
    dense: Study, ratios: Ratios, data: str | None, statistics: Path | None, options: CalibrationOptions
) -> Iterator[SyntheticStatistics | CalibratedStatistics | SequentialStatistics]:
    """Statistics for a run: of a file, measured now (for sequential ones, block by block), or made up without data.

    Args:
        dense: the model.
        ratios: what will be asked for; its `calibration: data:` counts where neither of the next two is given.
        data: where to measure.
        statistics: file of earlier measurements.
        options: how to measure.

    Raises:
        ConfigError: the ratios do not fit the model.
        DataError: the data or the file do not fit the model.
    """
    data = data or (ratios.calibration.data if statistics is None else None)
    if data is None and statistics is None:
        yield SyntheticStatistics(dense, options.seed)
        return
    from toast_onnx_calibration.calibrating import calibrate
    from toast_onnx_calibration.needs import needed
    from toast_onnx_calibration.sequential import SequentialStatistics
    from toast_onnx_calibration.statistics import CalibratedStatistics

    if statistics is not None:
        yield CalibratedStatistics(dense, statistics)
        return
    assert data is not None
    wanted = needed(dense, ratios)
    if not wanted:  # nothing is removed, or by weights alone
        yield SyntheticStatistics(dense, options.seed)
        return
    with tempfile.TemporaryDirectory(prefix="toast-statistics-") as folder:
        if ratios.compensation.statistics == "sequential":
            behind = SequentialStatistics(dense, data, wanted, options, Path(folder))
            yield behind
            _show_notes(behind.notes)
            return
        path = Path(folder) / "statistics.npz"
        with sample_progress("calibrating") as show:
            header = calibrate(dense, data, path, wanted, options, show)
        _show_notes(header.notes)
        yield CalibratedStatistics(dense, path)


def head_notes(dense: Study, pruned: Pruned) -> list[str]:
    """What to say where a share of the heads rounds to none."""
    kept = heads_rounded_away(dense.match.blocks, pruned.ratios, pruned.widths)
    if not kept:
        return []
    most, where = max(kept.values()), ", ".join(str(index) for index in kept)
    return [
        f"attention.heads rounds to no head in block {where}; of {most} heads, more than {0.5 / most:.3g} drops one"
    ]


def even_notes(evened: Evened) -> list[str]:
    """What to say of attentions that had two head sizes, and of those that still have."""
    notes = []
    if evened.padded:
        notes.append(
            f"{len(evened.padded)} attentions with different widths in Q/K and V were padded with zeros to one: MACs "
            f"{format_count(evened.macs[0])} -> {format_count(evened.macs[1])}"
        )
    if evened.left:
        notes.append(f"{len(evened.left)} attentions keep different widths in Q/K and V: no fused kernel takes them")
    return notes


def _show_notes(notes: Sequence[str]) -> None:
    for note in dict.fromkeys(notes):
        say_note(note)


def _token_lines(tokens: dict[str, Any] | None) -> list[str]:
    """What became of the tokens, in a line where something did."""
    if tokens is None:
        return []
    merged = [m for m in tokens["merges"] if m["how"] == "merged"]
    dropped = [m for m in tokens["merges"] if m["how"] != "merged"]
    parts = []
    if merged:
        first, last = merged[0]["before"], merged[-1]["after"]
        parts.append(f"{first} -> {last} in {len(merged)} blocks")
    parts += [f"{m['before']} -> {m['after']} that are read behind block {m['block']}" for m in dropped]
    proof = tokens["twin"]
    checked = "not checked" if proof is None else f"twin agrees to {proof['worst']:.1e} of scale"
    return [f"tokens: {'; '.join(parts)}; {checked}"]


def _trust_lines(document: dict[str, Any]) -> list[str]:
    """The largest predicted error, with a warning beyond a bound, and what was left alone for want of data."""
    errors = [(e, b["index"], part) for b in document["blocks"] for part, e in b["predicted_errors"].items()]
    lines = []
    if errors:
        worst, block, part = max(errors)
        more = sum(e > LARGE_ERROR for e, _, _ in errors)
        warning = f"; WARNING: {more} of {len(errors)} parts lose more than {LARGE_ERROR}, remove less there"
        lines.append(f"largest predicted error: {worst:.2f} of {part} in block {block}{warning if more else ''}")
    if alone := document["no_norm_in_front"]:
        where = ", ".join(map(str, alone))
        lines.append(
            f"give --data: {len(alone)} blocks have no norm in front, and were left alone where made-up tokens would "
            f"stand for what they read ({where}); --force-synthetic prunes them all the same"
        )
    return lines


@dataclass(frozen=True)
class _Said:
    """What a summary says of the answers: in front of its first line, and in lines of their own."""

    alarm: str = ""
    lines: tuple[str, ...] = ()


def _agreement_lines(found: dict[str, Any] | None) -> _Said:
    if found is None:
        return _Said()
    where = f"{found['samples']} " + ("held-back samples" if found["held_back"] else "of the samples measured on")
    worst = found["worst"]
    costs = "" if worst is None else f"; block {worst['block']} is furthest off ({worst['error']:.0%}, {worst['part']})"
    scores = next((o for o in found["outputs"].values() if "top1_agreement" in o), None)
    if scores is None:
        error = max((o["relative_error"] for o in found["outputs"].values()), default=0.0)
        return _Said("", (f"outputs differ by {error:.2%} of their size on {where}{costs}",))
    same = scores["top1_agreement"]
    lines = [f"agreement: {same:.1%} on {where}, KL {scores['kl']:.3f}{costs}"]
    if same < BAD and worst is not None:
        part = "attention: {qk: 0, vo: 0}" if worst["part"] == "attention" else "ffn: {fc1: 0, fc2: 0}"
        lines.append(
            f"block {worst['block']} costs most: try `blocks: {{{worst['block']}: {{{part}}}}}` in the ratios file, "
            "ratios planned for the same cost (--macs), or `toast-onnx finetune`"
        )
    alarm = f"HARDLY AGREES with the dense model, on {same:.1%} of {where}: " if same < HARDLY else ""
    return _Said(alarm, tuple(lines))


def summary(document: dict[str, Any], out: Path, report: Path) -> str:
    """Lines on what happened, with the hashes of what was read; the first says so where the file grew."""
    dense, pruned, twin = document["dense"], document["pruned"], document["twin"]
    proof = "not checked" if twin is None else f"twin agrees to {twin['worst']:.1e} of scale"
    more = pruned["bytes"] / dense["bytes"] - 1
    loud = more > 0 and (pruned["params"] > dense["params"] or more > 0.01)
    grown = "LARGER than the original: " if loud else ""
    nodes = f" (+{more:.1%}, nodes that were added)" if more > 0 and not loud else ""
    said = _agreement_lines(document["agreement"])
    lines = [
        f"{said.alarm}{grown}{out}: MACs {format_count(dense['macs'])} -> {format_count(pruned['macs'])}, "
        f"parameters {format_count(dense['params'])} -> {format_count(pruned['params'])}, "
        f"file {format_bytes(dense['bytes'])} -> {format_bytes(pruned['bytes'])}{nodes}; {proof}",
        *said.lines,
        f"statistics: {document['statistics']['source']}",
        *_token_lines(document["tokens"]),
        "read: " + ", ".join(f"{f['file']} {str(f['sha256'])[:12]}" for f in (*dense["files"], *document["read"])),
        *_trust_lines(document),
        *([document["options"]["expects"]] if document["options"]["expects"] else []),
        f"report: {report}",
    ]
    return "\n".join(lines)
