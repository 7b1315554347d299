"""`toast-onnx report`: one HTML page of a run."""

from __future__ import annotations

from pathlib import Path

import click

from toast_onnx_cli.destinations import check_destinations, read_files


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Page to write; RUN's name with .html.")
@click.option(
    "--with",
    "extra",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="JSON",
    help="Show this too: what compare, eval, bench or check-engine printed with --json; may be repeated.",
)
@click.option("--title", help="Heading; the pruned file's name otherwise.")
def command(run: Path, output: Path | None, extra: tuple[Path, ...], title: str | None) -> None:
    """Make one HTML page of RUN, the JSON beside a pruned model, or the output folder of `deploy`.

    It shows widths and cost of every block before and after, the proof, and whatever lies beside RUN and speaks of the
    same models: accuracy, agreement, latency, engines, sensitivity. The page needs no network and no other file.
    """
    from toast_onnx.model import write_bytes
    from toast_onnx.report.page import render_page
    from toast_onnx.report.page_sources import find_sources

    sources = find_sources(run, extra)
    target = output or sources.path.with_suffix(".html")
    folder = sources.path.parent
    models = [file for side in ("dense", "pruned") for file in read_files(folder / sources.run[side]["file"])]
    check_destinations([sources.path, run, *extra, *(folder / name for name in sources.names), *models], {"-o": target})
    write_bytes(target, render_page(sources, title).encode())
    click.echo(str(target))
