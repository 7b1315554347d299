"""Pooling and sampling of images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from toast_onnx.finetune.ops.linear import paddings
from toast_onnx.finetune.ops.registry import Node, Unsupported, op

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@op("GlobalAveragePool")
def global_average_pool(node: Node, x: Tensor) -> Tensor:
    """Mean over all spatial axes, kept as extents of 1."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(node: Node, x: Tensor) -> Tensor:
    """Maximum over all spatial axes, kept as extents of 1."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@op("MaxPool")
def max_pool(node: Node, x: Tensor) -> Tensor:
    """Maximum in a window."""
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    stride, dilation = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    pads = paddings(node, x.shape[2:], kernel, stride, dilation)
    x = F.pad(x, [w for pair in reversed(pads) for w in pair], value=float("-inf"))
    y: Tensor = _MAX[rank](x, kernel, stride, 0, dilation, bool(node.get("ceil_mode", 0)))
    return y


@op("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    """Mean in a window; padding counts only where `count_include_pad` says so."""
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    stride = node.get("strides", [1] * rank)
    pads = paddings(node, x.shape[2:], kernel, stride, [1] * rank)
    if any(before != after for before, after in pads) or any(d != 1 for d in node.get("dilations", [1])):
        raise Unsupported("AveragePool with unequal pads or dilations")
    y: Tensor = _AVERAGE[rank](
        x,
        kernel,
        stride,
        [before for before, _ in pads],
        bool(node.get("ceil_mode", 0)),
        bool(node.get("count_include_pad", 0)),
    )
    return y


@op("GridSample")
def grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    """Samples at the points of a grid in -1..1; opset 20 renamed the modes."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(node.get("mode", "bilinear"), node.get("mode", "bilinear"))
    padding = node.get("padding_mode", "zeros")
    # ONNX lets the two differ in type, PyTorch does not.
    return F.grid_sample(x, grid.to(x.dtype), mode, padding, bool(node.get("align_corners", 0)))
