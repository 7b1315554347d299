"""Operators that move elements: shapes, slices, gathers, scatters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toast_onnx.finetune.ops.registry import DTYPES, Node, Unsupported, Value, number, numbers, op


@op("Reshape", host=(1,))
def reshape(node: Node, x: Tensor, shape: Value) -> Tensor:
    """New shape; 0 copies the input's extent unless `allowzero`."""
    sizes = numbers(shape)
    if not node.get("allowzero", 0):
        sizes = [x.shape[k] if isinstance(s, int) and s == 0 else s for k, s in enumerate(sizes)]
    return torch.reshape(x, tuple(sizes))


@op("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    """Two axes: those before `axis` and the rest."""
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


@op("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    """Axes in another order, reversed by default."""
    return x.permute(node.get("perm", list(range(x.ndim))[::-1]))


@op("Squeeze", host=(1,))
def squeeze(node: Node, x: Tensor, axes: Value = None) -> Tensor:
    """Drop axes of extent 1: those named (input since opset 13, else attribute), or all."""
    dims = numbers(axes) or node.get("axes")
    return torch.squeeze(x) if dims is None else torch.squeeze(x, tuple(dims))


@op("Unsqueeze", host=(1,))
def unsqueeze(node: Node, x: Tensor, axes: Value = None) -> Tensor:
    """Insert axes of extent 1 at these places of the result."""
    dims = numbers(axes) or list(node.get("axes"))
    rank = x.ndim + len(dims)
    for dim in sorted(d % rank for d in dims):
        x = x.unsqueeze(dim)
    return x


@op("Concat")
def concat(node: Node, *inputs: Tensor) -> Tensor:
    """Join along an axis."""
    return torch.cat(inputs, node.get("axis"))


@op("Split", host=(1,))
def split(node: Node, x: Tensor, sizes: Value = None) -> tuple[Tensor, ...]:
    """Cut along an axis, in the sizes given or in equal parts (the last may be smaller)."""
    axis, count = node.get("axis", 0), len(node.outputs)
    parts: Any = numbers(sizes) or node.get("split") or -(-x.shape[axis] // count)
    return tuple(torch.split(x, parts, axis))


@op("Slice", host=(1, 2, 3, 4))
def slice_(
    node: Node, x: Tensor, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None
) -> Tensor:
    """Ranges along axes; negative steps walk backwards. Opset 9 and older give them as attributes."""
    first = numbers(starts) or list(node.get("starts"))
    last = numbers(ends) or list(node.get("ends"))
    dims = numbers(axes) or node.get("axes") or range(len(first))
    for start, end, axis, step in zip(first, last, dims, numbers(steps) or [1] * len(first), strict=True):
        if step > 0:
            x = _forward(x, start, end, axis, step)
        else:
            index = torch.tensor(backwards(x.shape[axis], start, end, step), dtype=torch.long, device=x.device)
            x = x.index_select(axis, index)
    return x


def backwards(size: int, start: int, end: int, step: int) -> list[int]:
    """Positions of a slice with a negative step; unlike Python's, a start before the first element means the first."""
    first = min(max(start + size if start < 0 else start, 0), size - 1)
    last = min(max(end + size if end < 0 else end, -1), size - 1)
    return list(range(first, last, step))


def _forward(x: Tensor, start: Any, end: Any, axis: int, step: int) -> Tensor:
    place: list[Any] = [slice(None)] * x.ndim
    # Exporters write "to the end" as the largest integer.
    place[axis] = slice(start, None if isinstance(end, int) and end >= 2**31 - 1 else end, step)
    return x[tuple(place)]


@op("Expand", host=(1,))
def expand(node: Node, x: Tensor, shape: Value) -> Tensor:
    """Broadcast in both directions: a 1 in the target keeps the input's extent."""
    sizes = numbers(shape)
    rank = max(len(sizes), x.ndim)
    have = [1] * (rank - x.ndim) + list(x.shape)
    want = [1] * (rank - len(sizes)) + sizes
    return x.expand([h if isinstance(w, int) and w == 1 else w for h, w in zip(have, want, strict=True)])


@op("Tile", host=(1,))
def tile(node: Node, x: Tensor, repeats: Value) -> Tensor:
    """Repeat along every axis."""
    return x.repeat(numbers(repeats))


@op("Pad", host=(1, 3))
def pad(node: Node, x: Tensor, pads: Value = None, value: Tensor | None = None, axes: Value = None) -> Tensor:
    """Pad (or, where negative, crop) all or the given axes."""
    widths = numbers(pads) or list(node.get("pads"))
    dims = [d % x.ndim for d in numbers(axes)] or list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for k, dim in enumerate(dims):
        before[dim], after[dim] = widths[k], widths[k + len(dims)]
    mode = node.get("mode", "constant")
    flat = [w for dim in reversed(range(x.ndim)) for w in (before[dim], after[dim])]
    if mode == "constant":
        fill = node.get("value", 0.0) if value is None else value.reshape(-1)[0].item()
        return F.pad(x, flat, value=fill)
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, mode={"edge": "replicate", "reflect": "reflect", "wrap": "circular"}[mode])


