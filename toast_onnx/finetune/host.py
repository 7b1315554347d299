"""Shape arithmetic: what exporters write to compute sizes, executed on numpy arrays of integers.

These values depend on the inputs' shapes alone, so they cost no device work. While a graph is traced for export, sizes
may be symbolic; then the arrays hold Python objects and the same functions apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx.helper

from toast_onnx.finetune.ops.movement import backwards
from toast_onnx.finetune.ops.registry import Node

Array = np.ndarray[Any, Any]
HostFunction = Callable[..., Array]

#: Largest array (elements) that is computed here; larger constants are worked on where the weights are.
LIMIT = 65536


def as_array(values: Sequence[Any]) -> Array:
    """Sizes as a vector: int64, or objects where one is symbolic."""
    symbolic = any(not isinstance(v, int) for v in values)
    return np.array(list(values), dtype=object if symbolic else np.int64)


def _div(node: Node, a: Array, b: Array) -> Array:
    if np.issubdtype(a.dtype, np.floating) or np.issubdtype(b.dtype, np.floating):
        return np.divide(a, b)
    if object in (a.dtype, b.dtype):
        return a // b  # sizes are not negative
    return np.asarray(np.trunc(np.divide(a, b))).astype(a.dtype)


def _cast(node: Node, x: Array) -> Array:
    to = onnx.helper.tensor_dtype_to_np_dtype(node.get("to"))
    # A symbolic size cannot become a numpy number.
    return x if x.dtype == object else x.astype(to)


def _slice(
    node: Node,
    x: Array,
    starts: Array | None = None,
    ends: Array | None = None,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    first, last = (
        node.get(name) if given is None else given.reshape(-1).tolist()
        for name, given in (("starts", starts), ("ends", ends))
    )
    dims = node.get("axes", range(len(first))) if axes is None else axes.reshape(-1).tolist()
    strides = [1] * len(first) if steps is None else steps.reshape(-1).tolist()
    for start, end, axis, step in zip(first, last, dims, strides, strict=True):
        size = x.shape[axis]
        index = range(*slice(start, end, step).indices(size)) if step > 0 else backwards(size, start, end, step)
        x = np.take(x, list(index), axis)
    return x


def _axes(node: Node, axes: Array | None) -> tuple[int, ...] | None:
    given = node.get("axes") if axes is None else axes.reshape(-1).tolist()
    return None if given is None else tuple(given)


def _squeeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, _axes(node, axes))


def _unsqueeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(x, _axes(node, axes) or ())


def _reshape(node: Node, x: Array, shape: Array) -> Array:
    sizes = [int(s) for s in shape.reshape(-1)]
    if not node.get("allowzero", 0):
        sizes = [x.shape[k] if s == 0 else s for k, s in enumerate(sizes)]
    return x.reshape(sizes)


def _expand(node: Node, x: Array, shape: Array) -> Array:
    sizes = [int(s) for s in shape.reshape(-1)]
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(sizes)))


def _constant_of_shape(node: Node, shape: Array) -> Array:
    fill = np.asarray(node.get("value", np.zeros(1, np.float32))).reshape(-1)
    return np.full([int(s) for s in shape.reshape(-1)], fill[0], fill.dtype)


def _range(node: Node, start: Array, limit: Array, delta: Array) -> Array:
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _reduce(function: Callable[..., Any]) -> HostFunction:
    def reduce(node: Node, x: Array, axes: Array | None = None) -> Array:
        found = function(x, axis=_axes(node, axes), keepdims=bool(node.get("keepdims", 1)))
        return np.asarray(found, dtype=x.dtype)

    return reduce


def _sqrt(node: Node, x: Array) -> Array:
    return np.sqrt(x.astype(np.float32)) if x.dtype == object else np.sqrt(x)


HOST: dict[str, HostFunction] = {
    "Abs": lambda node, x: np.abs(x),
    "Add": lambda node, a, b: a + b,
    "And": lambda node, a, b: np.logical_and(a, b),
    "Cast": _cast,
    "Ceil": lambda node, x: np.ceil(x),
    "Concat": lambda node, *parts: np.concatenate(parts, node.get("axis")),
    "ConstantOfShape": _constant_of_shape,
    "Div": _div,
    "Equal": lambda node, a, b: np.asarray(a == b, dtype=bool),
    "Expand": _expand,
    "Floor": lambda node, x: np.floor(x),
    "Gather": lambda node, x, index: np.asarray(np.take(x, index, node.get("axis", 0))),
    "Greater": lambda node, a, b: np.asarray(a > b, dtype=bool),
    "GreaterOrEqual": lambda node, a, b: np.asarray(a >= b, dtype=bool),
    "Identity": lambda node, x: x,
    "Less": lambda node, a, b: np.asarray(a < b, dtype=bool),
    "LessOrEqual": lambda node, a, b: np.asarray(a <= b, dtype=bool),
    "Max": lambda node, *parts: np.maximum.reduce(np.broadcast_arrays(*parts)),
    "Min": lambda node, *parts: np.minimum.reduce(np.broadcast_arrays(*parts)),
    "Mod": lambda node, a, b: np.fmod(a, b) if node.get("fmod", 0) else a % b,
    "Mul": lambda node, a, b: a * b,
    "Neg": lambda node, x: -x,
    "Not": lambda node, x: np.logical_not(x),
    "Or": lambda node, a, b: np.logical_or(a, b),
    "Range": _range,
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Slice": _slice,
    "Sqrt": _sqrt,
    "Squeeze": _squeeze,
    "Sub": lambda node, a, b: a - b,
    "Transpose": lambda node, x: np.transpose(x, node.get("perm")),
    "Unsqueeze": _unsqueeze,
    "Where": lambda node, condition, a, b: np.asarray(np.where(condition, a, b)),
}
"""Operator -> numpy function of the node and its inputs."""
