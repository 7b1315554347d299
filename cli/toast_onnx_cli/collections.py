"""What the commands that show several models share: order, CSV, JSON, and their page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from toast_onnx.errors import BackendError
from toast_onnx.report.collection import SORTS, Collection
from toast_onnx.report.tables import Table
from toast_onnx_cli.commands import options
from toast_onnx_cli.console import print_json, say_note, show_table

#: `--sort` and `--csv`, as the parameters `sort` and `as_csv`.
collection_options = options(
    click.option("--sort", type=click.Choice(SORTS), help="Order of several models, the best first; as given."),
    click.option("--csv", "as_csv", is_flag=True, help="Print the table as CSV."),
)


def check_collection_page(instead: str = "") -> None:
    """Make sure, before the work, that a page can be made.

    Args:
        instead: how to do without, continuing the sentence.

    Raises:
        BackendError: matplotlib or Jinja is not installed.
    """
    from toast_onnx.report.drawing import require_matplotlib
    from toast_onnx.report.page import require_jinja

    require_matplotlib(instead)
    require_jinja()


def can_draw() -> bool:
    """Whether a page can be made; said where it cannot, for commands that go on without."""
    try:
        check_collection_page()
    except BackendError as error:
        say_note(f"there will be a table and no page: {error}")
        return False
    return True


def write_collection_page(
    collections: Sequence[Collection], title: str, path: Path, facts: Sequence[tuple[str, str]] = ()
) -> None:
    """Write the page of several models, whole or not at all.

    Args:
        collections: models by the dense one they come from.
        title: heading.
        path: where it goes.
        facts: what the run was, a name and a text each.
    """
    from toast_onnx.files import write_bytes
    from toast_onnx.report.collection_page import render_collection

    write_bytes(path, render_collection(collections, title, facts).encode())


def show_collection(
    collections: Sequence[Collection], as_json: bool, as_csv: bool, more: Mapping[str, Any] | None = None
) -> None:
    """Print a sentence and a table of each dense model, or one document, or CSV.

    Args:
        collections: models by the dense one they come from.
        as_json: one JSON document; of several dense models under `collections`.
        as_csv: one CSV table; each dense model stands in front of those made from it.
        more: what else the JSON document holds.
    """
    if as_json:
        documents = [each.to_document() for each in collections]
        print_json((documents[0] if len(documents) == 1 else {"collections": documents}) | dict(more or {}))
        return
    if as_csv:
        for number, each in enumerate(collections):
            text = each.csv()
            click.echo(text.partition("\n")[2] if number else text, nl=False)
        return
    for each in collections:
        click.echo(each.sentence)
        table = each.table
        title = each.dense.file if len(collections) > 1 else None
        show_table(Table(title, table.columns, table.rows, table.align, table.lines, table.spare))
