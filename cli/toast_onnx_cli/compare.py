"""`toast-onnx compare`: pruned models held against their dense original on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toast_onnx_cli.calibration_options import DATA_HELP, sample_progress
from toast_onnx_cli.collections import (
    check_collection_page,
    collection_options,
    show_collection,
    write_collection_page,
)
from toast_onnx_cli.commands import provider_option, toast_command
from toast_onnx_cli.console import print_json, say_note, show_table
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL
from toast_onnx_cli.pixels import image_options

if TYPE_CHECKING:
    from toast_onnx_calibration.comparison import Comparison


@toast_command(
    "compare",
    "compare model.onnx model.pruned.onnx --data images/",
    "compare model.onnx small.onnx tiny.onnx --data images/ --html page.html",
)
@click.argument("dense", type=MODEL)
@click.argument("pruned", type=MODEL, nargs=-1, required=True)
@click.option("--data", required=True, metavar="DATA", help=DATA_HELP)
@image_options
@click.option("--samples", type=click.IntRange(1), help="Draw so many samples instead of taking all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For that draw.")
@provider_option
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples a run, where it is free.")
@click.option("--threads", type=click.IntRange(1), help="Threads of ONNX Runtime and of image decoding.")
@click.option("--rounds", type=click.IntRange(0), default=20, show_default=True, help="Timed runs; 0 for no latency.")
@collection_options
@click.option("--html", type=FILE, help="Page with a chart of agreement against cost.")
@result_options
def command(
    dense: Path,
    pruned: tuple[Path, ...],
    data: str,
    preprocess: str | None,
    samples: int | None,
    seed: int,
    provider: str,
    batch: int,
    threads: int | None,
    rounds: int,
    sort: str | None,
    as_csv: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Compare PRUNED with DENSE: agreement of every output, drift block by block, MACs, parameters, size, latency.

    No labels are read: the dense model's answers are the reference. Latency is measured in turns in the same run. Of
    several pruned models there is one table, and each sample is read and run densely once.
    """
    from toast_onnx.report.collection import of_comparisons
    from toast_onnx_calibration.comparing import compare_all

    if as_csv and as_json:
        raise click.UsageError("give either --csv or --json")
    models = [file for path in (dense, *pruned) for file in read_files(path)]
    check_destinations([*models, data, preprocess], {"--html": html})
    if html is not None:
        check_collection_page(", or leave --html out")
    with sample_progress("comparing") as show:
        found = compare_all(
            dense,
            pruned,
            data,
            preprocess=preprocess,
            samples=samples,
            seed=seed,
            provider=provider,
            batch=batch,
            threads=threads,
            rounds=rounds,
            progress=show,
            note=say_note,
        )
    together = of_comparisons([each.to_json() for each in found], pruned).ordered(sort)
    if html is not None:
        write_collection_page([together], f"{dense.name} and {len(pruned)} pruned", html)
    if len(pruned) == 1 and as_json:
        print_json(found[0].to_json())
        return
    more = {"comparisons": [each.to_json() for each in found]}
    if not as_json:
        for note in (note for each in found for note in each.notes):
            say_note(note)
    if len(pruned) == 1 and not as_csv:
        _print(found[0])
    else:
        show_collection([together], as_json, as_csv, more)
    if html is not None and not (as_json or as_csv):
        click.echo(f"page: {html}")


def _print(found: Comparison) -> None:
    click.echo(found.verdict)
    for table in found.tables:
        show_table(table)
