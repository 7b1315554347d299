"""What `inspect` says of a model, as one plain document."""

from __future__ import annotations

from typing import Any

from toast_onnx.matching.blocks import Attention, Block, Ffn
from toast_onnx.matching.study import Study
from toast_onnx.planning.macs import (
    attention_linears,
    attention_macs,
    ffn_macs,
    graph_macs,
    graph_params,
    linear_params,
)
from toast_onnx.tokens.points import MergePoint, TokenStudy, study_tokens


def inspection(study: Study) -> dict[str, Any]:
    """Blocks, widths, MACs and parameters of a model, what is prunable and why not.

    Returns:
        `{"model", "opset", "producer", "inputs", "macs", "params", "blocks": [...], "declined": [...]}`; MACs are for
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
        "declined": [{"node": node, "reason": reason} for node, reason in study.match.declined.items()],
    }


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
        "reason": point.reason,
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
        "params": linear_params(attention_linears(attention)),
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
        "params": linear_params((*ffn.entries, ffn.fc2)),
    }


def _prunable(reason: str | None) -> dict[str, Any]:
    return {"prunable": reason is None, "reason": reason}
