"""What the commands share for talking to people and machines: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import click

from toast_onnx.files import files_read
from toast_onnx.report.tables import Table
from toast_onnx.report.tables import format_bytes as format_bytes
from toast_onnx.report.tables import format_count as format_count
from toast_onnx_cli.commands import QUIET

PLAIN_INTERVAL = 10.0  # seconds between two progress lines where stderr is a file or a pipe


class Advance(Protocol):
    """Reports work done; what `progress` hands out."""

    def __call__(self, steps: int = 1, note: str = "", left: float | None = None) -> None:
        """Adds `steps` to what is done; `note` (a block, a file) is shown beside it.

        `left` are the seconds that the rest will take; without it, every step takes as long as those that are done.
        """


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Advance]:
    """Shows the progress of one piece of work on stderr.

    A moving bar where stderr is a terminal; elsewhere a line at the start, one every ten seconds and one at the end,
    so that a log stays readable. Nothing goes to stdout.

    Args:
        label: What is being done, for example "calibrating".
        total: Number of steps, where known.

    Yields:
        A function to call after each step.
    """
    if is_quiet():
        yield lambda steps=1, note="", left=None: None
        return
    show = _bar if sys.stderr.isatty() else _lines
    with show(label, total) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(label), total=total, note="", left="")
        started, done = time.monotonic(), 0

        def advance(steps: int = 1, note: str = "", left: float | None = None) -> None:
            nonlocal done
            done += steps
            seconds = _remaining(started, done, total) if left is None else left
            bar.update(task, advance=steps, note=note, left=time_left(seconds))

        yield advance


@contextmanager
def _lines(label: str, total: int | None) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = 0
    of_total = "" if total is None else f"/{total}"
    click.echo(f"{label} ...", err=True)

    def advance(steps: int = 1, note: str = "", left: float | None = None) -> None:
        nonlocal done, last
        done += steps
        if time.monotonic() - last >= PLAIN_INTERVAL:
            last = time.monotonic()
            seconds = _remaining(started, done, total) if left is None else left
            words = (f"{label}: {done}{of_total}", note, time_left(seconds))
            click.echo(" ".join(word for word in words if word), err=True)

    yield advance
    click.echo(f"{label}: done in {time.monotonic() - started:.1f} s", err=True)


def _remaining(started: float, done: int, total: int | None) -> float | None:
    """Seconds left where every step takes the same; None where nobody knows."""
    return (time.monotonic() - started) * (total - done) / done if total and done else None


def time_left(seconds: float | None) -> str:
    """Such as `~4 min left`; nothing where it is not known, or over."""
    return "" if not seconds else f"~{format_seconds(seconds)} left"


def format_seconds(seconds: float) -> str:
    """Such as `40 s`, `4 min` or `2.5 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def line_width() -> int | None:
    """Characters of a line of stdout; None where it is a file or a pipe, whose lines are as long as they are."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def is_quiet() -> bool:
    """Whether progress and notes are unwanted."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def say_note(text: str) -> None:
    """Says what the user should know on stderr; what a command has said already is not said again."""
    context = click.get_current_context(silent=True)
    said = context.meta.setdefault("toast_onnx_cli.notes", set()) if context is not None else set()
    if text not in said and not is_quiet():
        said.add(text)
        click.echo(f"Note: {text}", err=True)


def say_notes(notes: Sequence[str]) -> None:
    """Several notes, each once."""
    for note in dict.fromkeys(notes):
        say_note(note)


def print_json(document: dict[str, Any]) -> None:
    """Prints one JSON document to stdout, keys in the order given, and last which files were read for it (`read`).

    Raises:
        ValueError: A number in it is NaN or infinite, which JSON has no spelling for.
    """
    document = document if "read" in document else {**document, "read": files_read()}
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    align: Sequence[Literal["left", "right"]] | None = None,
) -> None:
    """Prints a table to stdout; cells are taken literally, and are never cut where stdout is a file or a pipe.

    Args:
        columns: The headings.
        rows: The cells of each row, as many as there are headings.
        title: A line above the table.
        align: For each column, "left" or "right"; the first left and the others right by default.
    """
    click.echo("\n".join(table_lines(columns, rows, title, align, line_width())))


def table_lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None,
    align: Sequence[Literal["left", "right"]] | None,
    width: int | None,
) -> list[str]:
    """The lines of a table, cells folded where they are too wide for a line of `width`; as `print_table`."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(columns):
        justify = align[index] if align is not None else ("left" if index == 0 else "right")
        table.add_column(Text(heading), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # Off a terminal rich assumes 80 columns and would fold; a wide page keeps each row on one line for grep.
    console = Console(file=sys.stdout, width=width or 1000, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def show_table(table: Table) -> None:
    """Prints a table with the lines that belong to it."""
    width = line_width()
    fitted = table if width is None else table.fitted(width - 2, 3)
    print_table(fitted.columns, fitted.rows, title=fitted.title, align=fitted.align)
    for line in table.lines:
        click.echo(line)
