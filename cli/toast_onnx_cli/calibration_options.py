"""Options of commands that measure activations, and how they combine with a ratios file's `calibration:` section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click
from click.core import ParameterSource

from toast_onnx.planning.ratios import Ratios
from toast_onnx_cli.commands import options, provider_option
from toast_onnx_cli.console import Advance, progress, say_note
from toast_onnx_cli.numbers import FiniteRange
from toast_onnx_cli.pixels import image_options

if TYPE_CHECKING:
    from toast_onnx_calibration.calibrating import CalibrationOptions

DATA_HELP = "Image folder, .npy or .npz file, or a Python module:function."
LABELS_HELP = "CSV with columns file and label, the word 'folders', or a .npz with 'labels'."
STATISTICS_HELP = "Statistics that `calibrate` wrote, instead of measuring now."


def data_help(purpose: str) -> str:
    """The help of `--data` where it should be said what samples are for."""
    return f"{purpose}: {DATA_HELP[0].lower()}{DATA_HELP[1:]}"


def parse_tokens(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """`all`, or a fraction above 0 and at most 1."""
    if value is None:
        return None
    try:
        fraction = 1.0 if value == "all" else float(value)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction <= 1:
        raise click.BadParameter(f"'{value}' is neither 'all' nor a fraction above 0 and at most 1")
    return fraction


#: Every option of `gather_options`; None stands for one that was not given.
calibration_options = options(
    image_options,
    click.option("--samples", type=click.IntRange(1), help="Draw so many samples; 256 by default."),
    click.option(
        "--views",
        type=click.IntRange(0),
        help="Measure so many views of each sample, too, in which the model sees other classes: for more classes than "
        "the samples show. 1 or 3 do well; needs PyTorch. None by default.",
    ),
    click.option("--tokens", callback=parse_tokens, metavar="all|FRACTION", help="Tokens that count; default all."),
    click.option(
        "--class-weight",
        type=FiniteRange(0, min_open=True),
        help="Weight of the class token where the output reads nothing else; 20 by default.",
    ),
    provider_option,
    click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples a run."),
    click.option(
        "--threads",
        type=click.IntRange(1),
        help="Threads of ONNX Runtime, image decoding and solving; one a core by default.",
    ),
    click.option(
        "--memory",
        type=FiniteRange(0, min_open=True),
        metavar="GB",
        help="For the statistics of one pass; less takes more passes, which continue one another. 0.2 by default.",
    ),
    click.option("--hold-back", type=click.IntRange(2), hidden=True, help="Keep one of so many samples apart."),
)


def gather_options(ratios: Ratios | None, seed: int | None, given: dict[str, Any]) -> CalibrationOptions:
    """What was given on the command line, then what the ratios file says, then the defaults.

    Args:
        ratios: the ratios file, None where there is none.
        seed: the command's seed.
        given: the parameters that `calibration_options` adds.
    """
    from toast_onnx_calibration.calibrating import BUDGET, CalibrationOptions

    section = (ratios or Ratios()).calibration
    named = ratios is not None and ratios.given("calibration.preprocess")
    tokens = 1.0 if section.tokens == "all" else float(section.tokens)
    return CalibrationOptions(
        preprocess=given["preprocess"] or (section.preprocess if named else None),
        samples=given["samples"] or section.samples,
        seed=section.seed if seed is None else seed,
        tokens=tokens if given["tokens"] is None else given["tokens"],
        class_weight=20.0 if given["class_weight"] is None else given["class_weight"],
        provider=given["provider"],
        batch=given["batch"],
        threads=given["threads"],
        budget=BUDGET if given["memory"] is None else int(given["memory"] * 1e9),
        hold=given["hold_back"] or 0,
        views=section.views if given["views"] is None else given["views"],
        note=say_note,
    )


def say_idle_views(options: CalibrationOptions, statistics: object) -> None:
    """Say that views are asked for in vain where the user brings statistics."""
    if statistics is not None and options.views:
        say_note("views are not made: statistics are given")


def check_sample_options(given: Mapping[str, Any], data: str | None) -> None:
    """Refuse options that say how samples are read where none are.

    Args:
        given: the parameters that `calibration_options` adds.
        data: where samples are, None where there are none.

    Raises:
        click.UsageError: one of them was given; a default of the user's own (`TOAST_*`) waits for samples.
    """
    context = click.get_current_context(silent=True)
    if data is not None or context is None:
        return
    for name in ("preprocess", "samples", "views", "tokens", "class_weight", "memory"):
        if given.get(name) is not None and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} is about samples, and none are given; add --data")


class ShowSamples(Protocol):
    """Reports samples done; what `sample_progress` hands out."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """`done` samples of `total`, where that is known."""


@contextmanager
def sample_progress(label: str) -> Iterator[ShowSamples]:
    """Progress over samples whose number is known only once the data is open."""
    with ExitStack() as stack:
        advance: Advance | None = None
        seen = 0

        def show(done: int, total: int | None, note: str = "") -> None:
            nonlocal advance, seen
            if advance is None:
                advance = stack.enter_context(progress(label, total))
            advance(done - seen, note)
            seen = done

        yield show
