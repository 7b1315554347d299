"""One pruning run from settings to a proven model and its report: what `prune` does, and `sweep` many times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ToastError
from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import Ratios
from toast_onnx.pruning import even_out, prune
from toast_onnx.report.pruning import save_with_report
from toast_onnx_cli.calibration_options import sample_progress
from toast_onnx_cli.console import progress, say_note, say_notes
from toast_onnx_cli.planning_options import with_ties
from toast_onnx_cli.prune_inputs import (
    find_statistics,
    idle_settings,
    kept_outputs,
    local_settings,
    proof_samples,
    refinement,
    samples_to_refine,
)
from toast_onnx_cli.prune_summary import correction_notes, even_notes, head_notes

if TYPE_CHECKING:
    from toast_onnx_calibration.calibrating import CalibrationOptions

#: Samples that are run again, where none could be held back, to see what became of the answers.
FEW = 32
#: Samples whose answers changed that a report holds.
SHOWN = 12


@dataclass(frozen=True)
class Job:
    """What a run works on, and how; what it removes is said apart.

    Attributes:
        dense: the model.
        data: where samples are; None where there are none.
        statistics: file of earlier measurements; None measures now.
        calibration: how samples are read, and how many are held back.
        shapes: concrete input shapes.
        skip_unprunable: as for `pruning.prune`.
        normalize: as for `pruning.prune`.
        force_synthetic: as for `pruning.prune`.
        split_shared: as for `pruning.prune`.
        target: any or tensorrt.
        check: prove the result.
        planned: whether `statistics` were taken from `data` for a plan, so that both are there.
        images: whether the report holds pictures of samples whose answers changed.
    """

    dense: Study
    data: str | None
    statistics: Path | None
    calibration: CalibrationOptions
    shapes: Mapping[str, tuple[int, ...]]
    skip_unprunable: bool = False
    normalize: bool = False
    force_synthetic: bool = False
    split_shared: bool = False
    target: str = "any"
    check: bool = True
    planned: bool = False
    images: bool = True


def run_job(
    job: Job, settings: Ratios, out: Path, report: Path | None, told: Mapping[str, Any], words: Sequence[str]
) -> dict[str, Any]:
    """Prune, prove, see what became of the answers, and write model and report.

    Args:
        job: what is worked on.
        settings: what goes.
        out: the pruned model.
        report: its JSON; None keeps it out of files.
        told: what else the report's options hold.
        words: the command that repeats the run, without the program's name.

    Returns:
        The report.

    Raises:
        ToastError: its children say what is wrong.
    """
    dense, calibration, check = job.dense, job.calibration, job.check
    settings = with_ties(settings, job.target)
    data, statistics = job.data, None if job.planned else job.statistics
    samples = samples_to_refine(dense, settings, data, statistics, calibration)
    local = local_settings(settings, calibration)
    say_notes(idle_settings(settings))
    measured = None if job.planned else data
    with (
        kept_outputs(dense, settings, samples if measured is not None else None) as recording,
        find_statistics(dense, settings, measured, job.statistics, calibration, recording) as found,
    ):
        steps = len(dense.match.blocks) + 1
        if samples is not None:
            from toast_onnx_calibration.local import refining_steps

            steps += refining_steps(dense, local)
        with progress("pruning", steps) as advance:
            pruned = prune(
                dense,
                settings,
                found,
                check=check,
                skip_unprunable=job.skip_unprunable,
                normalize=job.normalize,
                seed=calibration.seed,
                progress=lambda note: advance(1, note),
                refine=refinement(dense, local, samples, calibration, advance, recording),
                samples=proof_samples(dense, settings, data, statistics, calibration) if check else (),
                force_synthetic=job.force_synthetic,
                split_shared=job.split_shared,
                threads=calibration.threads,
            )
        if job.target == "tensorrt":
            pruned, evened = even_out(dense, pruned, check=check, seed=calibration.seed)
            say_notes(even_notes(evened))
        if job.normalize:
            say_note(f"{pruned.normalized} spelled-out norms became LayerNormalization")
        say_notes([*dense.notes, *pruned.notes, *head_notes(dense, pruned), *correction_notes(pruned.local)])
        source = {"source": found.source} if isinstance(found, SyntheticStatistics) else found.to_document()
    options = {
        "ratios": settings.to_document(),
        **told,
        "seed": calibration.seed,
        "check": check,
        "skip_unprunable": job.skip_unprunable,
        "normalize": job.normalize,
        "target": job.target,
    }
    recipe = source.get("preprocessing")
    if isinstance(recipe, Mapping):
        from toast_onnx_calibration.recipe_files import keep_recipe

        keep_recipe(pruned.model.proto, recipe)

    def answers(draft: Path) -> dict[str, Any]:
        agreement = None if data is None else _agreement(job, data, draft)
        return {"preprocessing": recipe, "agreement": agreement, "command": list(words)}

    return save_with_report(pruned, dense, source, options, out, report, check=check, more=answers)


def _agreement(job: Job, data: str, out: Path) -> dict[str, Any] | None:
    """What became of the answers on samples that were held back; None, and a note, where that cannot be measured."""
    from toast_onnx_calibration.comparing import compare

    options = job.calibration
    try:
        with sample_progress("comparing") as show:
            found = compare(
                job.dense.source.path,
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
                shapes=job.shapes,
                progress=show,
                shown=SHOWN,
                images=job.images,
            )
    except ToastError as error:
        say_note(f"agreement was not measured: {error}")
        return None
    return {
        "samples": found.samples,
        "held_back": options.hold > 1,
        "outputs": found.outputs,
        "worst": found.worst,
        "blocks": found.blocks,
        "disagreements": list(found.disagreements),
    }
