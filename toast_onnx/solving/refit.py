"""The last layer of a block fitted once more, to what the dense model has behind the block.

Errors of the blocks before it reach a block's input, and no one-shot solution has seen them. The change of the layer is
a ridge regression of what its output lacks on what it reads: the penalty pulls towards the weights as they are, not
towards zero. How much of the change is taken, other samples decide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.moments import Moments

Array = NDArray[np.float64]

#: Ridge strengths, as fractions of the mean eigenvalue of the inputs' covariance; infinity changes the bias alone.
STRENGTHS = (math.inf, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)


@dataclass(frozen=True)
class Lack:
    """Weighted sums over tokens of a layer's input x (n,) and of what its output lacks, y (m,).

    Attributes:
        inputs: moments of x.
        total: sum of w y, (m,).
        cross: sum of w x y^T, (n, m).
        energy: sum of w |y|^2.
    """

    inputs: Moments
    total: Array
    cross: Array
    energy: float

    @classmethod
    def of(cls, x: ArrayLike, y: ArrayLike, weights: ArrayLike) -> Lack:
        """Sums over tokens x (tokens, n), y (tokens, m), each counted `weights` (tokens,) times.

        Products are taken in the precision of x, all else in float64.
        """
        rows, lacking = np.asarray(x), np.asarray(y, np.float64)
        w = np.asarray(weights, np.float64)
        root = np.sqrt(w)[:, None]
        scaled, wanted = rows * root.astype(rows.dtype), lacking * root
        # A matrix times itself costs half of a product of two.
        gram, cross = scaled.T @ scaled, scaled.T @ wanted.astype(rows.dtype)
        moments = Moments(float(w.sum()), w @ rows, gram.astype(np.float64), len(rows))
        return cls(moments, w @ lacking, cross.astype(np.float64), float(np.square(wanted).sum()))

    def merge(self, other: Lack) -> Lack:
        """Sums over both sets of tokens."""
        return Lack(
            self.inputs.merge(other.inputs),
            self.total + other.total,
            self.cross + other.cross,
            self.energy + other.energy,
        )

    def change(self, strength: float) -> tuple[Array, Array]:
        """What to add to the weight (n, m) and to the bias (m,)."""
        mean, lacking = self.inputs.mean, self.total / self.inputs.count
        if math.isinf(strength):
            return np.zeros(self.cross.shape), lacking
        values, vectors = self._eigen
        shift = max(strength * float(values.mean()), np.finfo(np.float64).tiny)
        covariance = self.cross / self.inputs.count - np.outer(mean, lacking)
        weight = vectors @ ((vectors.T @ covariance) / (values + shift)[:, None])
        return weight, lacking - mean @ weight

    def left(self, weight: Array, bias: Array) -> float:
        """Mean of |y - x W - b|^2 with a change of the weight (n, m) and the bias (m,)."""
        count, mean = self.inputs.count, self.inputs.mean
        explained = 2 * float((weight * self.cross).sum() + bias @ self.total) / count
        made = float((weight * (self.inputs.second @ weight)).sum() + bias @ bias + 2 * bias @ (mean @ weight))
        return self.energy / count - explained + made

    @cached_property
    def _eigen(self) -> tuple[Array, Array]:
        values, vectors = np.linalg.eigh(self.inputs.covariance)
        return np.clip(values, 0, None), vectors


def before_scale(lack: ArrayLike, gamma: ArrayLike | None) -> Array:
    """What a layer's output lacks, of what the stream behind its layer scale does.

    Args:
        lack: (tokens, m) in the residual stream.
        gamma: layer scale (m,); a channel that it switches off lacks nothing. None where there is none.
    """
    wanted = np.asarray(lack, np.float64)
    if gamma is None:
        return wanted
    scale = np.broadcast_to(np.asarray(gamma, np.float64), wanted.shape)
    return np.divide(wanted, scale, out=np.zeros_like(wanted), where=scale != 0)


def refit(fit: Lack, judge: Lack) -> tuple[Array, Array, float]:
    """The change of a layer that leaves the least error on samples it was not fitted to.

    Args:
        fit: sums over the samples that the change follows from; where x has no entries (n = 0), the bias alone changes.
        judge: sums over other samples.

    Returns:
        What to add to the weight (n, m) and to the bias (m,), and which of `STRENGTHS` that is.
    """
    strengths = STRENGTHS if fit.cross.size else STRENGTHS[:1]
    changes = [(*fit.change(strength), strength) for strength in strengths]
    return min(changes, key=lambda each: judge.left(each[0], each[1]))
