"""`toast-onnx eval`: top-1 and top-5 on labelled samples, or a metric of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toast_onnx_cli.calibration_options import DATA_HELP, LABELS_HELP, sample_progress
from toast_onnx_cli.commands import json_option, provider_option, toast_command
from toast_onnx_cli.console import print_json, print_table, say_note
from toast_onnx_cli.links import links_option
from toast_onnx_cli.models import MODEL
from toast_onnx_cli.pixels import image_options
from toast_onnx_cli.workers import open_executor, workers_option

if TYPE_CHECKING:
    from toast_onnx_calibration.evaluating import Evaluation


@toast_command("eval", "eval model.onnx --data images/ --labels folders")
@click.argument("model", type=MODEL)
@click.option("--data", required=True, metavar="DATA", help=DATA_HELP)
@click.option("--labels", metavar="LABELS", help=LABELS_HELP)
@click.option("--metric", help="Python module:function that gets all outputs, instead of top-1 and top-5.")
@image_options
@click.option("--output-name", "output", metavar="NAME", help="Output with the class scores; the first 2-D one.")
@provider_option
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Samples a run, where it is free.")
@click.option("--samples", type=click.IntRange(1), help="Draw so many samples instead of taking all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For that draw.")
@click.option("--threads", type=click.IntRange(1), help="Threads of ONNX Runtime and of image decoding.")
@workers_option
@links_option
@json_option
def command(
    model: Path,
    data: str,
    labels: str | None,
    metric: str | None,
    preprocess: str | None,
    output: str | None,
    provider: str,
    batch: int,
    samples: int | None,
    seed: int,
    threads: int | None,
    ray: str | None,
    as_json: bool,
) -> None:
    """Measure MODEL: top-1 and top-5 accuracy on labelled images, or your own metric on all outputs.

    A metric is called once with an iterator of results, each with `.outputs`, `.inputs`, `.rows` (the samples' names)
    and `.labels`; it goes through all of them and returns a number or a dict of numbers.
    """
    from toast_onnx.engines.build import model_hash
    from toast_onnx.model import refuse_links
    from toast_onnx_calibration.evaluating import evaluate

    if metric is not None and output is not None:
        raise click.UsageError("--output-name chooses the class scores; a metric gets every output")
    if metric is not None and ray is not None:
        raise click.UsageError("a metric sees all results one after another, so --ray cannot divide it; leave one out")
    refuse_links(model)
    with open_executor(ray) as executor, sample_progress("evaluating") as show:
        result = evaluate(
            model,
            data,
            labels,
            metric=metric,
            preprocess=preprocess,
            output=output,
            provider=provider,
            batch=batch,
            samples=samples,
            seed=seed,
            threads=threads,
            progress=show,
            note=say_note,
            executor=executor,
        )
    if as_json:
        print_json({"model": str(model), "model_sha256": model_hash(model), **result.to_json()})
    else:
        _print(result)


def _print(result: Evaluation) -> None:
    for note in result.notes:
        say_note(note)
    if result.accuracy is None:
        print_table(["metric", "value"], [[name, f"{value:.6g}"] for name, value in result.metrics.items()])
        return
    document = result.accuracy.to_json()
    rows = []
    for name, label in (("top1", "top-1"), ("top5", "top-5")):
        if name in document:
            entry = document[name]
            low, high = entry["interval95"]
            count = f"{entry['correct']}/{result.accuracy.samples}"
            rows.append([label, f"{entry['accuracy']:.2%}", f"{low:.2%} .. {high:.2%}", count])
    print_table(["accuracy", "share", "95 % interval", "correct"], rows)
