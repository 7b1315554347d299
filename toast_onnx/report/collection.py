"""Several pruned models of one dense model side by side: a sentence, a table, CSV, and which of them are beaten."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toast_onnx.report.page import comparisons, speed_of, top1_of
from toast_onnx.report.page_sources import Sources
from toast_onnx.report.tables import HARDLY, Table, busy, format_bytes, format_count

FORMAT = "toast-onnx/collection/1"


@dataclass(frozen=True)
class Point:
    """One model, with what is known of it.

    Attributes:
        file: its name.
        macs: multiply-accumulates.
        params: parameters.
        bytes: size of its files.
        agreement: share of the dense model's answers that it gives, too.
        kl: divergence from the dense model's class probabilities, in nats.
        error: largest relative error of an output.
        accuracy: top-1 on labelled samples.
        speed: the dense model's latency over its own.
        samples: number of samples that `agreement`, `kl` and `error` are of.
        spread: of the timed rounds that `speed` is from, the larger of both models', as a share of the median.
    """

    file: str
    macs: float
    params: float
    bytes: float
    agreement: float | None = None
    kl: float | None = None
    error: float | None = None
    accuracy: float | None = None
    speed: float | None = None
    samples: int | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Column:
    """A figure of a point.

    Attributes:
        key: field of `Point`.
        heading: in tables and charts.
        best_first: whether more of it is better.
    """

    key: str
    heading: str
    best_first: bool = False

    def of(self, point: Point) -> float | None:
        """The figure; None where it is unknown."""
        value = getattr(point, self.key)
        return None if value is None else float(value)


#: What models can be sorted by, besides their name.
COLUMNS = {
    column.key: column
    for column in (
        Column("agreement", "same answers", True),
        Column("accuracy", "top-1", True),
        Column("kl", "KL"),
        Column("error", "relative error"),
        Column("macs", "MACs"),
        Column("params", "parameters"),
        Column("bytes", "file"),
        Column("speed", "speed", True),
    )
}
SORTS = ("file", *COLUMNS)
#: What a model costs; `speed` is a cost that is saved.
COSTS = ("macs", "params", "bytes", "speed")


@dataclass(frozen=True)
class Collection:
    """A dense model and what was made from it.

    Attributes:
        dense: the model itself.
        points: what was made from it.
    """

    dense: Point
    points: tuple[Point, ...]

    @property
    def quality(self) -> Column | None:
        """What models are judged by: accuracy, agreement or error, the first that is known of all; None without."""
        for key in ("accuracy", "agreement", "error"):
            if self.points and all(COLUMNS[key].of(p) is not None for p in self.points):
                return COLUMNS[key]
        return None

    def ordered(self, key: str | None) -> Collection:
        """The models in the order of a figure, the best first and those of which it is unknown last.

        Args:
            key: one of `SORTS`; None leaves the order alone.
        """
        if key is None:
            return self
        if key == "file":
            return Collection(self.dense, tuple(sorted(self.points, key=lambda p: p.file)))
        column = COLUMNS[key]

        def rank(point: Point) -> tuple[bool, float]:
            value = column.of(point)
            return value is None, 0.0 if value is None else -value if column.best_first else value

        return Collection(self.dense, tuple(sorted(self.points, key=rank)))

    def beaten(self, cost: str = "macs") -> dict[str, str]:
        """Models that another one beats: as cheap and as good, and better in one of both.

        Args:
            cost: one of `COSTS`.

        Returns:
            File of the beaten model -> file of one that beats it; none where a figure is missing.
        """
        judged = self.quality
        if judged is None:
            return {}
        ranked = [
            (p, _less(COLUMNS[cost], p), _less(judged, p)) for p in self.points if COLUMNS[cost].of(p) is not None
        ]
        found = {}
        for point, price, loss in ranked:
            for other, cheaper, nearer in ranked:
                if cheaper <= price and nearer <= loss and (cheaper < price or nearer < loss):
                    found[point.file] = other.file
                    break
        return found

    @property
    def sentence(self) -> str:
        """What there is to choose from, in a sentence or three."""
        judged = self.quality
        least = min(self.points, key=lambda p: p.macs)
        if judged is None:
            return (
                f"{len(self.points)} models of {self.dense.file}, of which no answers were compared; the least takes "
                f"{self._share(least)} of the MACs: {least.file}"
            )
        best = min(self.points, key=lambda p: (_less(judged, p), p.macs))
        words = [
            f"{best.file} is nearest to {self.dense.file}: {_quality(judged, best)} at {self._share(best)} of the MACs"
        ]
        if least is not best:
            words.append(f"{least.file} takes the fewest MACs, {self._share(least)}: {_quality(judged, least)}")
        beaten = self.beaten()
        if beaten:
            words.append("beaten by another one in both: " + ", ".join(f"{a} (by {b})" for a, b in beaten.items()))
        hardly = [p.file for p in self.points if p.agreement is not None and p.agreement < HARDLY]
        if hardly:
            words.insert(0, f"HARDLY AGREES any more: {', '.join(hardly)}")
        return "; ".join(words)

    def _share(self, point: Point) -> str:
        return f"{point.macs / self.dense.macs:.0%}" if self.dense.macs else "all"

    @property
    def table(self) -> Table:
        """A row a model, the dense one first; figures that are known of none have no column."""
        rows = (self.dense, *self.points)
        shown = [c for c in COLUMNS.values() if any(c.of(p) is not None for p in self.points)]
        beaten = self.beaten()
        cells = [[p.file, *(self._cell(c, p) for c in shown), "beaten" if p.file in beaten else ""] for p in rows]
        columns = ("model", *(c.heading for c in shown), "")
        counts = sorted({p.samples for p in self.points if p.samples is not None})
        lines = []
        if counts:
            lines.append(f"answers on {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} samples")
        if (said := busy(max((p.spread or 0.0 for p in self.points), default=0.0))) is not None:
            lines.append(f"speed: this machine was busy, {said}")
        return Table(None, columns, cells, None, tuple(lines), ("KL", "parameters", "", "file", "relative error"))

    def _cell(self, column: Column, point: Point) -> str:
        value = column.of(point)
        if value is None:
            return "-" if point is not self.dense or column.key == "accuracy" else ""
        dense = column.of(self.dense)
        share = "" if point is self.dense or not dense else f" ({value / dense:.0%})"
        return {
            "macs": lambda: format_count(value) + share,
            "params": lambda: format_count(value) + share,
            "bytes": lambda: format_bytes(value) + share,
            "speed": lambda: f"{value:.2f} x",
            "kl": lambda: f"{value:.4f}",
            "error": lambda: f"{value:.3g}",
        }.get(column.key, lambda: f"{value:.1%}")()

    def csv(self) -> str:
        """The table for other programs: plain numbers, an empty cell for what is unknown."""
        out = io.StringIO()
        keys = list(asdict(self.dense))
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*keys, "macs_share", "beaten_by"])
        beaten = self.beaten()
        for point in (self.dense, *self.points):
            values = ["" if v is None else v for v in asdict(point).values()]
            share = point.macs / self.dense.macs if self.dense.macs else ""
            writer.writerow([*values, share, beaten.get(point.file, "")])
        return out.getvalue()

    def to_document(self) -> dict[str, Any]:
        """Plain data."""
        judged, beaten = self.quality, self.beaten()
        return {
            "format": FORMAT,
            "sentence": self.sentence,
            "judged_by": None if judged is None else judged.key,
            "dense": asdict(self.dense),
            "models": [asdict(p) | {"beaten_by": beaten.get(p.file)} for p in self.points],
        }


def of_comparisons(documents: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> Collection:
    """Models that `compare` held against one dense model.

    Args:
        documents: what it found, one at least.
        paths: where the pruned models are, in the same order.
    """
    dense = documents[0]["models"]["dense"]
    points = [
        _compared(name, d["models"]["pruned"], d["outputs"], d["samples"], d["latency"])
        for name, d in zip(unlike(paths), documents, strict=True)
    ]
    return Collection(_dense(dense), tuple(points))


def of_runs(runs: Iterable[Sources]) -> list[Collection]:
    """Models of several runs, with what was measured on them, by the dense model they come from.

    Args:
        runs: what each run's report and the documents beside it say.
    """
    groups: dict[str, list[Sources]] = {}
    for sources in runs:
        groups.setdefault(str(sources.run["dense"].get("sha256")), []).append(sources)
    found = []
    for own in groups.values():
        names = unlike([each.path.with_name(each.run["pruned"]["file"]) for each in own])
        accuracy = next((top1[0] for each in own if (top1 := top1_of(each))), None)
        points = tuple(_ran(name, each) for name, each in zip(names, own, strict=True))
        found.append(Collection(_dense(own[0].run["dense"], accuracy), points))
    return found


def unlike(paths: Sequence[Path]) -> list[str]:
    """Names that tell files apart: their own, with folders in front where two have the same."""
    names = [p.name for p in paths]
    if len({*names}) < len(names):
        names = [f"{p.parent.name}/{p.name}" for p in paths]
    return names if len({*names}) == len(names) else [str(p) for p in paths]


def _ran(name: str, sources: Sources) -> Point:
    """A run's model: what was compared afterwards counts before what the run itself told."""
    told = next(iter(comparisons(sources)), None) or sources.run.get("agreement") or {"outputs": {}, "samples": None}
    point = _compared(name, sources.run["pruned"], told["outputs"], told["samples"], told.get("latency"))
    accuracy, speed = top1_of(sources), speed_of(sources)
    return replace(
        point,
        accuracy=accuracy[1] if accuracy else None,
        speed=point.speed if speed is None else speed.ratio,
        spread=point.spread if speed is None else speed.spread,
    )


def _dense(figures: Mapping[str, Any], accuracy: float | None = None) -> Point:
    return Point(Path(figures["file"]).name, figures["macs"], figures["params"], figures["bytes"], accuracy=accuracy)


def _compared(
    name: str,
    figures: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
    samples: int | None,
    latency: Any,
) -> Point:
    """A point of what was found out of a model's outputs."""
    scores: Mapping[str, Any] = next((o for o in outputs.values() if "top1_agreement" in o), {})
    return Point(
        name,
        figures["macs"],
        figures["params"],
        figures["bytes"],
        agreement=scores.get("top1_agreement"),
        kl=scores.get("kl"),
        error=max((o["relative_error"] for o in outputs.values()), default=None),
        speed=latency[1]["speedup"] if latency else None,
        samples=samples if outputs else None,
        spread=max(entry["spread"] for entry in latency) if latency else None,
    )


def _less(column: Column, point: Point) -> float:
    """A figure turned so that less is better."""
    value = column.of(point)
    assert value is not None
    return -value if column.best_first else value


def _quality(column: Column, point: Point) -> str:
    value = column.of(point)
    assert value is not None
    return f"{column.heading} {value:.3g}" if column.key == "error" else f"{value:.1%} {column.heading}"
