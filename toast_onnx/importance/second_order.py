"""Second-order selection: which regressors a linear read-out can lose most cheaply once the others are refitted.

For y = x W with covariance S of x, dropping channel j and refitting the rest costs ||w_j||^2 / [S^-1]_jj (optimal
brain surgeon, Hassibi and Stork 1993), where w_j is the row of the current solution. The same removal updates W and
S^-1, so the next cost is again exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.regular import regular
from toast_onnx.importance.selection import Indices

Array = NDArray[np.float64]

#: Candidates for each removal of a batch.
POOL = 4


def keep_second_order(
    covariance: Array, w: ArrayLike, kept: int, batch: int = 1, groups: ArrayLike | None = None
) -> Indices:
    """Removes the cheapest channels, `batch` at a time, until `kept` stay.

    Args:
        covariance: (n, n) of the channels; the uncentred second moment where the read-out has no free bias.
        w: (n, m) read-out; fold layer scale in.
        kept: channels that stay, in every group where groups are given.
        batch: channels removed between two updates; 1 is exact greedy removal.
        groups: (n,) group of each channel (heads); every group keeps `kept`.

    Returns:
        (kept,) or (groups, kept), ascending.

    Raises:
        ValueError: fewer than `kept` channels, or a batch below one.
    """
    n = covariance.shape[0]
    labels = np.zeros(n, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
    sizes = np.bincount(labels)
    if kept < 1 or kept > sizes.min() or batch < 1:
        raise ValueError(f"cannot keep {kept} of {sizes.min()} channels in batches of {batch}")
    inverse = regular_inverse(covariance)
    weights = np.array(w, dtype=np.float64)
    alive = np.arange(n, dtype=np.int64)
    while alive.size > kept * sizes.size:
        spare = np.bincount(labels[alive], minlength=sizes.size) - kept
        gone = _cheapest(inverse, weights, labels[alive], spare, batch)
        inverse, weights, stay = without(inverse, weights, gone)
        alive = alive[stay]
    if groups is None:
        return alive
    return np.stack([alive[labels[alive] == g] for g in range(sizes.size)])


def regular_inverse(covariance: Array) -> Array:
    """Inverse of a covariance (n, n), with what makes it exist added to its diagonal."""
    return np.asarray(np.linalg.inv(regular(covariance)), np.float64)


def without(inverse: Array, weights: Array, gone: Indices) -> tuple[Array, Array, Indices]:
    """Inverse covariance and solution of the channels that stay, given that the others are gone (Schur complement).

    Args:
        inverse: (n, n) inverse covariance.
        weights: (n, m) solution.
        gone: (b,) positions to remove.

    Returns:
        (k, k), (k, m) and the positions that stay (k,), ascending.
    """
    stay = np.setdiff1d(np.arange(len(weights)), gone)
    carry = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[np.ix_(gone, stay)])  # (b, k)
    left = inverse[np.ix_(stay, stay)] - inverse[np.ix_(stay, gone)] @ carry
    return (left + left.T) / 2, weights[stay] - carry.T @ weights[gone], stay


def _cheapest(inverse: Array, weights: Array, labels: Indices, spare: Indices, batch: int) -> Indices:
    """Positions of up to `batch` channels to remove before the next update of everything, ascending.

    Removing one of two alike channels makes the other one dear, so each removal is carried out at once among the
    cheapest candidates (their part of the inverse is small). Costs of the others only grow meanwhile, in practice, so
    the batch ends where the cheapest candidate costs more than they did.

    Args:
        inverse: (n, n) inverse covariance of the channels still there.
        weights: (n, m) current solution.
        labels: (n,) group of each channel.
        spare: (groups,) how many each group may lose.
        batch: the most to remove.
    """
    costs = np.where(spare[labels] > 0, np.square(weights).sum(axis=1) / np.diagonal(inverse), np.inf)
    order = np.argsort(costs, kind="stable")
    pool, beyond = order[: POOL * batch], order[POOL * batch : POOL * batch + 1]
    limit = costs[beyond].min(initial=np.inf)
    small, rows, left = inverse[np.ix_(pool, pool)], weights[pool], spare.copy()
    chosen: list[int] = []
    enough = max(1, batch // 4)  # where hundreds cost nothing, being exact among them is not worth an update each
    while len(chosen) < batch:
        open_ = left[labels[pool]] > 0
        open_[chosen] = False
        if not open_.any():
            break
        now = np.where(open_, np.square(rows).sum(axis=1) / np.where(open_, np.diagonal(small), 1.0), np.inf)
        j = int(now.argmin())
        if len(chosen) >= enough and now[j] > limit:
            break
        column = small[:, j] / small[j, j]
        rows = rows - np.outer(column, rows[j])
        small = small - np.outer(column, small[j])
        left[labels[pool[j]]] -= 1
        chosen.append(j)
    return np.sort(pool[chosen])


def default_batch(n: int) -> int:
    """Channels to remove between two updates: a 64th of the width, at least one (its cost is in docs/method.md)."""
    return max(1, n // 64)
