"""`toast-onnx compare`: a pruned model held against its dense original on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx_cli.calibration_options import DATA_HELP, sample_progress
from toast_onnx_cli.console import format_bytes, format_count, print_json, print_table
from toast_onnx_cli.pixels import max_pixels_option

if TYPE_CHECKING:
    from toast_onnx_calibration.compare import Comparison


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
@click.option("--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]), default="cpu", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples a run, where it is free.")
@click.option("--threads", type=click.IntRange(1), help="Threads of ONNX Runtime and of image decoding.")
@click.option("--rounds", type=click.IntRange(0), default=20, show_default=True, help="Timed runs; 0 for no latency.")
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
    from toast_onnx_calibration.compare import compare

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
        )
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)


def _print(found: Comparison) -> None:
    for note in found.notes:
        click.echo(f"Note: {note}", err=True)
    print_table(("", "dense", "pruned", "pruned / dense"), _figures(found))
    print_table(
        ("output", "same top-1", "KL", "cosine", "relative error"),
        [[name, *_agreement(entry, ("top1_agreement", "kl"))] for name, entry in found.outputs.items()],
        title=f"outputs on {found.samples} samples",
    )
    rows = [
        [str(block["index"]), block["name"], part, *_agreement(block[part])]
        for block in found.blocks
        for part in ("attention", "ffn")
        if part in block
    ]
    if rows:
        print_table(
            ("block", "name", "branch", "cosine", "relative error"),
            rows,
            title="branch outputs",
            align=("right", "left", "left", "right", "right"),
        )


def _figures(found: Comparison) -> list[list[str]]:
    a, b = found.models["dense"], found.models["pruned"]
    rows = []
    for label, key, show in (("MACs", "macs", format_count), ("parameters", "params", format_count)):
        rows.append([label, show(a[key]), show(b[key]), f"{b[key] / a[key]:.3f}"])
    rows.append(["file", format_bytes(a["bytes"]), format_bytes(b["bytes"]), f"{b['bytes'] / a['bytes']:.3f}"])
    if found.latency is not None:
        first, second = found.latency
        ratio = f"{1 / second['speedup']:.3f}"
        times = [f"{t['median_ms']:.2f} ms" for t in (first, second)]
        rows.append([f"latency, batch {first['batch']}", *times, ratio])
    return rows


def _agreement(entry: dict[str, Any], more: tuple[str, ...] = ()) -> list[str]:
    cells = {
        "top1_agreement": lambda v: f"{v:.2%}",
        "kl": lambda v: f"{v:.4f}",
        "cosine": lambda v: f"{v:.4f}",
        "relative_error": lambda v: f"{v:.3e}",
    }
    return [cells[key](entry[key]) if key in entry else "-" for key in (*more, "cosine", "relative_error")]
