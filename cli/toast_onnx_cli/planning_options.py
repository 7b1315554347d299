"""Options that `sensitivity` and `plan` share: what is measured, where, and how parts would be pruned."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import Ratios
from toast_onnx_cli.calibration_options import (
    DATA_HELP,
    LABELS_HELP,
    STATISTICS_HELP,
    calibration_options,
    gather_options,
    sample_progress,
    say_idle_views,
)
from toast_onnx_cli.commands import options
from toast_onnx_cli.console import Advance, format_bytes, format_seconds, print_json, say_note
from toast_onnx_cli.models import FILE
from toast_onnx_cli.numbers import percentage
from toast_onnx_cli.shapes import shape_option
from toast_onnx_cli.solving import solve_on_option
from toast_onnx_cli.streams import ratios_given
from toast_onnx_cli.workers import open_executor, workers_option

if TYPE_CHECKING:
    from toast_onnx_calibration.calibrating import CalibrationOptions
    from toast_onnx_calibration.sensitivity_results import Trial
    from toast_onnx_calibration.work import Work


def comma_list(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(word.strip() for word in (value or "").split(",") if word.strip())


def fractions(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Fractions between 0 and 1, between commas."""
    try:
        found = tuple(float(word) for word in comma_list(ctx, param, value))
    except ValueError:
        found = ()
    percents = [percentage(word) for word in comma_list(ctx, param, value)]
    if any(p is not None for p in percents):
        wanted = ",".join(
            f"{p / 100:g}" if p is not None else w for p, w in zip(percents, str(value).split(","), strict=False)
        )
        raise click.BadParameter(f"'{value}' holds percentages, and fractions are wanted: {wanted}")
    if not found or not all(0 < f < 1 for f in found):
        raise click.BadParameter(f"'{value}' is no list of fractions such as 0.25,0.5")
    return found


class Counted(Protocol):
    """A running count; what `counted` hands out."""

    def __call__(self, done: int, total: int, note: str, left: float | None = None) -> None:
        """`done` steps of `total`, what was done last, and the seconds that are left where they are known."""


def counted(advance: Advance) -> Counted:
    """Turns a running count (done, total, note, seconds left) into steps of a progress display."""
    seen = 0

    def show(done: int, total: int, note: str, left: float | None = None) -> None:
        nonlocal seen
        advance(done - seen, note, left)
        seen = done

    return show


#: The options of `gather_planning`.
planning_options = options(
    click.option("--data", required=True, metavar="DATA", help=DATA_HELP),
    click.option(
        "--settings",
        metavar="FILE",
        help="Ratios file whose selection, scores, compensation and alignment are used; its ratios are not.",
    ),
    click.option("--compensation", type=click.Choice(["ridge", "bias", "none"]), help="Instead of the file's."),
    click.option("--align-heads", type=click.IntRange(1), help="Multiple that kept head dimensions are; default 8."),
    click.option("--align-width", type=click.IntRange(1), help="Multiple that kept FFN widths are; default 8."),
    click.option("--statistics", type=FILE, help=STATISTICS_HELP),
    click.option("--labels", metavar="LABELS", help=f"Adds top-1: {LABELS_HELP}"),
    click.option("--output-name", metavar="NAME", help="Output to measure at; the class scores, else the first."),
    calibration_options,
    click.option("--seed", type=click.IntRange(0), help="Seed of the draw of samples and tokens; 0 by default."),
    shape_option,
    workers_option,
    solve_on_option,
)


@dataclass(frozen=True)
class Planning:
    """The options that `planning_options` adds.

    Attributes:
        data: samples.
        settings: how parts would be pruned.
        statistics: file of earlier measurements; None measures now.
        labels: as for `labels.open_labels`; None leaves top-1 out.
        output: name of the output to measure at; None leaves the choice to `sensitivity_stream.chosen_output`.
        shapes: concrete input shapes.
        calibration: how samples are read and run.
        ray: what `--ray` says.
    """

    data: str
    settings: Ratios
    statistics: Path | None
    labels: str | None
    output: str | None
    shapes: dict[str, tuple[int, ...]]
    calibration: CalibrationOptions
    ray: str | None = None


def planning_inputs(given: Mapping[str, Any]) -> list[Path | str | None]:
    """What the options name for reading, for `check_destinations`."""
    return [given[name] for name in ("data", "settings", "statistics", "labels", "preprocess")]


