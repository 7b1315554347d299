"""`toast-onnx bench`: latency under ONNX Runtime, or of engines under trtexec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from toast_onnx.errors import BackendError
from toast_onnx.report.tables import Table, busy
from toast_onnx_cli.commands import provider_option, toast_command
from toast_onnx_cli.console import print_json, print_table, progress, show_table
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL
from toast_onnx_cli.numbers import FiniteRange
from toast_onnx_cli.shapes import shapes_option


def sizes(text: str) -> tuple[int, ...]:
    """Batch sizes from `1,8,64`.

    Raises:
        click.BadParameter: the text is no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is not a list of batch sizes such as 1,8,64")
    return tuple(int(part) for part in parts)


@toast_command("bench", "bench model.onnx model.pruned.onnx --batch 1,8")
@click.argument("models", nargs=-1, required=True, type=MODEL)
@click.option("--runtime", type=click.Choice(["onnxruntime", "trtexec"]), default="onnxruntime", show_default=True)
@click.option("--batch", type=sizes, default="1", show_default=True, help="Batch sizes, such as 1,8,64.")
@click.option("--rounds", type=click.IntRange(1), help="Turns of each model; 30 for onnxruntime, 3 for trtexec.")
@click.option(
    "--warmup", type=click.IntRange(0), help="Untimed rounds (onnxruntime, 5) or milliseconds (trtexec, 200)."
)
@shapes_option("--shape", "--shapes", "shapes", help_text="Full shape of an input with more open dimensions.")
@provider_option
@click.option("--threads", type=click.IntRange(1), help="Threads inside one operator (onnxruntime).")
@click.option("--trtexec", "trtexec_path", help="Path of trtexec; PATH and NVIDIA's usual places otherwise.")
@click.option(
    "--trtexec-version", default="11", show_default=True, help="Its version, where it is not on this machine."
)
@click.option("--duration", type=FiniteRange(0.1), default=3.0, show_default=True, help="Seconds a run (trtexec).")
@click.option("--no-cuda-graph", is_flag=True, help="Launch kernel by kernel (trtexec).")
@click.option("--transfers", is_flag=True, help="Include copies between host and device (trtexec).")
@click.option("--no-spin-wait", is_flag=True, help="Sleep instead of polling for the end of a query (trtexec).")
@click.option("--blocks", is_flag=True, help="Also measure each layer, grouped by transformer block (trtexec).")
@click.option("--dry-run", is_flag=True, help="Print trtexec's commands and stop.")
@click.option("--script", type=FILE, help="Write trtexec's commands to this file too.")
@result_options
def command(
    models: tuple[Path, ...],
    runtime: str,
    batch: tuple[int, ...],
    rounds: int | None,
    warmup: int | None,
    shapes: dict[str, tuple[int, ...]],
    provider: str,
    threads: int | None,
    trtexec_path: str | None,
    trtexec_version: str,
    duration: float,
    no_cuda_graph: bool,
    transfers: bool,
    no_spin_wait: bool,
    blocks: bool,
    dry_run: bool,
    script: Path | None,
    as_json: bool,
) -> None:
    """Measure MODELS against the first of them.

    Models take turns (A B A B), and speed-ups are the median over the rounds of the ratio within one round, with its
    quartiles. Under onnxruntime MODELS are .onnx or .ort files and latency runs from host memory to host memory; under
    trtexec they are engines (or .onnx files, built first) and latency is GPU time.
    """
    from toast_onnx.engines.build import model_hash
    from toast_onnx.engines.trtexec import BenchSettings
    from toast_onnx.model import refuse_links

    check_destinations([f for model in models for f in read_files(model)], {"--script": script})
    for model in models:
        refuse_links(model)
    if runtime == "onnxruntime":
        if dry_run or script is not None:
            raise click.UsageError("--dry-run and --script go with --runtime trtexec")
        results = _onnxruntime(models, batch, provider, threads, 5 if warmup is None else warmup, rounds or 30, shapes)
        document: dict[str, Any] = {"runtime": runtime, "provider": provider, "threads": threads, "results": results}
    else:
        settings = BenchSettings(
            warm_up_ms=200 if warmup is None else warmup,
            duration=duration,
            cuda_graph=not no_cuda_graph,
            transfers=transfers,
            spin_wait=not no_spin_wait,
        )
        found = _trtexec(
            models, batch, settings, rounds or 3, shapes, blocks, trtexec_path, trtexec_version, dry_run, script
        )
        if found is None:
            return
        document = {"runtime": runtime, **found}
    if as_json:
        hashes = {str(model): model_hash(model) for model in models}
        results = [{"model": r["model"], "model_sha256": hashes[r["model"]], **r} for r in document["results"]]
        print_json(document | {"results": results})
    else:
        _print(document["results"])


