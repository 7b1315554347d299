"""One self-contained HTML page of a run: what became smaller, the proof, and what was measured afterwards."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toast_onnx import __version__
from toast_onnx.errors import BackendError
from toast_onnx.report.deployment import headline
from toast_onnx.report.lineage import side_of
from toast_onnx.report.page_charts import Line, costs_chart, lines_chart, tokens_chart, widths_chart
from toast_onnx.report.page_sources import Sources
from toast_onnx.report.tables import format_bytes, format_count

#: A drop of accuracy that is shown in another colour, and half the share of changed answers that is.
LOSS = 0.05
#: Branch in a comparison, heading, and its parts in a report.
_BRANCHES = (
    ("attention", "attention", ("heads", "qk", "vo")),
    ("ffn", "feed-forward network", ("fc1", "fc2")),
)
_TEMPLATES = Path(__file__).parent / "templates"
_PARTS = {
    "heads": "whole heads",
    "qk": "queries and keys",
    "vo": "values",
    "fc1": "fc1 inputs",
    "fc2": "hidden units",
    "fc1+fc2": "fc1 and fc2",
}


def render_page(sources: Sources, title: str | None = None, images: bool = True) -> str:
    """The page as HTML text; it loads nothing from elsewhere, and the same sources give the same bytes.

    Args:
        sources: what to show.
        title: heading; the pruned file's name where None.
        images: show pictures of samples.

    Raises:
        BackendError: matplotlib or Jinja is not installed.
    """
    return render("page.html", page_context(sources, title, images))


def render(template: str, context: dict[str, Any]) -> str:
    """One of our templates, filled in.

    Args:
        template: its file name.
        context: texts and SVG.

    Raises:
        BackendError: Jinja is not installed.
        KeyError: the template asks for a value that the documents do not hold.
    """
    jinja2 = require_jinja()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    try:
        text: str = environment.get_template(template).render(context)
    except jinja2.UndefinedError as e:
        raise KeyError(str(e)) from e
    return text


def require_jinja() -> Any:
    """The Jinja module.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import jinja2
    except ImportError as e:
        raise BackendError("the page needs Jinja; install it with: pip install 'toast-onnx[report]'") from e
    return jinja2


def page_context(sources: Sources, title: str | None = None, images: bool = True) -> dict[str, Any]:
    """What the template shows: texts and SVG, no figures left to compute."""
    run = sources.run
    blocks = [b for b in run["blocks"] if b["before"]]
    return {
        "title": title or run["pruned"]["file"],
        "dense_file": run["dense"]["file"],
        "tiles": tiles(sources),
        "widths": widths_chart(blocks),
        "costs": costs_chart(blocks) if blocks else "",
        "tokens": tokens_chart((run.get("tokens") or {}).get("merges", [])),
        "token_text": _token_text((run.get("tokens") or {}).get("merges", [])),
        "twin": run.get("twin"),
        "finetune": run.get("finetune"),
        "block_rows": [_block_row(b) for b in run["blocks"]],
        "declined": run.get("declined", []),
        "accuracy_rows": _accuracy_rows(sources),
        "compare_rows": _compare_rows(sources),
        "drift": _drift(sources),
        "disagreements": _disagreements(sources, images),
        "sensitivity": _sensitivity(sources),
        "latency": _latency(sources),
        "engine_rows": _engine_rows(sources),
        "steps": _steps(sources),
        "facts": _facts(sources),
        "version": __version__,
    }


def tiles(sources: Sources) -> list[dict[str, str]]:
    """The figures at the top: a name, the pruned value, the dense one and what is left of it."""
    dense, pruned = sources.run["dense"], sources.run["pruned"]
    found = [
        _tile("MACs", dense["macs"], pruned["macs"], format_count),
        _tile("parameters", dense["params"], pruned["params"], format_count),
        _tile("file", dense["bytes"], pruned["bytes"], format_bytes),
    ]
    accuracy = top1_of(sources)
    if len(accuracy) == 2:
        before, after = accuracy
        tile = {
            "name": "top-1 accuracy",
            "value": f"{after:.1%}",
            "note": f"dense {before:.1%}, {100 * (after - before):+.1f} points",
        }
        found.append(tile | ({"loss": "yes"} if before - after > LOSS else {}))
    told = comparisons(sources)[:1] or [sources.run.get("agreement") or {"outputs": {}}]
    for document in told:
        for output, figures in list(document["outputs"].items())[:1]:
            if "top1_agreement" in figures:
                note = f"of the dense model's answers ({output})"
                tile = {"name": "same answers", "value": f"{figures['top1_agreement']:.1%}", "note": note}
                found.append(tile | ({"loss": "yes"} if 1 - figures["top1_agreement"] > 2 * LOSS else {}))
    speed = speed_of(sources)
    if speed is not None:
        found.append({"name": "speed", "value": f"{speed.ratio:.2f} ×", "note": speed.note})
    return found


