"""`toast-onnx statistics`: what `calibrate` wrote, added up."""

from __future__ import annotations

from pathlib import Path

import click

from toast_onnx_cli.calibrate import print_header
from toast_onnx_cli.commands import ToastCommand, json_option
from toast_onnx_cli.destinations import check_destinations, overwrite_option
from toast_onnx_cli.models import FILE


@click.group("statistics")
def command() -> None:
    """Work with statistics files that `calibrate` wrote."""


@command.command(
    "merge",
    cls=ToastCommand,
    examples=("statistics merge a.npz b.npz -o all.npz",),
)
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILES...")
@click.option("-o", "--output", "out", required=True, type=FILE, help="The statistics of all.")
@overwrite_option
@json_option
def merge(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Add up statistics of one model: the shards of a run, or runs on different samples.

    All shards of a run (`calibrate --shard`) give what one run over all samples gives.
    """
    from toast_onnx_calibration.store import merge_statistics

    check_destinations(files, {"-o": out})
    print_header(merge_statistics(files, out), out, as_json)
