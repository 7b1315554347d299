"""Second-order selection: which regressors a linear read-out can lose most cheaply once the others are refitted.

For y = x W with covariance S of x, dropping channel j and refitting the rest costs ||w_j||^2 / [S^-1]_jj (optimal
brain surgeon, Hassibi and Stork 1993), where w_j is the row of the current solution. The same removal updates W and
S^-1, so the next cost is again exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.arithmetic import arithmetic
from toast_onnx.importance.regular import RELATIVE_JITTER, damping
from toast_onnx.importance.selection import Indices

Array = NDArray[np.float64]

#: Candidates for each removal of a batch.
POOL = 4
#: How often the diagonal term is raised where rounding left a covariance short of positive definite.
ATTEMPTS = 6


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
    if kept * sizes.size == n:
        alive = np.arange(n, dtype=np.int64)
    else:
        elimination = Elimination(covariance, w, labels)
        elimination.run(kept, batch)
        alive = elimination.alive
    if groups is None:
        return alive
    return np.stack([alive[labels[alive] == g] for g in range(sizes.size)])


class Elimination:
    """Channels leave one batch after another; inverse covariance and solution are those of the ones that stay.

    Attributes:
        alive: (k,) channels that stay, ascending.
    """

    def __init__(self, covariance: Array, w: ArrayLike, labels: Indices | None = None) -> None:
        """Start with all channels.

        Args:
            covariance: (n, n) of the channels.
            w: (n, m) read-out.
            labels: (n,) group of each channel, from 0; None for one group.
        """
        n = covariance.shape[0]
        self._left = arithmetic(n).remaining(regular_inverse(covariance), np.asarray(w, np.float64))
        self._channels = np.arange(n, dtype=np.int64)  # at each position
        self._labels = np.zeros(n, dtype=np.int64) if labels is None else labels
        self._there = np.ones(n, dtype=bool)

    @property
    def alive(self) -> Indices:
        return self._channels[self._there]

    def costs(self) -> Array:
        """What removing each channel of `alive` alone costs, (k,)."""
        return np.asarray(self._left.energies[self._there] / self._left.diagonal[self._there])

    def run(self, kept: int, batch: int) -> None:
        """Remove the cheapest channels, up to `batch` at a time, until every group keeps `kept`."""
        while (spare := np.bincount(self._labels[self._there]) - kept).any():
            if self._left.room() < batch:
                self._close_gaps(batch)
            gone = self._cheapest(spare, batch)
            self._left.remove(gone)
            self._there[gone] = False

    def _cheapest(self, spare: Indices, batch: int) -> Indices:
        """Positions of up to `batch` channels to remove before the next update of everything, ascending.

        Removing one of two alike channels makes the other one dear, so each removal is carried out at once among the
        cheapest candidates (their part of the inverse is small). Costs of the others only grow meanwhile, in practice,
        so the batch ends where the cheapest candidate costs more than they did.

        Args:
            spare: (groups,) how many each group may lose.
            batch: the most to remove.
        """
        open_ = self._there & (spare[self._labels] > 0)
        costs = np.full(open_.size, np.inf)
        costs[open_] = self._left.energies[open_] / self._left.diagonal[open_]
        order = np.argsort(costs, kind="stable")
        pool, beyond = order[: POOL * batch], order[POOL * batch : POOL * batch + 1]
        pool = pool[open_[pool]]
        limit = costs[beyond].min(initial=np.inf)
        small, rows, left = self._left.corner(pool), self._left.rows(pool), spare.copy()
        alike = rows @ rows.T  # inner products of the rows; they change with the same columns as the inverse
        # Both as they are now: small less F^T F, alike less F^T G + G^T F, of which only what is read is formed.
        factor, shared = np.empty((2, batch, pool.size))
        diagonal, energies = np.diagonal(small).copy(), np.diagonal(alike).copy()
        chosen: list[int] = []
        enough = max(1, batch // 4)  # where hundreds cost nothing, being exact among them is not worth an update each
        stays = np.ones(pool.size, dtype=bool)
        while len(chosen) < batch:
            candidates = np.flatnonzero(stays & (left[self._labels[pool]] > 0))
            if not candidates.size:
                break
            now = energies[candidates] / diagonal[candidates]
            k = int(now.argmin())
            if len(chosen) >= enough and now[k] > limit:
                break
            j, past = int(candidates[k]), len(chosen)
            f, g = factor[:past], shared[:past]
            pivot = diagonal[j] ** 0.5
            column = (small[j] - f[:, j] @ f) / pivot
            half = (alike[j] - f[:, j] @ g - g[:, j] @ f - energies[j] / 2 / pivot * column) / pivot
            diagonal -= column * column
            energies -= 2 * column * half
            factor[past], shared[past] = column, half
            left[self._labels[pool[j]]] -= 1
            stays[j] = False
            chosen.append(j)
        return np.sort(pool[chosen])

    def _close_gaps(self, batch: int) -> None:
        """Forget the channels that are gone; there is room for a batch then, at least."""
        stay = np.flatnonzero(self._there)
        self._left.settle(stay, batch)
        self._channels, self._labels = self._channels[stay], self._labels[stay]
        self._there = np.ones(stay.size, dtype=bool)


def regular_inverse(covariance: Array) -> Array:
    """Inverse of a covariance (n, n), with what makes it exist added to its diagonal.

    Rounding of sums over few tokens may lie beyond what `damping` says; ten times as much is added until the matrix is
    positive definite, for the inverse would else be of noise.

    Raises:
        LinAlgError: the covariance holds NaN or infinity.
    """
    least = damping(covariance, RELATIVE_JITTER)
    if not np.isfinite(covariance).all():  # a factor lets NaN through, and elimination would never end
        raise np.linalg.LinAlgError("the covariance holds NaN or infinity")
    for more in range(ATTEMPTS):
        try:
            return arithmetic(len(covariance)).inverse(covariance, least * 10**more)
        except np.linalg.LinAlgError:
            continue
    # Hardly any variance: what is left of sums that cancelled is noise of both signs.
    below = float(np.linalg.eigvalsh(covariance)[0])
    return arithmetic(len(covariance)).inverse(covariance, least - 2 * min(below, 0.0))


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


def default_batch(n: int) -> int:
    """Channels to remove between two updates: a 64th of the width, at least one (its cost is in docs/method.md)."""
    return max(1, n // 64)
