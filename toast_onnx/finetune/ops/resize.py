"""Resize as the ONNX specification writes it: one weight matrix (out, in) per axis, so that every mode is exact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toast_onnx.finetune.ops.registry import Node, Unsupported, Value, numbers, op


@op("Resize", "Upsample", host=(1, 2, 3))
def resize(node: Node, x: Tensor, roi: Value = None, scales: Value = None, sizes: Value = None) -> Tensor:
    """Interpolate along every axis whose size changes. (Opset 10 and `Upsample` have no roi: scales come second.)"""
    if scales is None and sizes is None and roi is not None:
        scales, roi = roi, None
    axes = [a % x.ndim for a in node.get("axes", range(x.ndim))]
    wanted = numbers(sizes)
    factors = numbers(scales) or [w / x.shape[a] for w, a in zip(wanted, axes, strict=True)]
    if wanted and node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("Resize that keeps the aspect ratio")
    for k, axis in enumerate(axes):
        size = x.shape[axis]
        # In float32, as runtimes do it: 0.7 of 10 is 7.
        out = wanted[k] if wanted else int(np.floor(np.float32(size) * np.float32(factors[k])))
        if out == size and factors[k] == 1:
            continue
        matrix = weights(node, size, out, float(factors[k]))
        moved = torch.from_numpy(matrix).to(x.device, x.dtype)
        x = torch.matmul(x.movedim(axis, -1), moved.T).movedim(-1, axis)
    return x


def weights(node: Node, size: int, out: int, scale: float) -> np.ndarray[Any, Any]:
    """Interpolation weights, (out, size) float32, rows summing to 1."""
    mode = node.get("mode", "nearest")
    matrix = np.zeros((out, size))
    for o in range(out):
        where = source(node, o, size, out, scale)
        for i, w in _taps(node, mode, where, scale, size):
            matrix[o, min(max(i, 0), size - 1)] += w
    return matrix.astype(np.float32)


def source(node: Node, o: int, size: int, out: int, scale: float) -> float:
    """Position in the input that output `o` stands for (attribute coordinate_transformation_mode).

    Rounded to float32, in which runtimes compute it: it decides which neighbour is nearest.
    """
    return float(np.float32(_position(node, o, size, out, scale)))


def _position(node: Node, o: int, size: int, out: int, scale: float) -> float:
    # Upsample and Resize before opset 11 know only this mapping.
    how = node.get("coordinate_transformation_mode", "half_pixel" if node.opset >= 11 else "asymmetric")
    if how == "asymmetric":
        return o / scale
    if how == "align_corners":
        return 0.0 if out == 1 else o * (size - 1) / (out - 1)
    if how == "pytorch_half_pixel" and out == 1:
        return 0.0
    if how in ("half_pixel", "pytorch_half_pixel"):
        return (o + 0.5) / scale - 0.5
    if how == "half_pixel_symmetric":
        centre = size / 2
        return centre * (1 - out / (scale * size)) + (o + 0.5) / scale - 0.5
    raise Unsupported(f"Resize with coordinate_transformation_mode '{how}'")


def _taps(node: Node, mode: str, where: float, scale: float, size: int) -> list[tuple[int, float]]:
    if mode == "nearest":
        return [(_nearest(node.get("nearest_mode", "round_prefer_floor" if node.opset >= 11 else "floor"), where), 1.0)]
    support = 1.0 if mode == "linear" else 2.0
    stretch = min(scale, 1.0) if node.get("antialias", 0) else 1.0
    first, last = math.floor(where - support / stretch) + 1, math.ceil(where + support / stretch) - 1
    a = node.get("cubic_coeff_a", -0.75)
    taps = [(i, _kernel(mode, abs(i - where) * stretch, a)) for i in range(first, last + 1)]
    if node.get("exclude_outside", 0):  # else the border is repeated outwards
        taps = [(i, w) for i, w in taps if 0 <= i < size]
    total = sum(w for _, w in taps)
    return [(i, w / total) for i, w in taps] if total else [(round(where), 1.0)]


def _kernel(mode: str, t: float, a: float) -> float:
    """Triangle, or Keys' cubic convolution (IEEE TASSP 29, 1981) with parameter a, at distance t."""
    if mode == "linear":
        return max(0.0, 1 - t)
    if t <= 1:
        return ((a + 2) * t - (a + 3)) * t * t + 1
    return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a if t < 2 else 0.0


def _nearest(how: str, where: float) -> int:
    if how == "floor":
        return math.floor(where)
    if how == "ceil":
        return math.ceil(where)
    return math.ceil(where - 0.5) if how == "round_prefer_floor" else math.floor(where + 0.5)
