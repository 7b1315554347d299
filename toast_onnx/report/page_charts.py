"""The charts of a report page, as SVG text: same figures in, same bytes out."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toast_onnx.report.drawing import require_matplotlib

DENSE, PRUNED, SECOND, INK, GRID = "#d5d9e0", "#c2601c", "#2f6f8f", "#333a45", "#e8eaee"
#: Key in a block's sizes -> heading. The order is that of a block's own data flow.
WIDTHS = {
    "heads": "heads",
    "qk_dim": "query and key dimensions of a head",
    "vo_dim": "value dimensions of a head",
    "in_features": "fc1 inputs",
    "width": "hidden units",
}


def widths_chart(blocks: Sequence[dict[str, Any]]) -> str:
    """Widths of every block before (light) and after (dark), one panel for each kind that changes anywhere.

    Args:
        blocks: the `blocks` of a pruning report.

    Returns:
        SVG; empty where no width changed.
    """
    rows = []
    for key, heading in WIDTHS.items():
        before = [b["before"].get(key) for b in blocks]
        after = [(b["after"] or {}).get(key) for b in blocks]
        if any(x is not None and y is not None and x != y for x, y in zip(before, after, strict=True)):
            rows.append((heading, before, after))
    if not rows:
        return ""
    figure, panels = _panels(len(rows), columns=min(len(rows), 3) if len(rows) != 4 else 2)
    numbers = [b["index"] for b in blocks]
    for axes, (heading, before, after) in zip(panels, rows, strict=False):
        _bars(axes, numbers, before, after)
        axes.set_title(heading, loc="left", fontsize=10, color=INK)
    return _svg(figure)


def costs_chart(blocks: Sequence[dict[str, Any]]) -> str:
    """Multiply-accumulates of every block, dense and pruned, attention and feed-forward network apart."""
    figure, panels = _panels(2, columns=2)
    numbers = [b["index"] for b in blocks]
    parts = (("attention_macs", "attention, MMACs"), ("ffn_macs", "feed-forward network, MMACs"))
    for axes, (key, heading) in zip(panels, parts, strict=True):
        before = [_mega(b["before"].get(key)) for b in blocks]
        after = [_mega((b["after"] or {}).get(key)) for b in blocks]
        _bars(axes, numbers, before, after)
        axes.set_title(heading, loc="left", fontsize=10, color=INK)
    top = max((axes.get_ylim()[1] for axes in panels), default=1.0)
    for axes in panels:
        axes.set_ylim(0, top)  # one scale, so that the two can be compared
    return _svg(figure)


def tokens_chart(merges: Sequence[dict[str, Any]]) -> str:
    """Tokens in front of every merge (light) and behind it (dark), by block.

    Args:
        merges: `tokens.merges` of a pruning report.

    Returns:
        SVG; empty where no tokens are merged.
    """
    merged = [m for m in merges if m["how"] == "merged"]
    if not merged:
        return ""
    figure, (axes,) = _panels(1, columns=1)
    _bars(axes, [m["block"] for m in merged], [m["before"] for m in merged], [m["after"] for m in merged])
    axes.set_title("tokens behind the attention of each block", loc="left", fontsize=10, color=INK)
    return _svg(figure)


@dataclass(frozen=True)
class Line:
    """One line of a chart: a name, its points (x, y), and whether it is dashed, as what was only predicted is."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def lines_chart(lines: Sequence[Line], *, x: str, y: str, log: bool = False) -> str:
    """Lines over blocks or ratios.

    Args:
        lines: what to draw; empty ones are left out.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        log: logarithmic vertical axis.

    Returns:
        SVG; empty where there is nothing to draw.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return ""
    figure, (axes,) = _panels(1, columns=1)
    solid = sum(not line.dashed for line in drawn)
    colours = [*(PRUNED, SECOND)[:solid], PRUNED, SECOND] if solid <= 2 else _gradient(len(drawn))
    for line, colour in zip(drawn, colours, strict=False):
        xs, ys = zip(*line.points, strict=True)
        style = {"linestyle": "--"} if line.dashed else {"marker": "o", "markersize": 3.5}
        axes.plot(xs, ys, linewidth=1.4, color=colour, label=line.name, **style)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    if log:
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, ncols=1 + len(drawn) // 9, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    return _svg(figure)


@dataclass(frozen=True)
class Dot:
    """A model in a chart of cost and quality.

    Attributes:
        name: written beside it; empty for none.
        cost: share of the dense model's.
        quality: on the vertical axis.
        beaten: whether another model is cheaper and better.
    """

    name: str
    cost: float
    quality: float
    beaten: bool = False


@dataclass(frozen=True)
class Pareto:
    """A chart of cost and quality: its heading, its models, and the dense one where its quality is known."""

    heading: str
    dots: Sequence[Dot]
    dense: Dot | None


def pareto_chart(charts: Sequence[Pareto], quality: str, percent: bool) -> str:
    """Quality over cost, one panel a cost; those that no other model beats are joined by a line.

    Args:
        charts: what to draw.
        quality: label of the vertical axis.
        percent: whether quality is a share.

    Returns:
        SVG; empty where there is nothing to draw.
    """
    drawn = [chart for chart in charts if chart.dots]
    if not drawn:
        return ""
    figure, panels = _panels(len(drawn), columns=min(len(drawn), 2), height=3.4)
    for axes, chart in zip(panels, drawn, strict=False):
        front = sorted((d.cost, d.quality) for d in chart.dots if not d.beaten)
        axes.plot(*zip(*front, strict=True), color=PRUNED, linewidth=1.2, zorder=2)
        for dot in chart.dots:
            colour = SECOND if dot.beaten else PRUNED
            axes.plot([dot.cost], [dot.quality], "o", markersize=5, color=colour, zorder=3)
            axes.annotate(dot.name, (dot.cost, dot.quality), (4, -9), textcoords="offset points", fontsize=8, color=INK)
        if chart.dense is not None:
            axes.plot([chart.dense.cost], [chart.dense.quality], "o", markersize=7, color=DENSE, zorder=3)
            axes.annotate("dense", (chart.dense.cost, chart.dense.quality), (-4, -11), textcoords="offset points",
                          fontsize=8, color=INK, ha="right")  # fmt: skip
        axes.margins(x=0.12, y=0.16)
        axes.set_title(chart.heading, loc="left", fontsize=10, color=INK)
        axes.set_ylabel(quality, fontsize=9, color=INK)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g} %")
    return _svg(figure)


def _gradient(count: int) -> list[Any]:
    colours = require_matplotlib().colormaps["viridis"]
    return [colours(0.05 + 0.85 * i / max(count - 1, 1)) for i in range(count)]


def _mega(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _panels(count: int, columns: int, height: float = 2.5) -> tuple[Any, list[Any]]:
    """A figure with `count` empty panels in our style."""
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure: Any = Figure(figsize=(9.6, height * rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(length=0, labelsize=8, colors=INK)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(grid[:count])


def _bars(axes: Any, numbers: Sequence[int], before: Sequence[Any], after: Sequence[Any]) -> None:
    """The dense value as a light bar with the pruned one in front of it; blocks that lack the part stay empty."""
    axes.bar(numbers, [v or 0 for v in before], width=0.78, color=DENSE, label="dense")
    axes.bar(numbers, [v or 0 for v in after], width=0.78, color=PRUNED, label="pruned")
    step = max(1, -(-len(numbers) // 16))
    axes.set_xticks(list(numbers)[::step])
    axes.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)


def _svg(figure: Any) -> str:
    """A figure as an SVG element: text stays text, and nothing in it depends on the day or the process."""
    matplotlib = require_matplotlib()
    out = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "toast-onnx", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Width and height in points would fix the size; the view box alone scales with the page.
    return re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*"(?=[^>]*viewBox)', r"\1", svg, count=2)
