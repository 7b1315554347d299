"""`toast-onnx analyze`: how redundant the channels of the feed-forward networks are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.errors import ConfigError
from toast_onnx.importance.redundancy import DEAD
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model
from toast_onnx.report.analysis import analysis
from toast_onnx.report.tables import Table
from toast_onnx_cli.calibration_options import (
    STATISTICS_HELP,
    calibration_options,
    check_sample_options,
    data_help,
    gather_options,
    sample_progress,
)
from toast_onnx_cli.commands import toast_command
from toast_onnx_cli.console import print_json, progress, say_note, show_table
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL
from toast_onnx_cli.numbers import FiniteRange
from toast_onnx_cli.shapes import shape_option

if TYPE_CHECKING:
    from toast_onnx_calibration.statistics import CalibratedStatistics

COLUMNS = ("block", "name", "layer", "width", "nearly dead", "mean R2", "median R2", "effective rank", "of width")
#: Statistics of the inputs of fc1 and of fc2.
PARTS = ("inputs", "hidden")


@toast_command(
    "analyze",
    "analyze model.onnx --data images/",
    "analyze model.onnx --data images/ --plot redundancy.png",
)
@click.argument("model", type=MODEL)
@click.option("--data", metavar="DATA", help=data_help("Measure activations on"))
@click.option("--statistics", type=FILE, help=STATISTICS_HELP)
@click.option(
    "--dead",
    type=FiniteRange(0, 1),
    default=DEAD,
    show_default=True,
    help="Nearly dead: root mean square below this fraction of the layer's mean.",
)
@click.option("--plot", type=FILE, metavar="FILE", help="Draw three panels (png, svg or pdf).")
@calibration_options
@click.option("--seed", type=click.IntRange(0), help="Seed of the draw of samples and tokens; 0 by default.")
@shape_option
@result_options
def command(
    model: Path,
    data: str | None,
    statistics: Path | None,
    dead: float,
    plot: Path | None,
    seed: int | None,
    shapes: dict[str, tuple[int, ...]],
    as_json: bool,
    **given: Any,
) -> None:
    """Show how redundant the feed-forward networks of MODEL are on images: nearly dead channels, R2, effective rank.

    R2 says how well a channel is predicted by the others; the effective rank is how many directions the channels span.
    Both are of the inputs of fc1 and of fc2 (the hidden units). Every token counts once unless --class-weight says
    otherwise.
    """
    if (data is None) == (statistics is None):
        raise click.UsageError("give either --data or --statistics")
    check_sample_options(given, data)
    check_destinations([*read_files(model), data, statistics, given["preprocess"]], {"--plot": plot})
    if plot is not None:
        from toast_onnx.report.drawing import require_matplotlib

        require_matplotlib(", or leave --plot out")  # before minutes of measuring
    dense = study(load_model(model), shapes)
    with _statistics(dense, data, statistics, seed, given) as measured:
        blocks = [b for b in dense.match.blocks if b.ffn is not None]
        with progress("analyzing", len(blocks)) as advance:
            document = analysis(dense, measured, dead, lambda block: advance(1, block))
    if plot is not None:
        from toast_onnx.report.analyze_plot import plot_analysis

        plot_analysis(document, plot)
        click.echo(f"plot: {plot}", err=True)
    if as_json:
        print_json(document)
        return
    rows = [_row(block, layer) for block in document["blocks"] for layer in ("fc1", "fc2")]
    align = ("right", "left", "left", *("right",) * 6)
    title = f"{document['model']}: {document['source']}"
    show_table(Table(title, COLUMNS, rows, align, spare=("of width", "median R2", "width", "name")))  # type: ignore[arg-type]


@contextmanager
def _statistics(
    dense: Study, data: str | None, path: Path | None, seed: int | None, given: dict[str, Any]
) -> Iterator[CalibratedStatistics]:
    """Statistics from a file, or measured now into a temporary one."""
    from toast_onnx_calibration.calibrating import calibrate
    from toast_onnx_calibration.needs import everything
    from toast_onnx_calibration.statistics import CalibratedStatistics

    if path is not None:
        yield CalibratedStatistics(dense, path)
        return
    assert data is not None
    wanted = everything(dense, PARTS)
    if not wanted:
        raise ConfigError(f"{dense.view.model.path}: no feed-forward network to analyze; see `toast-onnx inspect`")
    # A class token counted twenty times would be the spectrum of one token in twenty.
    options = gather_options(None, seed, given | {"class_weight": given["class_weight"] or 1.0})
    with tempfile.TemporaryDirectory(prefix="toast-analyze-") as folder:
        out = Path(folder) / "statistics.npz"
        with sample_progress("measuring") as show:
            header = calibrate(dense, data, out, wanted, options, show)
        for note in header.notes:
            say_note(note)
        yield CalibratedStatistics(dense, out)


def _row(block: dict[str, Any], layer: str) -> list[str]:
    found = block[layer]
    names = [str(block["index"]), block["name"], layer]
    if "reason" in found:
        return [*names, "-", "-", "-", "-", "-", found["reason"]]
    return [
        *names,
        str(found["width"]),
        f"{found['dead']:.1%}",
        *("-" if found[k] is None else f"{found[k]:.3f}" for k in ("r2_mean", "r2_median")),
        f"{found['effective_rank']:.1f}",
        f"{found['rank_share']:.1%}",
    ]
