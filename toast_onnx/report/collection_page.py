"""One self-contained HTML page of several pruned models: a sentence, a chart of cost and quality, a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from toast_onnx import __version__
from toast_onnx.report.collection import COLUMNS, COSTS, Collection, Point
from toast_onnx.report.page import render
from toast_onnx.report.page_charts import Dot, Pareto, pareto_chart

_COST_HEADINGS = {"macs": "MACs left", "params": "parameters left", "bytes": "file size left", "speed": "latency left"}


def render_collection(collections: Sequence[Collection], title: str, facts: Sequence[tuple[str, str]] = ()) -> str:
    """The page as HTML text; it loads nothing from elsewhere.

    Args:
        collections: models by the dense one they come from.
        title: heading.
        facts: what the run was, a name and a text each.

    Raises:
        BackendError: matplotlib or Jinja is not installed.
    """
    parts = [_part(each) for each in collections]
    return render("collection.html", {"title": title, "parts": parts, "facts": list(facts), "version": __version__})


def _part(found: Collection) -> dict[str, Any]:
    table = found.table
    quality = found.quality
    percent = quality is not None and quality.key != "error"
    charts = pareto_panels(found) if len(found.points) > 1 else []  # one point makes no curve
    label = "" if quality is None else quality.heading
    return {
        "dense": found.dense.file,
        "sentence": found.sentence,
        "chart": pareto_chart(charts, label, percent),
        "alternative": f"{label} against {', '.join(c.heading for c in charts)} of {len(found.points)} models; the "
        "table below has the numbers",
        "columns": table.columns,
        "rows": table.rows,
        "lines": table.lines,
    }


def pareto_panels(found: Collection) -> list[Pareto]:
    """Quality over each cost that is known of all models; none where no quality is."""
    quality = found.quality
    if quality is None:
        return []
    names = dict(zip((p.file for p in found.points), short_names([p.file for p in found.points]), strict=True))
    scale = 1.0 if quality.key == "error" else 100.0
    panels = []
    for key in COSTS:
        costs = [_share(found, key, p) for p in found.points]
        if any(c is None for c in costs):
            continue
        beaten = found.beaten(key)
        dots = [
            Dot(names[p.file], c, scale * float(quality.of(p) or 0.0), p.file in beaten)
            for p, c in zip(found.points, costs, strict=True)
            if c is not None
        ]
        best = {"agreement": 1.0, "error": 0.0, "accuracy": found.dense.accuracy}[quality.key]
        panels.append(Pareto(_COST_HEADINGS[key], dots, None if best is None else Dot("dense", 1.0, scale * best)))
    return panels


def _share(found: Collection, key: str, point: Point) -> float | None:
    """A cost as a share of the dense model's; None where one of the two is unknown."""
    value = COLUMNS[key].of(point)
    if key == "speed":
        return 1 / value if value else None
    dense = COLUMNS[key].of(found.dense)
    return None if value is None or not dense else value / dense


def short_names(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin and end with: `m.macs-0.6.onnx` of a family is `0.6`."""
    if len({*names}) < 2:
        return list(names)
    words = [re.findall(r"\d+(?:\.\d+)?|[^\W\d]+|.", n) for n in names]
    front = _alike(words)
    back = _alike([w[front:][::-1] for w in words])
    return ["".join(w[front : len(w) - back]) or name for w, name in zip(words, names, strict=True)]


def _alike(words: Sequence[Sequence[str]]) -> int:
    """Number of words at the beginning that are the same in all."""
    count = 0
    for column in zip(*words, strict=False):
        if len({*column}) > 1:
            break
        count += 1
    return count
