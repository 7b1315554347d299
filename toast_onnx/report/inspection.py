"""What `inspect` says of a model, as one plain document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from toast_onnx.matching.blocks import Attention, Block, Ffn
from toast_onnx.matching.searched import searched
from toast_onnx.matching.study import Study
from toast_onnx.planning.macs import (
    attention_macs,
    ffn_macs,
    graph_macs,
    graph_params,
    linear_params,
)
from toast_onnx.reasons import Kind, Reason
from toast_onnx.report.tables import Table, format_count
from toast_onnx.tokens.points import MergePoint, TokenStudy, study_tokens

COLUMNS = ("block", "name", "heads", "qk", "vo", "in", "width", "activation", "MACs", "params", "prunable", "tokens")
#: Columns that a narrow page can spare, the first one first.
SPARE = ("params", "activation", "tokens", "in", "MACs", "heads")
#: Parts as the table names them -> keys of the document.
ATTENTION = {"heads": "heads_prunable", "qk": "qk", "vo": "vo"}
FFN = {"fc1": "fc1", "fc2": "fc2"}


def inspection(study: Study) -> dict[str, Any]:
    """Blocks, widths, MACs and parameters of a model, what is prunable and why not.

    Returns:
        `{"model", "opset", "producer", "inputs", "macs", "params", "blocks": [...], "declined": [...],
        "notes": [...]}`; MACs are for
        the shapes under "inputs".
    """
    proto = study.view.model.proto
    tokens = study_tokens(study)
    return {
        "model": study.view.model.path.name,
        "opset": study.view.model.opset,
        "producer": " ".join(p for p in (proto.producer_name, proto.producer_version) if p),
        "inputs": {name: list(shape) for name, shape in study.counted_shapes.items()},
        "macs": graph_macs(study.view, study.counted),
        "params": graph_params(study.view),
        "blocks": [_block(study, b, p, tokens) for b, p in zip(study.match.blocks, tokens.points, strict=True)],
        "declined": declined(study),
        "notes": list(study.notes),
        "searched": searched(study),
    }


def declined(study: Study) -> list[dict[str, Any]]:
    """What looked like a block and was not taken."""
    found = study.match.declined.items()
    return [{"node": node, "reason": str(reason), "kind": reason.kind.value} for node, reason in found]


def _block(study: Study, block: Block, point: MergePoint, tokens: TokenStudy) -> dict[str, Any]:
    return {
        "index": block.index,
        "name": block.name,
        "attention": None if block.attention is None else _attention(study, block.attention),
        "ffn": None if block.ffn is None else _ffn(study, block.ffn),
        "tokens": _tokens(point, tokens),
    }


def _tokens(point: MergePoint, tokens: TokenStudy) -> dict[str, Any]:
    sequence = tokens.sequences[point.sequence] if point.sequence >= 0 else None
    return {
        "mergeable": point.reason is None,
        **_said(point.reason),
        "count": None if sequence is None else sequence.count,
        "special": None if sequence is None else sequence.front + sequence.back,
        "unread": bool(point.drops),
    }


def _attention(study: Study, attention: Attention) -> dict[str, Any]:
    return {
        "heads": attention.num_heads,
        "qk_dim": attention.qk_dim,
        "vo_dim": attention.vo_dim,
        "heads_prunable": _prunable(attention.heads_reason),
        "qk": _prunable(attention.qk_reason),
        "vo": _prunable(attention.vo_reason),
        "macs": attention_macs(study.view, study.counted, attention),
        "params": linear_params(attention.linears),
    }


def _ffn(study: Study, ffn: Ffn) -> dict[str, Any]:
    return {
        "in_features": ffn.in_features,
        "width": ffn.width,
        "activation": ffn.activation,
        "gated": ffn.gated,
        "fc1": _prunable(ffn.fc1_reason),
        "fc2": _prunable(ffn.fc2_reason),
        "macs": ffn_macs(study.view, study.counted, ffn),
        "params": linear_params(ffn.linears),
    }


def _prunable(reason: Reason | None) -> dict[str, Any]:
    return {"prunable": reason is None, **_said(reason)}


def _said(reason: Reason | None) -> dict[str, str | None]:
    """A reason's text, its kind and the node at fault."""
    if reason is None:
        return {"reason": None, "kind": None, "node": None}
    return {"reason": str(reason), "kind": reason.kind.value, "node": reason.node}


