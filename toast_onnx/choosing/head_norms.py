"""What norms of queries and keys ask of the choice of dimensions: centred weights, and the share of squares kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.matching.head_norms import HeadNorm
from toast_onnx.solving.weights import HeadWeights

Array = NDArray[Any]
#: The smallest share of a head's squares that is believed.
LEAST = 1e-3


def centred(part: HeadWeights, norm: HeadNorm) -> HeadWeights:
    """Weights whose outputs have no mean over a head, where the norm takes it off anyway."""
    if not norm.centred:
        return part
    w, b = part.weight.astype(np.float64), part.bias.astype(np.float64)
    w, b = w - w.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True)
    return replace(part, weight=w.astype(part.weight.dtype), bias=b.astype(part.bias.dtype))


def energy_kept(part: HeadWeights, norm: HeadNorm, s: Array | None, kept: Array, *, offset: bool) -> float:
    """Share of the sum of squares in front of a norm that the kept dimensions hold.

    Args:
        part: weights of all dimensions, centred.
        norm: the norm.
        s: (H, d, d) moments behind the norm; None where only weights are read.
        kept: dimensions that stay.
        offset: whether the norm's bias is part of these moments.
    """
    if s is None:
        each = np.square(part.weight.astype(np.float64)).sum(axis=(0, 1)) + np.square(part.bias).sum(axis=0)
    else:
        each = np.diagonal(s, axis1=-2, axis2=-1).reshape(-1, norm.gain.size).mean(axis=0)
        each = np.clip(each - np.square(norm.bias) if offset else each, 0, None)
        each = each / np.where(norm.gain == 0, np.inf, np.square(norm.gain))
    total = float(each.sum())
    return 1.0 if total <= 0 else float(np.clip(each[kept].sum() / total, LEAST, 1.0))


def behind_norm(s: Array, norm: HeadNorm, *, offset: bool) -> Array:
    """Moments (H, d, d) behind a norm, of those in front of it: every head has the mean square 1 there."""
    d = norm.gain.size
    centre = np.eye(d) - 1 / d if norm.centred else np.eye(d)
    inside = centre @ s @ centre
    trace = np.trace(inside, axis1=-2, axis2=-1)[..., None, None]
    found = inside * d / np.maximum(trace, np.finfo(np.float64).tiny) * np.outer(norm.gain, norm.gain)
    return np.asarray(found + np.outer(norm.bias, norm.bias) if offset else found)
