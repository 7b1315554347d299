"""Fused attention: ONNX's `Attention` (opset 23) and what the other spellings share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toast_onnx.finetune.ops.registry import Node, Unsupported, op


@op("Attention")
def attention(
    node: Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *more: Tensor | None,
) -> Tensor:
    """Attention on (B, H, S, d), or on (B, S, H * d) with the numbers of heads as attributes.

    Only the first output is made. Boolean masks mean "may look"; others are added.
    """
    if past_key is not None or past_value is not None or any(t is not None for t in more) or any(node.outputs[1:]):
        raise Unsupported("Attention with a key-value cache")
    flat = q.ndim == 3
    if flat:
        q = split_heads(q, node.get("q_num_heads"))
        k, v = (split_heads(t, node.get("kv_num_heads")) for t in (k, v))
    y = attend(q, k, v, mask, node.get("scale"), bool(node.get("is_causal", 0)), node.get("softcap", 0.0))
    return merge_heads(y) if flat else y


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T + mask) v; q (B, H, S, d), k (B, G, T, d), v (B, G, T, e) with G dividing H."""
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if not softcap and not (causal and mask is not None):
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    return torch.matmul(torch.softmax(scores, -1), v)


def split_heads(x: Tensor, heads: Any) -> Tensor:
    """(B, S, H * d) -> (B, H, S, d)."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, S, d) -> (B, S, H * d)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)