def gather_planning(given: dict[str, Any]) -> Planning:
    """What was given on the command line.

    Args:
        given: the parameters that `planning_options` adds.

    Raises:
        ConfigError: the ratios file cannot be read, or speaks of something that no plan can.
    """
    settings = _prepare_settings(given["settings"], given["compensation"], given["align_heads"], given["align_width"])
    reading = gather_options(settings, given["seed"], given)
    say_idle_views(reading, given["statistics"])
    return Planning(
        given["data"],
        settings,
        given["statistics"],
        given["labels"],
        given["output_name"],
        given["shapes"],
        reading,
        given["ray"],
    )


def _prepare_settings(
    path: str | None, compensation: str | None, align_heads: int | None, align_width: int | None
) -> Ratios:
    """The ratios file's settings with what the command line says on top."""
    from toast_onnx_calibration.planning import check_settings

    settings = Ratios() if path is None else ratios_given(path)
    check_settings(settings)
    changes: dict[str, Any] = {}
    if align_heads is not None or align_width is not None:
        align = settings.align
        changes["align"] = align.model_copy(
            update={"head_dim": align_heads or align.head_dim, "width": align_width or align.width}
        )
    if compensation is not None:
        changes["compensation"] = settings.compensation.model_copy(update={"kind": compensation})
    return settings.model_copy(update=changes)


target_option = click.option(
    "--target",
    type=click.Choice(["any", "tensorrt"]),
    default="any",
    show_default=True,
    help="tensorrt keeps every attention at one head size, for fused kernels.",
)


def with_ties(settings: Ratios, target: str, tie: bool | None = None) -> Ratios:
    """Settings that keep one head size for a target whose fused kernels want it, unless they say otherwise.

    Args:
        settings: what the ratios file says.
        target: `tensorrt` ties heads where neither the file nor `tie` says whether to.
        tie: what the command line says.
    """
    if tie is None:
        if target != "tensorrt" or settings.given("attention.tie"):
            return settings
        tie = True
    return settings.model_copy(update={"attention": settings.attention.model_copy(update={"tie": tie})})


dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say how many trials, seconds and bytes of disk it takes; measure a few of them."
)


def show_foreseen(
    dense: Study,
    planning: Planning,
    parts: tuple[str, ...],
    trials: Sequence[Trial],
    as_json: bool,
    planned: bool = False,
    trial_samples: int | None = None,
) -> None:
    """Say what measuring trials will take.

    Args:
        dense: the model.
        planning: what is measured.
        parts: tokens, heads, qk, vo, fc1, fc2.
        trials: to be measured.
        as_json: print one JSON document.
        planned: whether a plan is made of them.
        trial_samples: how many samples they run on; None for all.
    """
    from toast_onnx_calibration.foreseeing import foresee

    found = foresee(
        dense,
        planning.data,
        planning.settings,
        parts,
        trials,
        planning.calibration,
        planning.statistics,
        planning.output,
        planned,
        trial_samples,
    )
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if as_json:
        print_json(
            {
                "trials": found.trials,
                "seconds": found.seconds,
                "disk_bytes": found.disk,
                "free_bytes": free,
                "samples": found.samples,
                "trial_samples": found.trial_samples,
                "measured_on": found.tried,
            }
        )
        return
    click.echo(f"trials: {found.trials}, on {found.trial_samples} samples each")
    click.echo(f"time: {format_seconds(found.seconds)} in one process, by one trial a part on {found.tried} samples")
    click.echo(f"disk: {format_bytes(found.disk)} of working files in {place}, where {format_bytes(free)} are free")


@contextmanager
def open_trials(
    dense: Study, planning: Planning, parts: tuple[str, ...], trial_samples: int | None = None
) -> Iterator[Work]:
    """As `toast_onnx_calibration.work.open_work`, with its progress and notes shown."""
    from toast_onnx_calibration.work import open_work

    with (
        open_executor(planning.ray) as executor,
        open_work(
            dense,
            planning.data,
            planning.settings,
            parts,
            planning.calibration,
            planning.statistics,
            planning.labels,
            planning.output,
            lambda: sample_progress("calibrating"),
            say_note,
            executor,
            trial_samples,
        ) as work,
    ):
        yield work
