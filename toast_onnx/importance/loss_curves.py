"""Reconstruction losses of one part at every kept count, from one pass of its solver.

All are what the closed forms of `toast_onnx.solving` minimise (docs/method.md): a curve is an array of n + 1
numbers, entry k the expected squared error of the part's output with k kept, so that the last one is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.arithmetic import Factor, arithmetic
from toast_onnx.importance.regular import damping
from toast_onnx.importance.second_order import Elimination, default_batch

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Widths at which second-order elimination is started anew; between two of them units leave by their cost there.
STOPS = 16


def tail_energies(singular_values: ArrayLike) -> Array:
    """Energy outside the r leading directions, for r = 0 .. d, summed over heads.

    Args:
        singular_values: (heads, d), descending.
    """
    energy = np.square(np.asarray(singular_values, np.float64)).sum(axis=0)
    return np.append(np.cumsum(energy[::-1])[::-1], 0.0)


def readout_losses(
    covariance: ArrayLike, w: ArrayLike, order: Sequence[int] | Indices, compensation: str = "ridge"
) -> Array:
    """Error of a read-out y = x W + b that keeps the first k channels of an order, for k = 0 .. n.

    With ridge the kept channels predict the dropped ones. In the Cholesky factor S = L L^T, channels in order, the
    part of the last n - k that the first k do not predict has the covariance of L's lower right corner, so that the
    error is the sum of || (L^T W)_j ||^2 over j >= k: one factorisation gives all counts.

    Args:
        covariance: (n, n) of x; the uncentred second moment where nothing restores the mean (compensation none).
        w: (n, m) read-out; fold layer scale in.
        order: all n channels, the most important first.
        compensation: none and bias leave the kept rows as they are.
    """
    index = np.asarray(order, np.int64)
    s = np.asarray(covariance, np.float64)[np.ix_(index, index)]
    rows = np.asarray(w, np.float64)[index]
    if compensation == "ridge":
        each = _factor(s).energies(rows)
    else:
        pairs = s * (rows @ rows.T)
        each = np.diagonal(pairs) + 2 * np.triu(pairs, 1).sum(axis=1)  # entry k: with itself and all behind it
    return np.append(np.maximum(np.cumsum(each[::-1])[::-1], 0.0), 0.0)


def elimination_order(covariance: ArrayLike, w: ArrayLike, batch: int | None = None) -> Indices:
    """All channels by second-order elimination, the one that stays longest first: (n,).

    One elimination runs through `STOPS` widths. Between two stops the order is that of the channels' costs at the first
    of them.

    Args:
        covariance: (n, n).
        w: (n, m) read-out.
        batch: channels removed between two refits; None grows it with the width.
    """
    s = np.asarray(covariance, np.float64)
    n = len(s)
    elimination = Elimination(s, w)
    alive = elimination.alive
    removed: list[Indices] = []
    for kept in sorted({max(1, round(n * k / STOPS)) for k in range(STOPS)}, reverse=True):
        if kept >= alive.size:
            continue
        costs = elimination.costs()
        elimination.run(kept, batch or default_batch(n))
        gone = ~np.isin(alive, elimination.alive)
        removed.append(alive[gone][np.argsort(-costs[gone], kind="stable")])
        alive = elimination.alive
    return np.concatenate([alive, *reversed(removed)])


def by_head(ranks: ArrayLike) -> Indices:
    """Channels of all heads, head-major, so that every head's best come first, then every head's second best: (H * d,).

    Args:
        ranks: (H, d) scores, higher is better.
    """
    scores = np.asarray(ranks, np.float64)
    heads, d = scores.shape
    order = np.argsort(-scores, axis=1, kind="stable")  # (H, d)
    return np.asarray((order + d * np.arange(heads)[:, None]).T.reshape(-1), np.int64)


def _factor(s: Array) -> Factor:
    """L with L L^T = S; as little as possible is added where rounding left S short of positive definite."""
    for strength in (1e-9, 1e-7, 1e-5):
        try:
            return arithmetic(len(s)).factor(s, damping(s, strength))
        except np.linalg.LinAlgError:
            continue
    return arithmetic(len(s)).factor(s, damping(s, 1e-3))
