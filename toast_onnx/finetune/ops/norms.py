"""Normalisations and softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from toast_onnx.finetune.ops.registry import Node, op


@op("Softmax")
def softmax(node: Node, x: Tensor) -> Tensor:
    """Along one axis; before opset 13 over all axes from `axis` on."""
    return _old_or_new(torch.softmax, node, x)


@op("LogSoftmax")
def log_softmax(node: Node, x: Tensor) -> Tensor:
    """Logarithm of softmax."""
    return _old_or_new(torch.log_softmax, node, x)


def _old_or_new(function: Callable[[Tensor, int], Tensor], node: Node, x: Tensor) -> Tensor:
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.ndim
    flat = x.reshape(*x.shape[:axis], -1)
    return function(flat, -1).reshape(x.shape)


@op("LayerNormalization")
def layer_norm(node: Node, x: Tensor, gain: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Zero mean and unit variance over the axes from `axis` on (Ba et al. 2016); mean and 1/std as further outputs."""
    axis = node.get("axis", -1) % x.ndim
    eps, extents = node.get("epsilon", 1e-5), x.shape[axis:]
    if gain.shape == extents and (bias is None or bias.shape == extents):
        y = F.layer_norm(x, extents, gain, bias, eps)
    else:  # a gain that is broadcast, which the fused form does not take
        y = F.layer_norm(x, extents, None, None, eps) * gain
        y = y if bias is None else y + bias
    if len(node.outputs) == 1:
        return (y,)
    dims = list(range(axis, x.ndim))
    mean = x.mean(dims, keepdim=True)
    inverse = torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps)
    return y, mean, inverse


@op("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(node: Node, x: Tensor, gain: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich 2019)."""
    dims = list(range(node.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + node.get("epsilon", 1e-5)) * gain


@op("BatchNormalization", discrete=(3, 4))
def batch_norm(node: Node, x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """With the stored statistics, which are not trained."""
    return F.batch_norm(x, mean, var, gain, bias, False, 0.0, node.get("epsilon", 1e-5))


@op("InstanceNormalization")
def instance_norm(node: Node, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Per sample and channel."""
    return F.instance_norm(x, None, None, gain, bias, True, 0.0, node.get("epsilon", 1e-5))


@op("GroupNormalization")
def group_norm(node: Node, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Per sample and group of channels; gains are per group in opset 18, per channel since 21."""
    groups, channels = node.get("num_groups"), x.shape[1]
    if gain.shape[0] != channels:
        gain, bias = (t.repeat_interleave(channels // groups) for t in (gain, bias))
    return F.group_norm(x, groups, gain, bias, node.get("epsilon", 1e-5))


@op("LpNormalization")
def lp_norm(node: Node, x: Tensor) -> Tensor:
    """x over its p-norm along an axis."""
    length: Tensor = torch.linalg.vector_norm(x, node.get("p", 2), node.get("axis", -1), keepdim=True)
    return x / length
