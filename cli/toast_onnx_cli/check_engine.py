"""`toast-onnx check-engine`: an engine's outputs against ONNX Runtime's on the same inputs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.errors import BackendError
from toast_onnx.report.tables import Table
from toast_onnx_cli.calibration_options import DATA_HELP, check_sample_options
from toast_onnx_cli.commands import toast_command
from toast_onnx_cli.console import print_json, say_note, show_table
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL
from toast_onnx_cli.numbers import FiniteRange
from toast_onnx_cli.pixels import image_options

if TYPE_CHECKING:
    import numpy as np

    Feeds = dict[str, np.ndarray]


@toast_command("check-engine", "check-engine model.engine model.pruned.onnx --data images/")
@click.argument("engine", type=FILE)
@click.argument("model", type=MODEL)
@click.option("--data", metavar="DATA", help=f"{DATA_HELP} Random inputs without.")
@image_options
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="How many inputs to compare on.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Inputs a run, where it is free.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For the draw of samples.")
@click.option("--backend", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "tf32", "fp16", "bf16"]), help="As the engine's JSON says.")
@click.option("--tolerance", type=FiniteRange(0), help="Largest difference over the output's scale; by precision.")
@click.option("--script", type=FILE, help="Without a GPU: write the command to this file too.")
@result_options
def command(
    engine: Path,
    model: Path,
    data: str | None,
    preprocess: str | None,
    samples: int,
    batch: int,
    seed: int,
    backend: str,
    precision: str | None,
    tolerance: float | None,
    script: Path | None,
    as_json: bool,
) -> None:
    """Compare ENGINE with MODEL, the ONNX file it was built from; exit status 1 where they differ.

    The engine runs on the GPU, the model on the CPU in ONNX Runtime. The tolerance follows the engine's precision:
    0.001 of the output's scale for fp32, 0.01 for tf32, 0.02 for fp16, 0.1 for bf16. In Polygraphy's terms: an atol of
    each output's own, that share of its largest magnitude, and an rtol of 0.
    """
    from toast_onnx.engines import cuda
    from toast_onnx.engines.backends import choose
    from toast_onnx.engines.build import model_hash
    from toast_onnx.engines.engine_check import TOLERANCES, EngineRunner, compare, require_gpu
    from toast_onnx_calibration.sessions import make_session

    check_sample_options({"preprocess": preprocess}, data)
    check_destinations([*read_files(model), engine, data, preprocess], {"--script": script})
    if cuda.driver() is None:
        _leave_command(script)
    gpu = require_gpu()
    record = _record(engine)
    wanted = tolerance if tolerance is not None else TOLERANCES[precision or record.get("precision", "fp32")]
    chosen = choose(record.get("backend", "auto") if backend == "auto" else backend)
    session = make_session(model)
    shapes = record.get("profile", {})
    size = min(batch, samples, *(entry["max"][0] for entry in shapes.values()))
    if data is None:
        feeds = _made_up(session, shapes, samples, size, seed)
    else:
        feeds = _from_data(model, session, data, preprocess, samples, size, seed)
    result = compare(session, EngineRunner(chosen, engine, gpu), feeds, wanted)
    if as_json:
        print_json({"engine": str(engine), "model": str(model), "model_sha256": model_hash(model), **result})
    else:
        _print(result)
    if not result["passed"]:
        raise BackendError(
            f"{engine} differs from {model} by more than {wanted:g} of an output's scale; do not deploy it: "
            "build with another precision or TensorRT version"
        )


def _leave_command(script: Path | None) -> None:
    """Print, and on request write, the command to run where a GPU is."""
    from toast_onnx.files import write_bytes

    words = shlex.join(["toast-onnx", *sys.argv[1:]])
    click.echo(words)
    if script is not None:
        write_bytes(script, f"#!/bin/sh\n{words}\n".encode())


def _record(engine: Path) -> dict[str, Any]:
    """The JSON beside an engine; empty where there is none."""
    from toast_onnx.engines.record import read_record

    record = read_record(engine)
    return {} if record is None else record.model_dump(exclude_none=True)


def _made_up(session: Any, shapes: dict[str, Any], samples: int, batch: int, seed: int) -> Iterator[Feeds]:
    """Standard normal inputs, of the shapes the engine was tuned for."""
    from toast_onnx.engines.ortbench import made_up_feeds, session_inputs, shapes_at

    specs = session_inputs(session)
    usual = {name: tuple(entry["opt"]) for name, entry in shapes.items()}
    fixed = next((s.dims[0] for s in specs if s.dims and s.dims[0] is not None), None)
    size = fixed or batch
    for number in range(-(-samples // size)):
        yield made_up_feeds(specs, shapes_at(specs, size, usual), seed + number)


def _from_data(
    model: Path, session: Any, data: str, preprocess: str | None, samples: int, batch: int, seed: int
) -> Iterator[Feeds]:
    """Inputs from the user's data, prepared as calibration prepares them."""
    from toast_onnx_calibration.feeds import batches
    from toast_onnx_calibration.prepared import open_prepared
    from toast_onnx_calibration.sessions import fed_inputs

    inputs = fed_inputs(model, session)
    kept = session.get_modelmeta().custom_metadata_map
    source, _ = open_prepared(model, data, inputs, preprocess, metadata=kept, samples=samples, seed=seed, note=say_note)
    for part in batches(source, inputs, batch):
        yield part.feeds


def _print(result: dict[str, Any]) -> None:
    rows = []
    for name, entry in result["outputs"].items():
        agreement = entry["top1_agreement"]
        rows.append(
            [
                name,
                f"{entry['relative']:.2e}",
                f"{entry['max_abs']:.3g}",
                f"{entry['scale']:.3g}",
                "-" if agreement is None else f"{agreement:.1%}",
            ]
        )
    title = f"{'same' if result['passed'] else 'DIFFERENT'} within {result['tolerance']:g}, {result['items']} inputs"
    columns = ("output", "difference/scale", "largest", "scale", "same largest entry")
    show_table(Table(title, columns, rows, spare=("largest", "scale")))
