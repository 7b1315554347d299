"""First and second moments of activations, kept as raw sums so that shards of a calibration run add up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property, reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Moments:
    """Weighted sums over tokens of one activation `x` with n channels, or of one activation per head.

    Nothing of it is to be written to. Of the sum of products and the covariance one is given, and the other one is
    computed once where it is asked for.

    Attributes:
        count: sum of the token weights (dimensionless; the number of tokens when all weights are one).
        total: sum of w * x, shape (..., n).
        tokens: number of tokens behind the sums, which says how far they can be trusted; infinite for a distribution.
    """

    def __init__(self, count: float, total: Array, gram: Array, tokens: float = math.inf) -> None:
        """Moments from sums.

        Args:
            count: as the attribute.
            total: as the attribute.
            gram: sum of w * x x^T, shape (..., n, n). Leading axes, if any, are heads.
            tokens: as the attribute.

        Raises:
            ValueError: shapes do not fit, or no positive count.
        """
        self._begin(count, total, gram, tokens)
        self.gram = gram

    def _begin(self, count: float, total: Array, products: Array, tokens: float) -> None:
        if products.shape != (*total.shape, total.shape[-1]):
            raise ValueError(f"gram {products.shape} does not fit total {total.shape}")
        if not count > 0:
            raise ValueError(f"count must be positive, got {count}")
        self.count, self.total, self.tokens = count, total, tokens

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
        found, around = cls.__new__(cls), np.asarray(covariance, dtype=np.float64).view()
        found._begin(count, count * np.asarray(mean, dtype=np.float64), around, tokens)
        around.flags.writeable = False
        found.covariance = around
        return found

    @property
    def mean(self) -> Array:
        """E[x], shape (..., n)."""
        return self.total / self.count

    @cached_property
    def gram(self) -> Array:
        """Sum of w * x x^T, shape (..., n, n)."""
        mean = self.mean
        found = mean[..., :, None] * mean[..., None, :]
        found += self.covariance
        found *= self.count
        return found

    @property
    def second(self) -> Array:
        """E[x x^T], not centred, shape (..., n, n)."""
        return self.gram / self.count

    @cached_property
    def covariance(self) -> Array:
        """E[(x - mean)(x - mean)^T], shape (..., n, n)."""
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
