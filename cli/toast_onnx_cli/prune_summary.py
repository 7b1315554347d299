"""What `prune` says at the end: a few lines on what happened, what it cost, and what to be wary of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toast_onnx.choosing.blocks import heads_rounded_away
from toast_onnx.engines.even_heads import Evened
from toast_onnx.finetune.local import LocalResult
from toast_onnx.matching.study import Study
from toast_onnx.pruning import Pruned
from toast_onnx.report.tables import HARDLY
from toast_onnx_cli.console import format_bytes, format_count

#: Predicted error of a part, relative to what it gives, beyond which the summary warns: with data, 35 % removed
#: of DeiT-T come to 0.30 (10 of 79 points lost), half to 0.40 (on another ViT-Tiny more than 40 of 83 points).
LARGE_ERROR = 0.35
#: Below this agreement the summary gives advice; below `HARDLY` it says so first.
BAD = 0.9


def head_notes(dense: Study, pruned: Pruned) -> list[str]:
    """What to say where a share of the heads rounds to none."""
    kept = heads_rounded_away(dense.match.blocks, pruned.ratios, pruned.widths)
    if not kept:
        return []
    most, where = max(kept.values()), ", ".join(str(index) for index in kept)
    return [
        f"attention.heads rounds to no head in block {where}; of {most} heads, more than {0.5 / most:.3g} drops one"
    ]


def correction_notes(results: Sequence[LocalResult]) -> list[str]:
    """What to say of blocks that were not corrected or trained: how many keep which weights, and why the first."""
    notes: dict[str, list[str]] = {}
    for result in results:
        if result.note is not None:
            lacking = "corrected" if result.before is None else "trained"
            notes.setdefault(f"keep their {result.kept} and are not {lacking}", []).append(result.note)
    return [f"{len(why)} of {len(results)} blocks {what}: {why[0]}" for what, why in notes.items()]


def even_notes(evened: Evened) -> list[str]:
    """What to say of attentions that had two head sizes, and of those that still have."""
    notes = []
    if evened.padded:
        notes.append(
            f"{len(evened.padded)} attentions with different widths in Q/K and V were padded with zeros to one: MACs "
            f"{format_count(evened.macs[0])} -> {format_count(evened.macs[1])}"
        )
    if evened.left:
        notes.append(f"{len(evened.left)} attentions keep different widths in Q/K and V: no fused kernel takes them")
    return notes


def _token_lines(tokens: dict[str, Any] | None) -> list[str]:
    """What became of the tokens, in a line where something did."""
    if tokens is None:
        return []
    merged = [m for m in tokens["merges"] if m["how"] == "merged"]
    dropped = [m for m in tokens["merges"] if m["how"] != "merged"]
    parts = []
    if merged:
        first, last = merged[0]["before"], merged[-1]["after"]
        parts.append(f"{first} -> {last} in {len(merged)} block{'s' if len(merged) > 1 else ''}")
    parts += [f"{m['before']} -> {m['after']} that are read behind block {m['block']}" for m in dropped]
    proof = tokens["twin"]
    checked = "not checked" if proof is None else f"twin agrees to {proof['worst']:.1e} of scale"
    return [f"tokens: {'; '.join(parts)}; {checked}"]


def _trust_lines(document: dict[str, Any]) -> list[str]:
    """The largest predicted error, with a warning beyond a bound, and what was left alone for want of data."""
    errors = [(e, b["index"], part) for b in document["blocks"] for part, e in b["predicted_errors"].items()]
    lines = []
    if errors:
        worst, block, part = max(errors)
        more = sum(e > LARGE_ERROR for e, _, _ in errors)
        warning = f"; WARNING: {more} of {len(errors)} parts lose more than {LARGE_ERROR}, remove less there"
        lines.append(f"largest predicted error: {worst:.2f} of {part} in block {block}{warning if more else ''}")
    if alone := document["no_norm_in_front"]:
        where = ", ".join(map(str, alone))
        lines.append(
            f"give --data: {len(alone)} blocks have no norm in front, and were left alone where made-up tokens would "
            f"stand for what they read ({where}); --force-synthetic prunes them all the same"
        )
    return lines


@dataclass(frozen=True)
class _Said:
    """What a summary says of the answers: in front of its first line, and in lines of their own."""

    alarm: str = ""
    lines: tuple[str, ...] = ()


def _agreement_lines(found: dict[str, Any] | None) -> _Said:
    if found is None:
        return _Said()
    where = f"{found['samples']} " + ("held-back samples" if found["held_back"] else "of the samples measured on")
    worst = found["worst"]
    costs = "" if worst is None else f"; block {worst['block']} is furthest off ({worst['error']:.0%}, {worst['part']})"
    scores = next((o for o in found["outputs"].values() if "top1_agreement" in o), None)
    if scores is None:
        error = max((o["relative_error"] for o in found["outputs"].values()), default=0.0)
        return _Said("", (f"outputs differ by {error:.2%} of their size on {where}{costs}",))
    same = scores["top1_agreement"]
    lines = [f"agreement: {same:.1%} on {where}, KL {scores['kl']:.3f}{costs}"]
    if same < BAD and worst is not None:
        part = "attention: {qk: 0, vo: 0}" if worst["part"] == "attention" else "ffn: {fc1: 0, fc2: 0}"
        lines.append(
            f"block {worst['block']} costs most: try `blocks: {{{worst['block']}: {{{part}}}}}` in the ratios file, "
            "ratios planned for the same cost (--macs), or `toast-onnx finetune`"
        )
    alarm = f"HARDLY AGREES with the dense model, on {same:.1%} of {where}: " if same < HARDLY else ""
    return _Said(alarm, tuple(lines))


def _idle(document: dict[str, Any]) -> str:
    """What the first line begins with where every block and every token is left."""
    kept = (k for block in document["blocks"] for k in block["kept"].values())
    touched = document["tokens"] is not None or any(k is not None for k in kept)
    return "" if touched else "NOTHING WAS REMOVED: "


def summary(document: dict[str, Any], out: Path, report: Path) -> str:
    """Lines on what happened, with the hashes of what was read; the first says where nothing went or the file grew."""
    dense, pruned, twin = document["dense"], document["pruned"], document["twin"]
    proof = "not checked" if twin is None else f"twin agrees to {twin['worst']:.1e} of scale"
    more = pruned["bytes"] / dense["bytes"] - 1
    loud = more > 0 and (pruned["params"] > dense["params"] or more > 0.01)
    grown = "LARGER than the original: " if loud else ""
    nodes = f" (+{more:.1%}, nodes that were added)" if more > 0 and not loud else ""
    said = _agreement_lines(document["agreement"])
    lines = [
        f"{said.alarm}{_idle(document)}{grown}{out}: "
        f"MACs {format_count(dense['macs'])} -> {format_count(pruned['macs'])}, "
        f"parameters {format_count(dense['params'])} -> {format_count(pruned['params'])}, "
        f"file {format_bytes(dense['bytes'])} -> {format_bytes(pruned['bytes'])}{nodes}; {proof}",
        *said.lines,
        f"statistics: {document['statistics']['source']}",
        *_token_lines(document["tokens"]),
        "read: " + ", ".join(f"{f['file']} {str(f['sha256'])[:12]}" for f in (*dense["files"], *document["read"])),
        *_trust_lines(document),
        *([document["options"]["expects"]] if document["options"]["expects"] else []),
        f"report: {report}",
    ]
    return "\n".join(lines)
