"""Matrix products and convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toast_onnx.finetune.ops.registry import Node, Unsupported, op

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@op("MatMul")
def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product."""
    return torch.matmul(a, b)


@op("Gemm")
def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha A' B' + beta C with optional transposes."""
    a = a.t() if node.get("transA", 0) else a
    b = b.t() if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    y = torch.matmul(a, b)
    y = y if alpha == 1.0 else alpha * y
    return y if c is None else y + (c if beta == 1.0 else beta * c)


@op("Einsum")
def einsum(node: Node, *inputs: Tensor) -> Tensor:
    """Sum of products in Einstein's notation."""
    return torch.einsum(node.get("equation"), *inputs)


@op("Conv")
def conv(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Convolution, (B, C, *space) with w (M, C / group, *kernel)."""
    rank = w.ndim - 2
    stride = node.get("strides", [1] * rank)
    dilation = node.get("dilations", [1] * rank)
    x = F.pad(x, _flat(paddings(node, x.shape[2:], w.shape[2:], stride, dilation)))
    return _CONV[rank](x, w, b, stride, 0, dilation, node.get("group", 1))


@op("ConvTranspose")
def conv_transpose(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Transposed convolution with explicit pads, (B, C, *space) with w (C, M / group, *kernel)."""
    rank = w.ndim - 2
    if node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or node.get("output_shape"):
        raise Unsupported("ConvTranspose with auto_pad or output_shape")
    pads = node.get("pads", [0] * 2 * rank)
    extra = node.get("output_padding", [0] * rank)
    stride = node.get("strides", [1] * rank)
    y: Tensor = _CONV_TRANSPOSE[rank](
        x, w, b, stride, 0, extra, node.get("group", 1), node.get("dilations", [1] * rank)
    )
    # Cutting the result covers unequal pads, which PyTorch's own argument does not.
    return F.pad(y, _flat([(-pads[k], -pads[k + rank]) for k in range(rank)]))


def paddings(node: Node, space: Any, kernel: Any, stride: Any, dilation: Any) -> list[tuple[int, int]]:
    """(before, after) of every spatial axis, from `pads` or `auto_pad`."""
    rank = len(kernel)
    auto = node.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        pads = node.get("pads", [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
        return [(pads[k], pads[k + rank]) for k in range(rank)]
    result = []
    for size, k, s, d in zip(space, kernel, stride, dilation, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return result


def _flat(pads: list[tuple[int, int]]) -> list[int]:
    """In the order of `torch.nn.functional.pad`: last axis first."""
    return [w for pair in reversed(pads) for w in pair]