def _onnxruntime(
    models: Sequence[Path],
    batches: Sequence[int],
    provider: str,
    threads: int | None,
    warmup: int,
    rounds: int,
    shapes: dict[str, tuple[int, ...]],
) -> list[dict[str, Any]]:
    from toast_onnx.engines.ortbench import benchmark

    with progress("measuring", len(batches) * (warmup + rounds)) as advance:
        timings = benchmark(
            models,
            batches,
            provider=provider,
            threads=threads,
            warmup=warmup,
            rounds=rounds,
            shapes=shapes,
            after_round=advance,
        )
    return [timing.summary() for timing in timings]


def _trtexec(
    models: Sequence[Path],
    batches: Sequence[int],
    settings: Any,
    rounds: int,
    shapes: dict[str, tuple[int, ...]],
    blocks: bool,
    path: str | None,
    version: str,
    dry_run: bool,
    script: Path | None,
) -> dict[str, Any] | None:
    """Results, or None for a dry run; without a GPU or trtexec the commands are written before the error."""
    from toast_onnx.engines import cuda, trtbench, trtexec
    from toast_onnx.files import write_bytes

    targets = [trtbench.open_target(model, batches, shapes) for model in models]
    backend = trtbench.common_backend(targets)
    found = trtexec.find_trtexec(backend, path)
    program = trtexec.ask(found) if found is not None else trtexec.assumed(version, backend)
    here = found is not None and cuda.gpu_name() is not None
    if dry_run or script is not None or not here:
        commands = trtbench.plan(program, targets, batches, settings)
        text = trtexec.script(commands, f"For {program.describe()}; run the commands in turns to compare engines.")
        if script is not None:
            write_bytes(script, text.encode())
        if dry_run or not here:
            click.echo(text, nl=False)
    if dry_run:
        return None
    if not here:
        missing = f"{program.path} was not found" if found is None else "there is no GPU here"
        kept = f"; they are in {script} too" if script is not None else ""
        raise BackendError(f"{missing}, so nothing was measured; run the printed commands where both are{kept}")
    with progress("measuring", len(targets) * len(batches) * rounds) as advance:
        results = trtbench.measure(program, targets, batches, settings, rounds=rounds, layers=blocks, after_run=advance)
    return {"trtexec": program.path, "version": ".".join(map(str, program.version)), "results": results}


def _print(results: list[dict[str, Any]]) -> None:
    rows = [
        [
            r["model"],
            str(r["batch"]),
            f"{r['median_ms']:.3f}",
            f"{r['spread']:.1%}",
            f"{r['images_per_second']:.1f}",
            f"{r['speedup']:.3f} ({r['speedup_quartiles'][0]:.3f} .. {r['speedup_quartiles'][1]:.3f})",
        ]
        for r in results
    ]
    columns = ("model", "batch", "median ms", "spread", "images/s", "speed-up (quartiles)")
    show_table(Table(None, columns, rows, spare=("images/s", "spread")))
    for r in results:
        if (said := busy(r["spread"])) is not None:
            click.echo(f"Warning: {r['model']} at batch {r['batch']}: {said}", err=True)
        for warning in r.get("warnings", []):
            click.echo(f"Warning: {r['model']} at batch {r['batch']}: {warning}", err=True)
        if r.get("blocks"):
            title = f"{r['model']} at batch {r['batch']}"
            total = sum(r["blocks"].values())
            cells = [[name, f"{ms:.4f}", f"{ms / total:.1%}"] for name, ms in r["blocks"].items()]
            print_table(["block", "ms", "share"], cells, title=title)