@op("Gather", discrete=(1,))
def gather(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """Rows along an axis; negative indices count from the end."""
    axis = node.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    if axis == 0 and x.ndim == 2 and x.is_floating_point() and index.ndim:
        return F.embedding(index, x)
    taken = x.index_select(axis, index.reshape(-1).long())
    return taken.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


@op("GatherElements", discrete=(1,))
def gather_elements(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """One element along an axis for every index."""
    axis = node.get("axis", 0)
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index).long())


@op("GatherND", discrete=(1,))
def gather_nd(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """Slices at index tuples, after `batch_dims` common axes."""
    batch = node.get("batch_dims", 0)
    lead = [
        torch.arange(x.shape[k], device=x.device).reshape([-1 if j == k else 1 for j in range(index.ndim - 1)])
        for k in range(batch)
    ]
    return x[(*lead, *index.long().unbind(-1))]


@op("ScatterND", discrete=(1,))
def scatter_nd(node: Node, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """A copy with slices at index tuples replaced, or combined by `reduction`."""
    place, how = tuple(index.long().unbind(-1)), node.get("reduction", "none")
    if how in ("none", "add"):
        return x.clone().index_put(place, updates.to(x.dtype), accumulate=how == "add")
    raise Unsupported(f"ScatterND with reduction '{how}'")


@op("ScatterElements", discrete=(1,))
def scatter_elements(node: Node, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """A copy with one element along an axis replaced for every index, or added to."""
    axis, how = node.get("axis", 0), node.get("reduction", "none")
    index = torch.where(index < 0, index + x.shape[axis], index).long()
    if how == "none":
        return x.scatter(axis, index, updates)
    if how == "add":
        return x.scatter_add(axis, index, updates)
    raise Unsupported(f"ScatterElements with reduction '{how}'")


@op("ConstantOfShape", host=(0,))
def constant_of_shape(node: Node, shape: Value) -> Tensor:
    """A tensor filled with one value."""
    fill = np.asarray(node.get("value", np.zeros(1, np.float32))).reshape(-1)
    return torch.full(numbers(shape), fill[0].item(), dtype=torch.from_numpy(fill.copy()).dtype)


@op("Range", host=(0, 1, 2))
def range_(node: Node, start: Value, limit: Value, delta: Value) -> Tensor:
    """start, start + delta, ... below limit."""
    return torch.arange(number(start), number(limit), number(delta))


@op("Shape", discrete=(0,))
def shape(node: Node, x: Tensor) -> Tensor:
    """Extents as int64 (of a tensor whose shape was not followed on the host)."""
    return torch.tensor(list(x.shape)[node.get("start", 0) : node.get("end", x.ndim)], dtype=torch.long)


@op("OneHot", host=(1,), discrete=(0,))
def one_hot(node: Node, index: Tensor, depth: Value, values: Tensor) -> Tensor:
    """values[1] where the new axis equals the index, values[0] elsewhere."""
    axis, count = node.get("axis", -1), int(number(depth))
    hot = F.one_hot(index.long() % count, count)
    hot = hot.movedim(-1, axis)
    return torch.where(hot.bool(), values[1], values[0])


@op("Trilu", host=(1,))
def trilu(node: Node, x: Tensor, k: Value = None) -> Tensor:
    """Upper or lower triangle."""
    function = torch.triu if node.get("upper", 1) else torch.tril
    return function(x, number(k, 0))


@op("EyeLike", discrete=(0,))
def eye_like(node: Node, x: Tensor) -> Tensor:
    """Ones on a diagonal."""
    dtype = DTYPES[node.get("dtype")] if node.get("dtype") else x.dtype
    return torch.diag(torch.ones(max(x.shape), dtype=dtype, device=x.device), node.get("k", 0))[
        : x.shape[0], : x.shape[1]
    ]


@op("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Channels to pixels, depth-column-row or column-row-depth."""
    b, c, h, w = x.shape
    s = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, s)
    y = x.reshape(b, s, s, c // (s * s), h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(b, c // (s * s), h * s, w * s)


@op("SpaceToDepth")
def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Pixels to channels."""
    b, c, h, w = x.shape
    s = node.get("blocksize")
    return x.reshape(b, c, h // s, s, w // s, s).permute(0, 3, 5, 1, 2, 4).reshape(b, c * s * s, h // s, w // s)
