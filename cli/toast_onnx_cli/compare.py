"""`toast-onnx compare`: a pruned model held against its dense original on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toast_onnx.providers import PROVIDERS
from toast_onnx_cli.calibration_options import DATA_HELP, sample_progress
from toast_onnx_cli.console import print_json, say_note, show_table
from toast_onnx_cli.links import links_option
from toast_onnx_cli.pixels import max_pixels_option

if TYPE_CHECKING:
    from toast_onnx_calibration.comparing import Comparison


@click.command("compare")
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("pruned", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DATA", help=DATA_HELP)
@click.option(
    "--preprocess", metavar="RECIPE", help="imagenet, imagenet-inception, clip, dinov2, mae, none, or a file."
)
@max_pixels_option
@click.option("--samples", type=click.IntRange(1), help="Draw so many samples instead of taking all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For that draw.")
@click.option("--provider", type=click.Choice(list(PROVIDERS)), default="cpu", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples a run, where it is free.")
@click.option("--threads", type=click.IntRange(1), help="Threads of ONNX Runtime and of image decoding.")
@click.option("--rounds", type=click.IntRange(0), default=20, show_default=True, help="Timed runs; 0 for no latency.")
@links_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    dense: Path,
    pruned: Path,
    data: str,
    preprocess: str | None,
    samples: int | None,
    seed: int,
    provider: str,
    batch: int,
    threads: int | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Compare PRUNED with DENSE: agreement of every output, drift block by block, MACs, parameters, size, latency.

    No labels are read: the dense model's answers are the reference. Latency is measured in turns in the same run.
    """
    from toast_onnx_calibration.comparing import compare

    with sample_progress("comparing") as show:
        found = compare(
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
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)


def _print(found: Comparison) -> None:
    for note in found.notes:
        say_note(note)
    click.echo(found.verdict)
    for table in found.tables:
        show_table(table)
