"""Operators that reduce over axes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from toast_onnx.finetune.ops.registry import Node, Value, number, numbers, op

Reduction = Callable[[Tensor, list[int], bool], Tensor]

_REDUCTIONS: dict[str, Reduction] = {
    "ReduceL1": lambda x, dims, keep: torch.sum(x.abs(), dims, keepdim=keep),
    "ReduceL2": lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keepdim=keep),
    "ReduceLogSumExp": lambda x, dims, keep: torch.logsumexp(x, dims, keepdim=keep),
    "ReduceMax": lambda x, dims, keep: torch.amax(x, dims, keepdim=keep),
    "ReduceMean": lambda x, dims, keep: torch.mean(x, dims, keepdim=keep),
    "ReduceMin": lambda x, dims, keep: torch.amin(x, dims, keepdim=keep),
    "ReduceSum": lambda x, dims, keep: torch.sum(x, dims, keepdim=keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, dims, keep: torch.sum(x.square(), dims, keepdim=keep),
}


def _reduce(function: Reduction, node: Node, x: Tensor, axes: Value = None) -> Tensor:
    """Over the named axes (an input since opset 13 or 18, else an attribute); over all by default."""
    dims = numbers(axes) or node.get("axes")
    if not dims:
        if node.get("noop_with_empty_axes", 0):
            return x
        dims = list(range(x.ndim))
    return function(x, list(dims), bool(node.get("keepdims", 1)))


for _name, _function in _REDUCTIONS.items():
    op(_name, host=(1,))(functools.partial(_reduce, _function))


@op("ReduceProd", host=(1,))
def reduce_prod(node: Node, x: Tensor, axes: Value = None) -> Tensor:
    """Product over axes, one after the other."""
    dims = [d % x.ndim for d in (numbers(axes) or node.get("axes") or range(x.ndim))]
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keepdim=bool(node.get("keepdims", 1)))
    return x


@op("ArgMax", discrete=(0,))
def argmax(node: Node, x: Tensor) -> Tensor:
    """Index of the largest element along an axis."""
    return torch.argmax(x, node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))


@op("ArgMin", discrete=(0,))
def argmin(node: Node, x: Tensor) -> Tensor:
    """Index of the smallest element along an axis."""
    return torch.argmin(x, node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))


@op("TopK", host=(1,))
def top_k(node: Node, x: Tensor, k: Value) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) along an axis and where they were; of equal ones the first comes first."""
    axis, count = node.get("axis", -1), number(k)
    values, index = torch.sort(x, dim=axis, descending=bool(node.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), index.narrow(axis, 0, count)
