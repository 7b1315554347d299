"""`toast-onnx report`: one HTML page of a run, or of many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from toast_onnx.errors import ConfigError
from toast_onnx.report.page_sources import Sources
from toast_onnx_cli.collections import can_draw, collection_options, show_collection, write_collection_page
from toast_onnx_cli.commands import json_option, toast_command
from toast_onnx_cli.destinations import check_destinations, read_files
from toast_onnx_cli.links import links_option
from toast_onnx_cli.models import FILE


@toast_command("report", "report model.pruned.json", "report model.sweep/ --sort macs")
@click.argument("runs", type=FILE, nargs=-1, required=True, metavar="RUN...")
@click.option("-o", "--output", type=FILE, help="Page; RUN's name with .html, or report.html.")
@click.option(
    "--with",
    "extra",
    multiple=True,
    type=FILE,
    metavar="JSON",
    help="Show this too: what compare, eval, bench or check-engine printed with --json; may be repeated.",
)
@collection_options
@links_option
@click.option("--no-images", is_flag=True, help="Show no pictures of samples whose answers changed.")
@click.option("--title", help="Heading; the pruned file's name otherwise.")
@json_option
def command(
    runs: tuple[Path, ...],
    output: Path | None,
    extra: tuple[Path, ...],
    sort: str | None,
    as_csv: bool,
    no_images: bool,
    title: str | None,
    as_json: bool,
) -> None:
    """Make one HTML page of RUN, the JSON beside a pruned model, or the output folder of `deploy`; or of many runs.

    It shows widths and cost of every block before and after, the proof, and whatever lies beside RUN and speaks of the
    same models: accuracy, agreement, latency, engines, sensitivity. The page needs no network and no other file.

    Of several RUNs, and of a folder with the reports of several, it is a table of their models and a chart of what
    each costs and how good it is; the table is printed, too.
    """
    if len(runs) == 1 and not (runs[0].is_dir() and not (runs[0] / "deploy.json").is_file()):
        if sort is not None or as_csv or as_json:
            raise click.UsageError("--sort, --csv and --json are about many runs: give a folder, or several reports")
        _one(runs[0], output, extra, title, not no_images)
        return
    if extra:
        raise click.UsageError("--with goes with one run")
    if as_csv and as_json:
        raise click.UsageError("give either --csv or --json")
    _many(runs, output, sort, title, as_csv, as_json)


def _one(run: Path, output: Path | None, extra: tuple[Path, ...], title: str | None, images: bool) -> None:
    from toast_onnx.files import write_bytes
    from toast_onnx.report.page import render_page
    from toast_onnx.report.page_sources import find_sources

    with _as_documents(run):
        sources = find_sources(run, extra)
    target = output or sources.path.with_suffix(".html")
    check_destinations([sources.path, run, *extra, *_files(sources)], {"-o": target}, ["-o"])
    with _as_documents(sources.path):
        page = render_page(sources, title, images).encode()
    write_bytes(target, page)
    click.echo(str(target))


def _many(
    runs: tuple[Path, ...], output: Path | None, sort: str | None, title: str | None, as_csv: bool, as_json: bool
) -> None:
    from toast_onnx.report.collection import of_runs
    from toast_onnx.report.page_sources import find_runs

    with _as_documents(runs[0]):
        found = find_runs(runs)
    folder = runs[0] if runs[0].is_dir() else runs[0].parent
    target = output or folder / "report.html"
    check_destinations(
        [*(each.path for each in found), *(f for each in found for f in _files(each))], {"-o": target}, ["-o"]
    )
    drawn = can_draw()
    with _as_documents(folder):
        together = [each.ordered(sort) for each in of_runs(found)]
        if drawn:
            write_collection_page(together, title or f"{len(found)} pruned models", target)
    show_collection(together, as_json, as_csv)
    if drawn and not (as_csv or as_json):
        click.echo(f"page: {target}")


def _files(sources: Sources) -> list[Path]:
    """What a page is made from besides the run's report, and the models it speaks of."""
    folder = sources.path.parent
    with _as_documents(sources.path):
        models = [file for side in ("dense", "pruned") for file in read_files(folder / sources.run[side]["file"])]
    return [*(folder / name for name in sources.names), *models]


@contextmanager
def _as_documents(path: Path) -> Iterator[None]:
    """What a page shows was written by commands; where a value has been changed by hand, no page can be made of it.

    Raises:
        ConfigError: a key is missing or has a value of another kind.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as e:
        raise ConfigError(
            f"{path}, or a document beside it, is not as its command wrote it ({type(e).__name__}: {str(e)[:100]}); "
            "run that command again"
        ) from e
