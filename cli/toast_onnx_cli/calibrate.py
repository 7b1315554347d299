"""`toast-onnx calibrate`: images in, activation statistics out; or shards of them added up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx_cli.calibration_options import (
    DATA_HELP,
    calibration_options,
    check_sample_options,
    gather_options,
    sample_progress,
)
from toast_onnx_cli.commands import json_option, toast_command
from toast_onnx_cli.console import format_bytes, print_json, say_note
from toast_onnx_cli.destinations import check_destinations, overwrite_option, read_files
from toast_onnx_cli.links import links_option
from toast_onnx_cli.models import MODEL, beside
from toast_onnx_cli.shapes import shape_option
from toast_onnx_cli.streams import ratios_given

if TYPE_CHECKING:
    from toast_onnx_calibration.store import Header


@toast_command(
    "calibrate",
    "calibrate model.onnx --data images/",
    "calibrate model.onnx --data images/ --ratios ratios.yaml -o small.npz",
)
@click.argument("model", type=MODEL)
@click.option("--data", metavar="DATA", help=DATA_HELP)
@click.option(
    "--ratios",
    metavar="FILE",
    help="Measure only what pruning with these ratios needs; - for standard input.",
)
@click.option(
    "--merge",
    "shards",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Add up statistics of the same model taken on other samples, instead of measuring; may be repeated.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Statistics; default MODEL.statistics.npz.")
@calibration_options
@click.option("--seed", type=click.IntRange(0), help="Seed of the draw of samples and tokens; 0 by default.")
@shape_option
@links_option
@overwrite_option
@json_option
def command(
    model: Path,
    data: str | None,
    ratios: str | None,
    shards: tuple[Path, ...],
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
    from toast_onnx_calibration.calibrating import calibrate
    from toast_onnx_calibration.needs import needed
    from toast_onnx_calibration.store import merge_statistics

    out = output or beside(model, ".statistics.npz")
    check_destinations([*read_files(model), ratios, data, given["preprocess"], *shards], {"-o": out})
    settings = None if ratios is None else ratios_given(ratios)
    data = data or (settings.calibration.data if settings is not None else None)
    if bool(shards) == (data is not None):
        raise click.UsageError("give either --data to measure, or --merge to add up statistics")
    check_sample_options(given, data)
    dense = study(load_model(model), shapes)
    if shards:
        header = merge_statistics(shards, out, dense.view.model.path)
    else:
        assert data is not None
        wanted = None if settings is None else needed(dense, settings)
        with sample_progress("calibrating") as show:
            header = calibrate(dense, data, out, wanted, gather_options(settings, seed, given), show)
    _print(header, out, as_json)


def _print(header: Header, out: Path, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json({"statistics": str(out), **asdict(header)})
        return
    for note in header.notes:
        say_note(note)
    click.echo(
        f"{out}: {header.samples} samples, {len(header.parts)} blocks, {format_bytes(out.stat().st_size)}"
        + (f"; class token weighted {header.class_weight:g}" if header.class_weight != 1 else "")
    )
