"""Output shapes of ONNX Runtime's own operators (domain `com.microsoft`), which ONNX cannot infer.

Specification: ONNX Runtime's contrib operator documentation. Only what its optimizer puts into transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from toast_onnx.matching.graph import attribute
from toast_onnx.matching.operators import Effect, Trait, having, operators

Shape = tuple[int, ...] | None


def contrib_shapes(node: onnx.NodeProto, inputs: Sequence[Shape]) -> list[Shape] | None:
    """Shapes of a contrib node's outputs; None when the operator is not known here."""
    first = inputs[0] if inputs else None
    if first is None:
        return None
    count = len(node.output)
    if node.op_type in having(Trait.LIKE_FIRST):
        return [first] + [None] * (count - 1)
    if node.op_type in operators(Effect.ADDS_AND_NORMS):
        statistics = (*first[:-1], 1)
        shapes: list[Shape] = [first, statistics, statistics, first]
        return shapes[:count]
    if node.op_type == "EmbedLayerNormalization" and inputs[2] is not None:
        embedded = (*first, inputs[2][-1])
        lengths: list[Shape] = [embedded, first[:1], embedded]
        return lengths[:count]
    if node.op_type == "FusedMatMul":
        return [_fused_matmul(node, first, inputs[1])] + [None] * (count - 1)
    if node.op_type == "FusedGemm" and inputs[1] is not None:
        return [(first[0], inputs[1][0 if attribute(node, "transB", 0) else 1])]
    width = _context_width(node, first, [*inputs[1:], None, None])
    return None if width is None else [(*first[:2], width)] + [None] * (count - 1)


def _context_width(node: onnx.NodeProto, first: tuple[int, ...], others: Sequence[Shape]) -> int | None:
    """Channels of what an attention gives out, (batch, tokens, channels); None for other operators."""
    second, third = others[:2]
    if node.op_type == "Attention" and second is not None:
        sizes: Any = attribute(node, "qkv_hidden_sizes")
        return int(sizes[2]) if sizes else second[-1] // 3
    if node.op_type == "MultiHeadAttention":
        if third is not None:
            return third[-1] if len(third) == 3 else third[1] * third[-1]
        return first[-1] if len(first) == 3 else first[2] * first[4]  # packed: (batch, tokens, heads, 3, dim)
    if node.op_type == "GroupQueryAttention" and second is not None and third is not None:
        group = int(attribute(node, "num_heads", 1)) // int(attribute(node, "kv_num_heads", 1))  # type: ignore[call-overload]
        return int(third[-1] * group)
    return None


def _fused_matmul(node: onnx.NodeProto, a: tuple[int, ...], b: Shape) -> Shape:
    if b is None:
        return None
    if attribute(node, "transA", 0):
        a = (*a[:-2], a[-1], a[-2])
    if attribute(node, "transB", 0):
        b = (*b[:-2], b[-1], b[-2])
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return None
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])
