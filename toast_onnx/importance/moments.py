"""First and second moments of activations, kept as raw sums so that shards of a calibration run add up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Weighted sums over tokens of one activation `x` with n channels, or of one activation per head.

    Attributes:
        count: sum of the token weights (dimensionless; the number of tokens when all weights are one).
        total: sum of w * x, shape (..., n).
        gram: sum of w * x x^T, shape (..., n, n). Leading axes, if any, are heads.
        tokens: number of tokens behind the sums, which says how far they can be trusted; infinite for a distribution.
    """

    count: float
    total: Array
    gram: Array
    tokens: float = math.inf

    def __post_init__(self) -> None:
        if self.gram.shape != (*self.total.shape, self.total.shape[-1]):
            raise ValueError(f"gram {self.gram.shape} does not fit total {self.total.shape}")
        if not self.count > 0:
            raise ValueError(f"count must be positive, got {self.count}")

    @classmethod
    def of(cls, x: ArrayLike, weights: ArrayLike | None = None) -> Moments:
        """Moments of samples `x` (tokens, n), each token counted `weights` (tokens,) times, or once."""
        rows = np.asarray(x, dtype=np.float64)
        w = np.ones(rows.shape[0]) if weights is None else np.asarray(weights, dtype=np.float64)
        weighted = rows * w[:, None]
        return cls(float(w.sum()), weighted.sum(axis=0), weighted.T @ rows, rows.shape[0])

    @classmethod
    def known(cls, mean: ArrayLike, covariance: ArrayLike, count: float = 1.0, tokens: float = math.inf) -> Moments:
        """Moments of a distribution, or of tokens, given by `mean` (..., n) and `covariance` (..., n, n)."""
        m = np.asarray(mean, dtype=np.float64)
        gram = m[..., :, None] * m[..., None, :]
        gram += np.asarray(covariance)
        gram *= count
        return cls(count, count * m, gram, tokens)

    @property
    def mean(self) -> Array:
        """E[x], shape (..., n)."""
        return self.total / self.count

    @property
    def second(self) -> Array:
        """E[x x^T], not centred, shape (..., n, n)."""
        return self.gram / self.count

    @cached_property
    def covariance(self) -> Array:
        """E[(x - mean)(x - mean)^T], shape (..., n, n); computed once, so it is not to be written to."""
        found, mean = self.second, self.mean
        found -= mean[..., :, None] * mean[..., None, :]
        found.flags.writeable = False
        return found

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of tokens together."""
        return Moments(
            self.count + other.count, self.total + other.total, self.gram + other.gram, self.tokens + other.tokens
        )

    def through(self, w: ArrayLike, b: ArrayLike) -> Moments:
        """Moments of `x @ w + b` for w (n, m), b (m,); for w (n, H, d), b (H, d) one set for each head."""
        weight, bias = np.asarray(w, dtype=np.float64), np.asarray(b, dtype=np.float64)
        columns = np.moveaxis(weight, 0, -2)  # (..., n, m)
        mean = self.mean @ columns + bias
        return Moments.known(mean, np.swapaxes(columns, -1, -2) @ self.covariance @ columns, tokens=self.tokens)


def merge(shards: Iterable[Moments]) -> Moments:
    """Moments of all shards together; raises TypeError when there is none."""
    return reduce(Moments.merge, shards)
