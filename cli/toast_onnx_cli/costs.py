"""`toast-onnx costs`: how long the model takes at every width, for plans with a latency budget."""

from __future__ import annotations

from pathlib import Path

import click

from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.planning.cost_table import CostTable, write_table
from toast_onnx.planning.schema import Align
from toast_onnx.planning.width_costs import PARTS, TOKENS
from toast_onnx_cli.commands import provider_option, toast_command
from toast_onnx_cli.console import print_json, print_table, progress
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL, beside
from toast_onnx_cli.planning_options import comma_list, counted
from toast_onnx_cli.shapes import shape_option
from toast_onnx_cli.workers import machines_option, open_executor


@toast_command("costs", "costs model.onnx --threads 1 --widths 8")
@click.argument("model", type=MODEL)
@click.option(
    "--runtime", type=click.Choice(["onnxruntime", "trtexec"]), default="onnxruntime", show_default=True,
    help="What to time with; trtexec builds an engine of every variant and needs a GPU.",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Items in one call.")
@click.option(
    "--parts", callback=comma_list, default="tokens,heads,qk,vo,fc2", show_default=True, help="What a plan may shrink."
)
@click.option("--align-heads", type=click.IntRange(1), default=8, show_default=True, help="Step of head dimensions.")
@click.option("--align-width", type=click.IntRange(1), default=8, show_default=True, help="Step of FFN widths.")
@click.option("--widths", type=click.IntRange(2), default=24, show_default=True, help="Widths a part at most.")
@click.option("--rounds", type=click.IntRange(1), help="Timed rounds; 15 for onnxruntime, 3 for trtexec.")
@provider_option
@click.option("--threads", type=click.IntRange(1), help="Threads inside one operator (onnxruntime).")
@click.option("--trtexec", "trtexec_path", help="Path of trtexec; PATH and NVIDIA's usual places otherwise.")
@click.option("-o", "--output", type=FILE, help="The table; default MODEL.costs.json.")
@machines_option
@shape_option
@result_options
def command(
    model: Path,
    runtime: str,
    batch: int,
    parts: tuple[str, ...],
    align_heads: int,
    align_width: int,
    widths: int,
    rounds: int | None,
    provider: str,
    threads: int | None,
    trtexec_path: str | None,
    output: Path | None,
    ray: str | None,
    shapes: dict[str, tuple[int, ...]],
    as_json: bool,
) -> None:
    """Time MODEL with one part at another width, and with tokens merged, and write the latency table.

    `plan --latency --costs` reads it. Run this where the model will run; no data are needed. Blocks of the same shape
    change together.
    """
    from toast_onnx_calibration.costs import measure_costs, onnxruntime_runtime, trtexec_runtime

    if not parts or any(p not in (*PARTS, TOKENS) for p in parts):
        raise click.UsageError(f"--parts takes some of {', '.join((TOKENS, *PARTS))}")
    out = output or beside(model, ".costs.json")
    check_destinations(read_files(model), {"-o": out})
    dense = study(load_model(model), shapes)
    if runtime == "trtexec":
        with_ = trtexec_runtime(batch, trtexec_path, rounds or 3, shapes=shapes)
    else:
        with_ = onnxruntime_runtime(batch, threads, provider, rounds or 15, shapes)
    with open_executor(ray) as executor, progress("timing widths") as advance:
        align = Align(head_dim=align_heads, width=align_width)
        table = measure_costs(dense, with_, parts, align, widths, counted(advance), executor)
    write_table(table, out)
    if as_json:
        print_json(table.model_dump(mode="json"))
    else:
        _print(table, out)


def _print(table: CostTable, out: Path) -> None:
    rows = [
        [_range(p.blocks), p.part, str(kept), f"{ms:.3f}", f"{ms / table.dense_milliseconds:.3f}"]
        for p in table.parts
        for kept, ms in p.milliseconds.items()
    ]
    for m in table.merged:
        gone, ms = sum(m.removed.values()), m.milliseconds
        rows.append(
            [_range(tuple(m.removed)), "tokens", f"-{gone}", f"{ms:.3f}", f"{ms / table.dense_milliseconds:.3f}"]
        )
    title = f"dense: {table.dense_milliseconds:.3f} ms, batch {table.batch}, {table.runtime.get('program')}"
    print_table(
        ["blocks", "part", "kept", "ms", "of dense"],
        rows,
        title=title,
        align=["left", "left", "right", "right", "right"],
    )
    click.echo(f"costs: {out}")


def _range(blocks: tuple[int, ...]) -> str:
    """Block numbers in short: 3, or 0..11."""
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}..{blocks[-1]}"
