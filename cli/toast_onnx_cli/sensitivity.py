"""`toast-onnx sensitivity`: how much the output suffers when one part of one block is pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toast_onnx.errors import ConfigError
from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx_cli.commands import toast_command
from toast_onnx_cli.console import print_json, progress, say_note, show_table
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL, beside
from toast_onnx_cli.planning_options import (
    comma_list,
    counted,
    dry_run_option,
    fractions,
    gather_planning,
    open_trials,
    planning_inputs,
    planning_options,
    show_foreseen,
)

DEFAULT_RATIOS = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"
ALL_PARTS = "tokens,qk,vo,fc1,fc2,fc1+fc2"


@toast_command("sensitivity", "sensitivity model.onnx --data images/ --parts qk,fc2 --ratios 0.3,0.6")
@click.argument("model", type=MODEL)
@planning_options
@click.option("--ratios", callback=fractions, default=DEFAULT_RATIOS, show_default=True, help="Fractions removed.")
@click.option("--parts", callback=comma_list, default=ALL_PARTS, show_default=True, help="What to prune in turn.")
@click.option("--blocks", callback=comma_list, help="Numbers of blocks, such as 0,5,11; all by default.")
@click.option("-o", "--output", type=FILE, help="Results; default MODEL.sensitivity.json.")
@click.option("--plot", type=FILE, help="Draw the curves of every block to this image file.")
@dry_run_option
@result_options
def command(
    model: Path,
    ratios: tuple[float, ...],
    parts: tuple[str, ...],
    blocks: tuple[str, ...],
    output: Path | None,
    plot: Path | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Prune one part of one block of MODEL at a time, or merge tokens behind it, and measure what that does.

    The damage is the KL divergence from the dense model's class probabilities, or the relative error of an output that
    holds no class scores; no labels are needed. Results are written after every trial, and the same command goes on
    where it was stopped.
    """
    from toast_onnx_calibration.sensitivity_results import TRIAL_PARTS, known, resume, write_results
    from toast_onnx_calibration.sensitivity_trials import measure, missing, trial_grid

    unknown = [p for p in parts if p not in TRIAL_PARTS]
    if unknown:
        raise click.UsageError(f"--parts knows {', '.join(TRIAL_PARTS)}, not {unknown[0]}")
    out = output or beside(model, ".sensitivity.json")
    check_destinations([*read_files(model), *planning_inputs(given)], {"-o": out, "--plot": plot}, ["-o"])
    planning = gather_planning(given)
    if plot is not None:
        from toast_onnx.report.drawing import require_matplotlib

        require_matplotlib(", or leave --plot out")  # before the work, not after it
    dense = study(load_model(model), planning.shapes)
    grid = trial_grid(dense, planning.settings, parts, ratios, _numbers(blocks, len(dense.match.blocks)))
    if not grid:
        raise ConfigError("nothing to try: no block has a prunable part that these ratios would make smaller")
    single = tuple(dict.fromkeys(p for t in grid for p in t.kept))
    if dry_run:
        show_foreseen(dense, planning, single, missing(grid, known(out)), as_json)
        return
    with open_trials(dense, planning, single) as work:
        metric = "kl" if work.trials.classes else "relative_error"
        found = resume(out, work.identity(), metric, work.trials.dense_top1())
        if found.trials:
            say_note(f"{out} holds {len(found.trials)} trials already; going on from there")
        with progress("measuring", len(missing(grid, found))) as advance:
            measure(work.damages, grid, found, out, counted(advance), work.left)
    write_results(found, out)
    if plot is not None:
        from toast_onnx.report.sensitivity import plot_sensitivity

        plot_sensitivity(found.to_document(), plot)
    if as_json:
        print_json(found.to_document())
    else:
        show_table(found.table)
        click.echo(f"results: {out}" + (f"; plot: {plot}" if plot is not None else ""))


def _numbers(blocks: tuple[str, ...], count: int) -> list[int] | None:
    """Block numbers.

    Raises:
        ConfigError: one does not exist.
    """
    wrong = [b for b in blocks if not b.isdecimal() or int(b) >= count]
    if wrong:
        raise ConfigError(f"--blocks names block {wrong[0]}; the model has blocks 0 to {count - 1}")
    return [int(b) for b in blocks] or None
