"""`toast-onnx quantize`: eight bits for the linear layers of a model, dense or pruned, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toast_onnx.errors import ToastError
from toast_onnx.report.measured import read_measured
from toast_onnx.report.tables import Table
from toast_onnx_cli.calibration_options import LABELS_HELP, data_help
from toast_onnx_cli.commands import toast_command
from toast_onnx_cli.console import print_json, say_note, show_table
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL, beside
from toast_onnx_cli.numbers import FiniteRange
from toast_onnx_cli.pixels import image_options

#: How many samples the ranges follow from where nothing says otherwise.
SAMPLES = 64


@toast_command("quantize", "quantize model.pruned.onnx --data images/ --dense model.onnx")
@click.argument("model", type=MODEL)
@click.option("--data", required=True, metavar="DATA", help=data_help("Measure ranges on"))
@click.option("--to", type=click.Choice(["int8", "fp8"]), default="int8", show_default=True)
@click.option("-o", "--output", type=FILE, help="Quantized model; default MODEL.int8.onnx.")
@click.option(
    "--method", type=click.Choice(["percentile", "entropy", "minmax"]), default="percentile", show_default=True
)
@click.option("--percentile", type=FiniteRange(50, 100), default=99.999, show_default=True, help="Inside the range.")
@click.option("--equalize", type=FiniteRange(0, 1), default=0.5, show_default=True, help="Across LayerNorm.")
@click.option("--no-equalize", is_flag=True, help="Leave the channels of LayerNorm as they are.")
@click.option("--keep", multiple=True, metavar="PATTERN", help="Linear layers that stay, by node name.")
@click.option("--ends", is_flag=True, help="Quantize the first and the last layer, too.")
@click.option("--dense", type=MODEL, help="The dense model: a step more in the table.")
@click.option("--eval-data", metavar="DATA", help="What the steps are compared on; --data by default.")
@click.option("--labels", metavar="LABELS", help=f"Of --eval-data: {LABELS_HELP}")
@image_options
@click.option(
    "--samples",
    type=click.IntRange(1),
    help="Draw so many for the ranges; 64, or what MODEL was pruned with where that is less.",
)
@click.option("--seed", type=click.IntRange(0), help="For that draw; what MODEL was pruned with, else 0.")
@click.option("--sensitivity", is_flag=True, help="Also quantize one layer at a time, and list what each costs.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples a run.")
@click.option("--threads", type=click.IntRange(1), help="Threads of ONNX Runtime and of image decoding.")
@result_options
def command(
    model: Path,
    data: str,
    to: str,
    output: Path | None,
    method: str,
    percentile: float,
    equalize: float,
    no_equalize: bool,
    keep: tuple[str, ...],
    ends: bool,
    dense: Path | None,
    eval_data: str | None,
    labels: str | None,
    preprocess: str | None,
    samples: int | None,
    seed: int | None,
    sensitivity: bool,
    batch: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Quantize the linear layers of MODEL to 8 bits, and show what every step from the dense model on costs.

    Weights get one scale a channel, activations one a tensor. Softmax, norms, the products inside attention and the
    first and the last layer stay as they are. The result is an ONNX file with QuantizeLinear and DequantizeLinear
    nodes, for `build`, `bench`, `compare` and `eval`.
    """
    from toast_onnx_calibration.quantizing import QuantizeOptions, quantize, table_of_steps

    out = output or beside(model, f".{to}.onnx")
    others = [] if dense is None else read_files(dense)
    check_destinations([*read_files(model), *others, data, eval_data, labels, preprocess], {"-o": out})
    pruned_with = read_measured(model)
    options = QuantizeOptions(
        to=to,
        method=method,
        percentile=percentile,
        equalize=None if no_equalize else equalize,
        keep=keep,
        ends=ends,
        preprocess=preprocess,
        samples=samples or min(SAMPLES, pruned_with.samples or SAMPLES),
        seed=pruned_with.seed if seed is None else seed,
        batch=batch,
        threads=threads,
        sensitivity=sensitivity,
    )
    result = quantize(model, data, out, options)
    for note in result.notes:
        say_note(note)
    steps = {"dense": dense, "float": model, to: out} if dense is not None else {"float": model, to: out}
    held = eval_data or data
    try:
        rows = table_of_steps(steps, held, labels, preprocess=preprocess, batch=batch, threads=threads)
    except ToastError as error:
        say_note(f"{out} is written, but the steps could not be compared: {error}")
        rows = []
    document: dict[str, Any] = {
        "format": "toast-onnx/quantize/1",
        "model": str(model),
        "quantized": str(out),
        "to": to,
        "layers": list(result.layers),
        "kept": list(result.kept),
        "equalized": result.equalized,
        "samples": result.samples,
        "seed": options.seed,
        "steps": rows,
    }
    if sensitivity:
        document["sensitivity"] = {"measure": "relative error", "layers": dict(result.damages)}
    if as_json:
        print_json(document)
        return
    click.echo(
        f"{out}: {len(result.layers)} linear layers in {to}, {len(result.kept)} kept, {result.equalized} norms "
        f"equalized, ranges from {result.samples} samples"
    )
    if rows:
        cells = [
            [r["step"], r["file"], *("-" if r[k] is None else f"{r[k]:.2%}" for k in ("agreement", "top1"))]
            for r in rows
        ]
        show_table(
            Table(None, ("step", "file", "agrees with first", "top-1"), cells, ("left", "left", "right", "right"))
        )
    if sensitivity:
        alone = [[name, f"{damage:.2e}"] for name, damage in result.damages.items()]
        show_table(Table(None, ("layer", "alone in 8 bits: error of the output"), alone))
        click.echo("--keep NAME leaves a layer as it is")
