"""`toast-onnx report`: one HTML page of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from toast_onnx.errors import ConfigError
from toast_onnx_cli.destinations import check_destinations, read_files
from toast_onnx_cli.links import links_option


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
@links_option
@click.option("--title", help="Heading; the pruned file's name otherwise.")
def command(run: Path, output: Path | None, extra: tuple[Path, ...], title: str | None) -> None:
    """Make one HTML page of RUN, the JSON beside a pruned model, or the output folder of `deploy`.

    It shows widths and cost of every block before and after, the proof, and whatever lies beside RUN and speaks of the
    same models: accuracy, agreement, latency, engines, sensitivity. The page needs no network and no other file.
    """
    from toast_onnx.files import write_bytes
    from toast_onnx.report.page import render_page
    from toast_onnx.report.page_sources import find_sources

    with _as_documents(run):
        sources = find_sources(run, extra)
    target = output or sources.path.with_suffix(".html")
    folder = sources.path.parent
    with _as_documents(sources.path):
        models = [file for side in ("dense", "pruned") for file in read_files(folder / sources.run[side]["file"])]
    check_destinations(
        [sources.path, run, *extra, *(folder / name for name in sources.names), *models], {"-o": target}, ["-o"]
    )
    with _as_documents(sources.path):
        page = render_page(sources, title).encode()
    write_bytes(target, page)
    click.echo(str(target))


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
