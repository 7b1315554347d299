"""What a comparison of two models found: as a sentence, as tables, as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toast_onnx.files import write_bytes
from toast_onnx.report.tables import HARDLY, Table, busy, format_bytes, format_count


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` found; every entry is plain data.

    Attributes:
        models: file, hash, MACs, parameters, bytes and tokens behind every block of the dense and the pruned model.
        outputs: output name -> agreement.
        blocks: for every block its number, name and the agreement of its branch outputs.
        latency: medians of interleaved runs, None where it was not measured.
        samples: number of samples.
        data: where they come from.
        notes: what the user should know.
        disagreements: samples whose answers differ, those first of which the dense model is surest, as many as were
            asked for: `sample`, `dense` and `pruned` class and confidence, and its `picture` or None.
    """

    models: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    blocks: list[dict[str, Any]]
    latency: list[dict[str, Any]] | None
    samples: int
    data: dict[str, Any]
    notes: tuple[str, ...]
    disagreements: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One document for machines."""
        return {
            "models": self.models,
            "samples": self.samples,
            "data": self.data,
            "outputs": self.outputs,
            "blocks": self.blocks,
            "latency": self.latency,
            "notes": list(self.notes),
        }

    @property
    def worst(self) -> dict[str, Any] | None:
        """Block, part and relative error of the branch that is furthest off; None where none is off or was compared."""
        branches = [
            {"block": b["index"], "part": part, "error": b[part]["relative_error"]}
            for b in self.blocks
            for part in ("attention", "ffn")
            if part in b and b[part]["relative_error"] > 0
        ]
        return max(branches, key=lambda entry: float(entry["error"]), default=None)

    @property
    def verdict(self) -> str:
        """The comparison in a sentence: what became of the answers, of the cost and of the latency."""
        found = next((e for e in self.outputs.values() if "top1_agreement" in e), None)
        if found is not None:
            same = found["top1_agreement"]
            how = f"answers as the dense model does on {same:.1%} of {self.samples} samples (KL {found['kl']:.3f})"
            how = f"HARDLY AGREES any more: it {how}" if same < HARDLY else how
        else:
            worst = max((e["relative_error"] for e in self.outputs.values()), default=0.0)
            how = (
                f"differs from the dense model's outputs by {worst:.2%} of their size at most ({self.samples} samples)"
            )
        a, b = self.models["dense"], self.models["pruned"]
        cost = f"takes {b['macs'] / a['macs']:.0%} of its MACs and {b['bytes'] / a['bytes']:.0%} of its file"
        timed = "" if self.latency is None else f"; {_latency_words(self.latency[1])}"
        return f"{b['file']} {how} and {cost}{timed}"

    @property
    def tables(self) -> list[Table]:
        """Costs of both models, agreement of every output, drift of every branch."""
        outputs = Table(
            f"outputs on {self.samples} samples",
            ("output", "same top-1", "KL", "cosine", "relative error"),
            [[name, *_agreement(entry, ("top1_agreement", "kl"))] for name, entry in self.outputs.items()],
        )
        rows = [
            [str(block["index"]), block["name"], part, *_agreement(block[part])]
            for block in self.blocks
            for part in ("attention", "ffn")
            if part in block
        ]
        branches = Table(
            "branch outputs",
            ("block", "name", "branch", "cosine", "relative error"),
            rows,
            ("right", "left", "left", "right", "right"),
            spare=("name",),
        )
        costs = Table(
            None, ("", "dense", "pruned", "pruned / dense"), _costs(self), None, _noise(self.latency), ("dense",)
        )
        return [costs, outputs, *([branches] if rows else [])]

    def report(self) -> dict[str, Any]:
        """One document of plain data."""
        return self.to_json()

    def save(self, path: str | Path) -> None:
        """Write the document as JSON, whole or not at all.

        Raises:
            ModelError: it cannot be written.
        """
        write_bytes(Path(path), (json.dumps(self.to_json(), indent=2) + "\n").encode())

    def __repr__(self) -> str:
        return "\n".join(table.text() for table in self.tables[:2])

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables)


def _costs(found: Comparison) -> list[list[str]]:
    a, b = found.models["dense"], found.models["pruned"]
    rows = []
    for label, key, show in (("MACs", "macs", format_count), ("parameters", "params", format_count)):
        rows.append([label, show(a[key]), show(b[key]), f"{b[key] / a[key]:.3f}"])
    if a["tokens"] != b["tokens"] and len(a["tokens"]) == len(b["tokens"]) and all(a["tokens"]):
        ends = [f"{m['tokens'][0]} .. {m['tokens'][-1]}" for m in (a, b)]
        left = sum(b["tokens"]) / sum(a["tokens"])
        rows.append(["tokens, first .. last block", *ends, f"{left:.3f} of all blocks'"])
    rows.append(["file", format_bytes(a["bytes"]), format_bytes(b["bytes"]), f"{b['bytes'] / a['bytes']:.3f}"])
    if found.latency is not None:
        first, second = found.latency
        low, high = second["speedup_quartiles"]
        ratio = f"{1 / second['speedup']:.3f} ({1 / high:.3f} .. {1 / low:.3f})"
        times = [f"{t['median_ms']:.2f} ms, spread {t['spread']:.0%}" for t in (first, second)]
        rows.append([f"latency, batch {first['batch']}", *times, ratio])
    return rows


def _latency_words(pruned: dict[str, Any]) -> str:
    """Whether a timed model is faster, as far as the spread of its rounds lets one tell."""
    low, high = pruned["speedup_quartiles"]
    if low <= 1 <= high:
        return f"no difference in latency could be told ({low:.2f} to {high:.2f} times as fast)"
    return f"{pruned['speedup']:.2f} times as fast ({low:.2f} to {high:.2f})"


def _noise(latency: list[dict[str, Any]] | None) -> tuple[str, ...]:
    """A warning where rounds differ so much that their median says little."""
    spread = max((entry["spread"] for entry in latency or ()), default=0.0)
    said = busy(spread)
    return () if said is None else (f"latency: this machine was busy, {said}",)


def _agreement(entry: dict[str, Any], more: tuple[str, ...] = ()) -> list[str]:
    cells = {
        "top1_agreement": lambda v: f"{v:.2%}",
        "kl": lambda v: f"{v:.4f}",
        "cosine": lambda v: f"{v:.4f}",
        "relative_error": lambda v: f"{v:.3e}",
    }
    return [cells[key](entry[key]) if key in entry else "-" for key in (*more, "cosine", "relative_error")]
