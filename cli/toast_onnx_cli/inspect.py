"""`toast-onnx inspect`: the blocks of a model, what can be pruned and why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toast_onnx.matching.study import study
from toast_onnx.model import file_hash, load_model
from toast_onnx.report.inspection import inspection, inspection_table
from toast_onnx_cli.calibration_options import check_sample_options, data_help
from toast_onnx_cli.commands import toast_command
from toast_onnx_cli.console import print_json, say_note, show_table
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL
from toast_onnx_cli.pixels import image_options
from toast_onnx_cli.shapes import shape_option

if TYPE_CHECKING:
    from toast_onnx_calibration.looking import Look


@toast_command("inspect", "inspect model.onnx", "inspect model.onnx --data images/ --contact-sheet seen.png")
@click.argument("model", type=MODEL)
@shape_option
@click.option("--data", metavar="DATA", help=data_help("Also say what the first layer sees of"))
@click.option(
    "--contact-sheet",
    type=FILE,
    metavar="FILE",
    help="Draw the first samples as the model sees them (png, jpg or webp).",
)
@image_options
@click.option("--samples", type=click.IntRange(1, 64), default=16, show_default=True, help="How many, from the start.")
@result_options
def command(
    model: Path,
    data: str | None,
    contact_sheet: Path | None,
    preprocess: str | None,
    samples: int,
    shapes: dict[str, tuple[int, ...]],
    as_json: bool,
) -> None:
    """Show the transformer blocks of MODEL: widths, MACs, what can be pruned and why not.

    With --data also what images become: the recipe and where it is from, the range, mean and standard deviation that
    the first layer sees, and on request the first samples as pictures, their normalization undone.
    """
    check_sample_options({"preprocess": preprocess}, data)
    if contact_sheet is not None and data is None:
        raise click.UsageError("--contact-sheet shows samples; add --data images/")
    check_destinations([*read_files(model), data, preprocess], {"--contact-sheet": contact_sheet})
    if contact_sheet is not None:
        from toast_onnx_calibration.looking import picture_format

        picture_format(contact_sheet)  # before the work, not after it
    document = inspection(study(load_model(model), shapes))
    seen = None if data is None else _look(model, data, preprocess, samples, contact_sheet)
    if as_json:
        looked = {} if seen is None else {"seen": seen.to_json()}
        print_json({**document, **looked, "model_sha256": file_hash(model)})
        return
    show_table(inspection_table(document))
    for line in seen.lines if seen is not None else ():
        click.echo(line)
    if contact_sheet is not None:
        click.echo(f"contact sheet: {contact_sheet}")


def _look(model: Path, data: str, preprocess: str | None, samples: int, sheet: Path | None) -> Look:
    """What the first layer sees, drawn where a file for it is named."""
    from toast_onnx.files import write_bytes
    from toast_onnx_calibration.looking import image_bytes, look

    seen = look(model, data, preprocess=preprocess, samples=samples, note=say_note)
    if sheet is not None:
        write_bytes(sheet, image_bytes(seen.sheet(), sheet))
    return seen