def inspection_table(document: dict[str, Any]) -> Table:
    """The blocks of an inspection, with what cannot be pruned and why below them."""
    lines = [
        f"{len(document['blocks'])} blocks, {format_count(document['macs'])} MACs at {_inputs(document)}, "
        f"{format_count(document['params'])} parameters",
        *_not_prunable(document),
        *(f"tokens not mergeable: {line}" for line in _lines(_unmergeable(document["blocks"]))),
        *_declined(document["declined"]),
        *([] if document["blocks"] else [document["searched"]]),
        *(f"note: {each}" for each in document["notes"]),
    ]
    return Table(
        f"{document['model']}  opset {document['opset']}  {document['producer']}".rstrip(),
        COLUMNS,
        [_row(b) for b in document["blocks"]],
        ("right", "left", *("right",) * 5, "left", "right", "right", "left", "left"),
        tuple(lines),
        SPARE,
    )


def _row(block: dict[str, Any]) -> list[str]:
    attention, ffn = block["attention"], block["ffn"]
    parts = [p for p in (attention, ffn) if p]
    prunable = [
        name
        for part, names in ((attention, ATTENTION), (ffn, FFN))
        if part
        for name, key in names.items()
        if part[key]["prunable"]
    ]
    return [
        str(block["index"]),
        block["name"],
        *([str(attention[k]) for k in ("heads", "qk_dim", "vo_dim")] if attention else ["-"] * 3),
        *([str(ffn["in_features"]), str(ffn["width"])] if ffn else ["-"] * 2),
        (ffn["activation"] + (", gated" if ffn["gated"] else "")) if ffn else "-",
        format_count(sum(p["macs"] for p in parts)),
        format_count(sum(p["params"] for p in parts)),
        " ".join(prunable) or "nothing",
        "mergeable" if block["tokens"]["mergeable"] else "-",
    ]


def _reasons(blocks: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], str]]:
    """Part, reason and block of all that cannot be pruned."""
    return [
        (f"{name}: ", block[part][key], str(block["index"]))
        for block in blocks
        for part, names in (("attention", ATTENTION), ("ffn", FFN))
        for name, key in (names.items() if block[part] else ())
        if not block[part][key]["prunable"]
    ]


def _unmergeable(blocks: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], str]]:
    """Reason and block of all behind which no tokens merge."""
    return [("", block["tokens"], str(block["index"])) for block in blocks if not block["tokens"]["mergeable"]]


def _not_prunable(document: dict[str, Any]) -> list[str]:
    """A line a reason; one for all that is quantized."""
    reasons = _reasons(document["blocks"])
    lines = [f"not prunable: {line}" for line in _lines(reasons)]
    blocks = {int(block) for _, said, block in reasons if said["kind"] == Kind.QUANTIZED}
    if blocks:
        lines.append(f"quantized: weights of blocks {', '.join(map(str, sorted(blocks)))}; prune first, then quantize")
    return lines


def _lines(reasons: Iterable[tuple[str, dict[str, Any], str]]) -> list[str]:
    """A line for reasons that differ in the node at fault alone, with their blocks; quantized ones are left out."""
    groups: dict[str, dict[str, list[str]]] = {}
    for part, said, block in reasons:
        if said["kind"] != Kind.QUANTIZED:
            text = part + said["reason"]
            group = groups.setdefault(text.replace(said["node"] or "", ""), {})
            group.setdefault(text, []).append(block)
    lines = []
    for group in groups.values():
        (text, own), *others = group.items()
        alike = f"; alike in {', '.join(block for _, blocks in others for block in blocks)}" if others else ""
        lines.append(f"{text} (block {', '.join(own)}{alike})")
    return lines


def _declined(entries: list[dict[str, str]]) -> list[str]:
    """A line a reason, with the first of the nodes it holds for."""
    nodes: dict[str, list[str]] = {}
    for entry in entries:
        nodes.setdefault(entry["reason"], []).append(entry["node"])
    return [
        f"declined: {names[0]}{f' and {len(names) - 1} more nodes' if len(names) > 1 else ''}: {reason}"
        for reason, names in nodes.items()
    ]


def _inputs(document: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in document["inputs"].items())
