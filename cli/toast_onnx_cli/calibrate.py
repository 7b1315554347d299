"""`toast-onnx calibrate`: images in, activation statistics out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx_cli.calibration_options import (
    DATA_HELP,
    calibration_options,
    gather_options,
    sample_progress,
)
from toast_onnx_cli.commands import toast_command
from toast_onnx_cli.console import format_bytes, print_json, say_note
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL, beside
from toast_onnx_cli.shapes import shape_option
from toast_onnx_cli.streams import ratios_given
from toast_onnx_cli.workers import open_executor, workers_option

if TYPE_CHECKING:
    from toast_onnx_calibration.store import Header


def _shard(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """(i, n) of `i/n`, i from 1 to n."""
    if value is None:
        return None
    number, slash, of = value.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise click.BadParameter(f"'{value}' is no shard such as 2/4, the second of four")
    return int(number), int(of)


@toast_command(
    "calibrate",
    "calibrate model.onnx --data images/",
    "calibrate model.onnx --data images/ --ratios ratios.yaml -o small.npz",
    "calibrate model.onnx --data images/ --shard 2/4",
)
@click.argument("model", type=MODEL)
@click.option("--data", metavar="DATA", help=DATA_HELP)
@click.option(
    "--ratios",
    metavar="FILE",
    help="Measure only what pruning with these ratios needs; - for standard input.",
)
@click.option(
    "--shard",
    callback=_shard,
    metavar="I/N",
    help="Measure the I-th of N equal parts of the samples, such as 2/4; `statistics merge` adds them up.",
)
@click.option("-o", "--output", type=FILE, help="Statistics; default MODEL.statistics.npz.")
@calibration_options
@click.option("--seed", type=click.IntRange(0), help="Seed of the draw of samples and tokens; 0 by default.")
@shape_option
@workers_option
@result_options
def command(
    model: Path,
    data: str | None,
    ratios: str | None,
    shard: tuple[int, int] | None,
    ray: str | None,
    output: Path | None,
    seed: int | None,
    shapes: dict[str, tuple[int, ...]],
    as_json: bool,
    **given: Any,
) -> None:
    """Measure the activations of MODEL on images and write the statistics that pruning needs.

    No labels are read. The file names the model by its hash; `toast-onnx prune --statistics` takes it for that model
    only.
    """
    from toast_onnx_calibration.calibrating_shards import calibrate_on
    from toast_onnx_calibration.needs import needed

    ending = "" if shard is None else f".{shard[0]}-of-{shard[1]}"
    out = output or beside(model, f"{ending}.statistics.npz")
    check_destinations([*read_files(model), ratios, data, given["preprocess"]], {"-o": out})
    settings = None if ratios is None else ratios_given(ratios)
    data = data or (settings.calibration.data if settings is not None else None)
    if data is None:
        raise click.UsageError("give samples with --data")
    if shard is not None and ray is not None:
        raise click.UsageError("--shard is for machines without Ray, and --ray makes shards of its own: give one")
    dense = study(load_model(model), shapes)
    wanted = None if settings is None else needed(dense, settings)
    options = replace(gather_options(settings, seed, given), shard=shard)
    with open_executor(ray) as executor, sample_progress("calibrating") as show:
        header = calibrate_on(executor, dense, data, out, wanted, options, show)
    print_header(header, out, as_json)


def print_header(header: Header, out: Path, as_json: bool) -> None:
    """Say what a statistics file holds."""
    from dataclasses import asdict

    if as_json:
        print_json({"statistics": str(out), **asdict(header)})
        return
    for note in header.notes:
        say_note(note)
    if header.share is not None and header.share.missing:
        missing = ", ".join(map(str, header.share.missing))
        say_note(f"{out} holds {header.share.text}; `statistics merge` adds up the others: {missing}")
    click.echo(
        f"{out}: {header.samples} samples, {len(header.parts)} blocks, {format_bytes(out.stat().st_size)}"
        + (f"; class token weighted {header.class_weight:g}" if header.class_weight != 1 else "")
    )