def comparisons(sources: Sources) -> list[dict[str, Any]]:
    """Comparisons of this run's two models, those of the pruned file itself before those of its converted copies."""
    dense, pruned = sources.dense, sources.pruned
    own = []
    for document in sources.of("compare"):
        hashes = {side: document["models"].get(side, {}).get("sha256") for side in ("dense", "pruned")}
        if hashes["dense"] in dense.hashes and hashes["pruned"] in pruned.hashes:
            own.append((hashes["pruned"] != pruned.sha256, document))
    return [document for _, document in sorted(own, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Speed:
    """How fast the pruned model is.

    Attributes:
        ratio: the dense model's latency over the pruned one's.
        note: which files were timed, and how.
        spread: of the timed rounds, the larger of both, as a share of the median.
    """

    ratio: float
    note: str
    spread: float


def speed_of(sources: Sources) -> Speed | None:
    """The pruned model's speed over the dense one's, from the first benchmark and batch that timed both."""
    for document in sources.of("bench"):
        for batch in dict.fromkeys(r["batch"] for r in document["results"]):
            rows = [r for r in document["results"] if r["batch"] == batch]
            dense, pruned = (_timed(sources, rows, side) for side in ("dense", "pruned"))
            if dense is None or pruned is None:
                continue
            # Both speeds are relative to the benchmark's first model, whichever that is.
            names = [Path(r["model"]).name for r in (dense, pruned)]
            plain = names == [sources.dense.file, sources.pruned.file]
            note = "of the dense model's" if plain else f"{names[1]} over {names[0]}"
            note += f", batch {batch}, {pruned['median_ms']:.2f} ms"
            spread = max(timed["spread"] for timed in (dense, pruned))
            return Speed(pruned["speedup"] / dense["speedup"], note, spread)
    return None


def _timed(sources: Sources, rows: list[dict[str, Any]], side: str) -> dict[str, Any] | None:
    """A model's timing: the file itself before its converted copies; None where it was not timed."""
    file = (sources.dense if side == "dense" else sources.pruned).file
    own = [r for r in rows if side_of(r["model"], sources.dense, sources.pruned, r.get("model_sha256")) == side]
    return min(own, key=lambda r: Path(r["model"]).name != file, default=None)


def _tile(name: str, dense: float, pruned: float, show: Any) -> dict[str, str]:
    left = f"{pruned / dense:.1%} of {show(dense)}" if dense else ""
    return {"name": name, "value": show(pruned), "note": left}


def _block_row(block: dict[str, Any]) -> dict[str, Any]:
    before, after = block["before"], block["after"] or {}
    cells = []
    for key in ("heads", "qk_dim", "vo_dim", "in_features", "width"):
        old, new = before.get(key), after.get(key)
        same = old is None or new is None or old == new
        cells.append({"text": "–" if old is None else f"{old}" if same else f"{old} → {new}", "changed": not same})
    return {"index": block["index"], "name": block["name"], "cells": cells}


def top1_of(sources: Sources) -> list[float]:
    """Top-1 of the dense model and of the pruned one (its converted copy where that was measured too)."""
    dense, pruned = sources.dense, sources.pruned
    found: dict[str, dict[bool, float]] = {"dense": {}, "pruned": {}}
    for document in sources.of("eval"):
        top1 = (document.get("accuracy") or {}).get("top1")
        side = side_of(document["model"], dense, pruned, document.get("model_sha256"))
        if top1 is not None and side is not None:
            is_copy = Path(document["model"]).name not in (dense.file, pruned.file)
            found[side].setdefault(is_copy, top1["accuracy"])
    if not (found["dense"] and found["pruned"]):
        return []
    return [found["dense"][min(found["dense"])], found["pruned"][max(found["pruned"])]]


def _accuracy_rows(sources: Sources) -> list[list[str]]:
    rows = []
    for document in sources.of("eval"):
        name = Path(document["model"]).name
        accuracy = document.get("accuracy")
        if accuracy is None:
            rows += [[name, key, f"{value:.6g}", ""] for key, value in (document.get("metrics") or {}).items()]
            continue
        for key, label in (("top1", "top-1"), ("top5", "top-5")):
            if key in accuracy:
                low, high = accuracy[key]["interval95"]
                about = f"{low:.1%} to {high:.1%}, {accuracy['samples']} samples"
                rows.append([name, label, f"{accuracy[key]['accuracy']:.2%}", about])
    return rows


def _compare_rows(sources: Sources) -> list[list[str]]:
    rows = []
    for document in sources.of("compare"):
        name = document["models"]["pruned"]["file"]
        for output, figures in document["outputs"].items():
            cells = [
                _show(figures, "top1_agreement", ".1%"),
                _show(figures, "kl", ".4f"),
                _show(figures, "cosine", ".4f"),
                _show(figures, "relative_error", ".2e"),
            ]
            rows.append([name, output, *cells, str(document["samples"])])
    return rows


def _show(figures: dict[str, Any], key: str, spec: str) -> str:
    return format(figures[key], spec) if figures.get(key) is not None else "–"


def _disagreements(sources: Sources, images: bool) -> list[dict[str, Any]]:
    """Samples whose answers changed: name, both answers, and a picture where there is one."""

    def answer(found: dict[str, Any]) -> str:
        return f"{found['class']} ({found['confidence']:.0%})"

    return [
        {
            "sample": each["sample"],
            "dense": answer(each["dense"]),
            "pruned": answer(each["pruned"]),
            "picture": _own_picture(each.get("picture")) if images else None,
        }
        for each in (sources.run.get("agreement") or {}).get("disagreements", ())
    ]


def _own_picture(address: Any) -> str | None:
    """A picture that stands in the report itself; a page loads nothing from elsewhere."""
    return address if isinstance(address, str) and address.startswith("data:image/jpeg;base64,") else None


def _token_text(merges: Sequence[dict[str, Any]]) -> str:
    """The chart of tokens in words."""
    merged = [m for m in merges if m["how"] == "merged"]
    return "tokens left behind each block: " + ", ".join(f"{m['block']}: {m['after']}" for m in merged)


def _drift(sources: Sources) -> dict[str, Any]:
    """How far every block's branches are from the dense ones, beside what pruning each alone was expected to do."""
    own = next(iter(comparisons(sources)), None) or sources.run.get("agreement") or {}
    blocks = own.get("blocks", ())
    measured, predicted = [], []
    for part, heading, keys in _BRANCHES:
        measured.append(Line(heading, [(b["index"], b[part]["relative_error"]) for b in blocks if part in b]))
        told = [
            (b["index"], [e for k, e in b.get("predicted_errors", {}).items() if k in keys])
            for b in sources.run["blocks"]
        ]
        predicted.append(Line(f"{heading}, predicted", [(k, max(e)) for k, e in told if e], dashed=True))
    lines = [*measured, *predicted] if any(line.points for line in measured) else []
    return _chart(lines, "block", "relative error of the branch")


def _chart(lines: Sequence[Line], x: str, y: str, log: bool = False) -> dict[str, Any]:
    """Lines as a chart with its text for those who do not see it; as a table where no line has two points."""
    drawn = [line for line in lines if line.points]
    alone = all(len(line.points) == 1 for line in drawn)
    values = [value for line in drawn for _, value in line.points]
    return {
        "svg": "" if alone else lines_chart(drawn, x=x, y=y, log=log),
        "alternative": f"{y} by {x}, from {min(values):.2g} to {max(values):.2g}: "
        + ", ".join(line.name for line in drawn)
        if values
        else "",
        "columns": ["", x, y],
        "rows": [[line.name, f"{at:g}", f"{value:.3g}"] for line in drawn for at, value in line.points]
        if alone
        else [],
    }


def _sensitivity(sources: Sources) -> list[dict[str, Any]]:
    """A chart a part: damage over the ratio removed, a line a block."""
    charts = []
    for document in sources.of("sensitivity"):
        metric = document["metric"]
        trials = [t for t in document["trials"] if metric in t["damage"]]
        for part in dict.fromkeys(t["part"] for t in trials):
            own = [t for t in trials if t["part"] == part]
            lines = [
                Line(f"block {index}", [(t["ratio"], t["damage"][metric]) for t in own if t["block"] == index])
                for index in sorted({t["block"] for t in own})
            ]
            spread = all(t["damage"][metric] > 0 for t in own)  # damage grows by orders of magnitude
            label = {"kl": "KL from the dense output"}.get(metric, metric.replace("_", " "))
            chart = _chart(lines, f"removed of the {_PARTS.get(part, part)}", label, spread)
            charts.append({"heading": _PARTS.get(part, part)} | chart)
    return charts


def _latency(sources: Sources) -> list[dict[str, Any]]:
    """A table a benchmark; `share` is the bar's length, of the slowest at the same batch."""
    tables = []
    for document in sources.of("bench"):
        where = document.get("provider") or document.get("version") or ""
        threads = f", {document['threads']} thread(s)" if document.get("threads") else ""
        rows = []
        for result in document["results"]:
            slowest = max(r["median_ms"] for r in document["results"] if r["batch"] == result["batch"])
            low, high = result["speedup_quartiles"]
            rows.append(
                {
                    "model": Path(result["model"]).name,
                    "batch": result["batch"],
                    "median": f"{result['median_ms']:.3f}",
                    "spread": f"{result['spread']:.1%}",
                    "rate": f"{result['images_per_second']:.0f}",
                    "speedup": f"{result['speedup']:.2f} ({low:.2f} to {high:.2f})",
                    "share": round(100 * result["median_ms"] / slowest, 1),
                }
            )
        tables.append({"heading": f"{document['runtime']} {where}{threads}".strip(), "rows": rows})
    return tables


def _engine_rows(sources: Sources) -> list[list[str]]:
    rows = []
    for record in sources.of("build"):
        capabilities = ", ".join(f"SM{c}" for c in record.get("compute_capabilities") or ())
        kind = {"onnx": "16-bit ONNX", "onnxruntime": "ONNX Runtime"}.get(record["backend"])
        rows.append(
            [
                record["engine"],
                kind or f"{record['backend']} {record['backend_version']}",
                record["precision"],
                format_bytes(record["engine_bytes"]),
                capabilities or "–",
                f"{record['build_seconds']:.1f} s",
            ]
        )
    for found in sources.of("check"):
        worst = max(o["relative"] for o in found["outputs"].values())
        verdict = "agrees" if found["passed"] else "DIFFERS"
        name = Path(str(found.get("engine", "engine"))).name
        rows.append([name, f"{verdict} with ONNX Runtime", f"{worst:.1e} of {found['tolerance']:g}", "", "", ""])
    return rows


def _steps(sources: Sources) -> list[list[str]]:
    if sources.deploy is None:
        return []
    return [
        [name, entry["status"], f"{entry['seconds']:.1f} s" if "seconds" in entry else "", headline(name, entry)]
        for name, entry in sources.deploy["steps"].items()
    ]


def _facts(sources: Sources) -> list[tuple[str, str]]:
    """What one needs to do the run again."""
    run = sources.run
    statistics = run.get("statistics") or {}
    return [
        *(
            (f"{side} model", f"{run[side]['file']}, SHA-256 {run[side].get('sha256', '–')}")
            for side in ("dense", "pruned")
        ),
        ("counted at", _joined(f"{name} {'x'.join(map(str, shape))}" for name, shape in run.get("inputs", {}).items())),
        ("statistics", str(statistics.get("source", "–"))),
        ("settings", _settings(run.get("options", {}).get("ratios", {}))),
        ("command", _command(run)),
        ("versions", _joined(f"{name} {value}" for name, value in run.get("versions", {}).items())),
        ("made from", _joined([sources.path.name, *sources.names])),
    ]


def _command(run: dict[str, Any]) -> str:
    """The exact command, as a shell takes it."""
    words = run.get("command") or []
    return shlex.join(["toast-onnx", *map(str, words)]) if words else "–"


def _joined(parts: Any) -> str:
    return ", ".join(parts) or "–"


def _settings(ratios: dict[str, Any]) -> str:
    parts = []
    for section in ("attention", "ffn", "compensation", "align"):
        inside: Any = ratios.get(section)
        if isinstance(inside, dict):
            parts.append(f"{section}: " + ", ".join(f"{key} {_short(value)}" for key, value in inside.items()))
    return "; ".join(parts) or "–"


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
