"""ONNX Runtime's own operators (domain com.microsoft) that its optimizer writes into transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from toast_onnx.finetune.ops.attention import attend, merge_heads, split_heads
from toast_onnx.finetune.ops.registry import Node, Unsupported, op


@op("com.microsoft/Gelu")
def gelu(node: Node, x: Tensor) -> Tensor:
    """Exact GELU."""
    return F.gelu(x)


@op("com.microsoft/BiasGelu")
def bias_gelu(node: Node, x: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of x + bias."""
    return F.gelu(x + bias)


@op("com.microsoft/FastGelu")
def fast_gelu(node: Node, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU by tanh, of x + bias where there is one."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@op("com.microsoft/QuickGelu")
def quick_gelu(node: Node, x: Tensor) -> Tensor:
    """x * sigmoid(alpha x)."""
    return x * torch.sigmoid(node.get("alpha", 1.702) * x)


@op("com.microsoft/BiasAdd")
def bias_add(node: Node, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """x + bias + skip."""
    return x + bias + skip


@op("com.microsoft/FusedMatMul")
def fused_matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """alpha A' B' with optional transposes of the last two axes."""
    if node.get("transBatchA", 0) or node.get("transBatchB", 0):
        raise Unsupported("FusedMatMul with transposed batch axes")
    a = a.transpose(-1, -2) if node.get("transA", 0) else a
    b = b.transpose(-1, -2) if node.get("transB", 0) else b
    alpha = node.get("alpha", 1.0)
    return torch.matmul(a, b) if alpha == 1.0 else alpha * torch.matmul(a, b)


@op("com.microsoft/FusedGemm")
def fused_gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm with an activation."""
    activations: dict[str, Callable[[Tensor], Tensor]] = {"Relu": F.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid}
    a = a.t() if node.get("transA", 0) else a
    b = b.t() if node.get("transB", 0) else b
    y = node.get("alpha", 1.0) * torch.matmul(a, b)
    y = y if c is None else y + node.get("beta", 1.0) * c
    return activations[node.get("activation")](y)


@op("com.microsoft/SkipLayerNormalization")
def skip_layer_norm(
    node: Node, x: Tensor, skip: Tensor, gain: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """LayerNorm of x + skip (+ bias); the fourth output is that sum."""
    total = x + skip if bias is None else x + skip + bias
    y = F.layer_norm(total, total.shape[-1:], gain, beta, node.get("epsilon", 1e-12))
    return (y, None, None, total)[: len(node.outputs)]


@op("com.microsoft/SkipSimplifiedLayerNormalization")
def skip_rms_norm(
    node: Node, x: Tensor, skip: Tensor, gain: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """RMSNorm of x + skip (+ bias); the fourth output is that sum."""
    total = x + skip if bias is None else x + skip + bias
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + node.get("epsilon", 1e-12))
    return (total * scale * gain, None, None, total)[: len(node.outputs)]


@op("com.microsoft/MultiHeadAttention")
def multi_head_attention(
    node: Node,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    scores_bias: Tensor | None = None,
    *more: Tensor | None,
) -> Tensor:
    """Attention of (B, S, H * d) operands, or of one packed (B, S, H, 3, d), or with keys (B, H, T, d) ready made."""
    if any(t is not None for t in more) or any(node.outputs[1:]):
        raise Unsupported("MultiHeadAttention with a key-value cache")
    heads = node.get("num_heads")
    if k is None or v is None:
        if q.ndim != 5:
            raise Unsupported("MultiHeadAttention with packed keys and values")
        q, k, v = (t.flatten(2) for t in q.unbind(3))
    if bias is not None:
        width_q, width_v = q.shape[-1], bias.shape[0] - 2 * q.shape[-1]
        bq, bk, bv = torch.split(bias, [width_q, width_q, width_v])
        q = q + bq
        k, v = (t + b if t.ndim == 3 else t for t, b in ((k, bk), (v, bv)))
    k, v = (split_heads(t, heads) if t.ndim == 3 else t for t in (k, v))
    bias_ = _score_bias(scores_bias, padding, k)
    return merge_heads(attend(split_heads(q, heads), k, v, bias_, node.get("scale") or None))


@op("com.microsoft/Attention")
def packed_attention(
    node: Node,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    scores_bias: Tensor | None = None,
    *more: Tensor | None,
) -> Tensor:
    """Q, K and V from one weight (C, q + k + v), then attention; (B, S, C) -> (B, S, v)."""
    if past is not None or any(t is not None for t in more) or any(node.outputs[1:]):
        raise Unsupported("Attention (com.microsoft) with a key-value cache")
    heads = node.get("num_heads")
    packed = torch.matmul(x, w)
    packed = packed if b is None else packed + b
    sizes = node.get("qkv_hidden_sizes") or [w.shape[1] // 3] * 3
    q, k, v = (split_heads(t, heads) for t in torch.split(packed, list(sizes), -1))
    bias_ = _score_bias(scores_bias, mask, k)
    return merge_heads(attend(q, k, v, bias_, node.get("scale") or None, bool(node.get("unidirectional", 0))))


def _score_bias(bias: Tensor | None, mask: Tensor | None, k: Tensor) -> Tensor | None:
    """What is added to the scores (B, H, S, T): a bias, and a mask (B, T) whose zeros are padding, or lengths (B,)."""
    if mask is None:
        return bias
    if mask.shape == (k.shape[0],):
        mask = torch.arange(k.shape[2], device=mask.device) < mask[:, None]
    if mask.shape != (k.shape[0], k.shape[2]):
        raise Unsupported(f"attention with a mask of shape {tuple(mask.shape)}")
    closed = torch.zeros_like(mask, dtype=k.dtype).masked_fill(mask == 0, torch.finfo(torch.float32).min)[:, None, None]
    return closed if bias is None else bias + closed


@op("com.microsoft/EmbedLayerNormalization")
def embed_layer_norm(
    node: Node,
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    positions: Tensor,
    segment_table: Tensor | None,
    gain: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """LayerNorm of word + position (+ segment) embeddings, ids (B, S) -> (B, S, C); the mask's lengths; the sum."""
    place = positions[: ids.shape[1]] if position_ids is None else F.embedding(position_ids, positions)
    total = F.embedding(ids, words) + place
    if segments is not None and segment_table is not None:
        total = total + F.embedding(segments, segment_table)
    y = F.layer_norm(total, total.shape[-1:], gain, beta, node.get("epsilon", 1e-12))
    lengths = torch.full(ids.shape[:1], ids.shape[1]) if mask is None else mask.sum(1)
    return (y, lengths.to(ids.device, torch.int32), total)[: len(node.outputs)]
