"""Tables as plain data: the command prints them, Python shows them as text and a notebook as HTML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Side = Literal["left", "right"]
UNITS = ("", " K", " M", " G", " T", " P")


#: Below this share of equal answers a model hardly does what the dense one does.
HARDLY = 0.5
#: Spread of timed rounds above which the machine was too busy to tell.
NOISY = 0.25


def busy(spread: float) -> str | None:
    """What to say of timed rounds that differ so much that their median says little; None where they do not.

    Args:
        spread: of the rounds, as a share of their median.
    """
    return f"rounds differ by {spread:.0%}; measure again where nothing else runs" if spread > NOISY else None


@dataclass(frozen=True)
class Table:
    """Rows of cells, and lines under them.

    Attributes:
        title: above the table.
        columns: the headings.
        rows: the cells of each row, as many as there are headings.
        align: of each column; None has the first left and the others right.
        lines: below the table.
        spare: columns that go, the first one first, where the page is too narrow for all.
    """

    title: str | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: Sequence[Side] | None = None
    lines: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()

    def text(self) -> str:
        """Fixed-width text."""
        cells = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(row[k]) for row in cells) for k in range(len(self.columns))]
        sides = self._sides()
        shown = [
            "  ".join(c.rjust(w) if s == "right" else c.ljust(w) for c, w, s in zip(row, widths, sides, strict=True))
            for row in cells
        ]
        title = [] if self.title is None else [self.title]
        return "\n".join(line.rstrip() for line in (*title, *shown, *self.lines))

    def html(self) -> str:
        """A table element, its title as caption, its lines behind it."""

        def row(tag: str, cells: Sequence[str]) -> str:
            sides = zip(cells, self._sides(), strict=True)
            return "<tr>" + "".join(f"<{tag} align={side}>{escape(c)}</{tag}>" for c, side in sides) + "</tr>"

        caption = "" if self.title is None else f"<caption>{escape(self.title)}</caption>"
        head, body = row("th", self.columns), "".join(row("td", cells) for cells in self.rows)
        below = "".join(f"<div>{escape(line)}</div>" for line in self.lines)
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>{below}"

    def fitted(self, width: int, gap: int) -> Table:
        """The table in a width: without columns that can be spared, then with long names cut in the middle.

        Args:
            width: characters of a line.
            gap: characters between two columns.
        """
        kept = list(range(len(self.columns)))
        for name in self.spare:
            if self._width(kept, gap) <= width:
                break
            kept = [k for k in kept if self.columns[k] != name]
        over = self._width(kept, gap) - width
        sides = self._sides()
        rows = [[row[k] for k in kept] for row in self.rows]
        texts = [i for i, k in enumerate(kept) if sides[k] == "left"]
        if over > 0 and texts:
            longest = max(texts, key=lambda i: max((len(row[i]) for row in rows), default=0))
            most = max(len(row[longest]) for row in rows) - over
            rows = [[shortened(c, most) if i == longest else c for i, c in enumerate(row)] for row in rows]
        columns = [self.columns[k] for k in kept]
        return Table(self.title, columns, rows, [sides[k] for k in kept], self.lines)

    def _width(self, columns: Sequence[int], gap: int) -> int:
        """Characters of a line of some columns."""
        widths = (max(len(row[k]) for row in (self.columns, *self.rows)) for k in columns)
        return sum(widths) + gap * (len(columns) - 1)

    def _sides(self) -> Sequence[Side]:
        rest: list[Side] = ["right"] * (len(self.columns) - 1)
        return self.align or ["left", *rest]


class Shown(ABC):
    """What Python and a notebook show as its table."""

    @property
    @abstractmethod
    def table(self) -> Table:
        """The table."""

    def __repr__(self) -> str:
        return self.table.text()

    def _repr_html_(self) -> str:
        return self.table.html()


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters (8 at least), cut in the middle: `encode…attn`."""
    most = max(most, 8)
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def format_count(value: float) -> str:
    """A count in three digits with its unit: 1.25 G, 5.7 M, 588."""
    return _scaled(value)


def format_bytes(size: float) -> str:
    """A file or memory size in powers of 1000, three digits: 21.9 MB, 512 B."""
    number, _, unit = _scaled(size).partition(" ")
    return f"{number} {unit}B"


def _scaled(value: float) -> str:
    scaled, unit = float(value), 0
    # 999.5 and above would print as 1e+03: they belong to the next unit.
    while abs(scaled) >= 999.5 and unit < len(UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{scaled:.3g}{UNITS[unit]}"
