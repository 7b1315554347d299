"""Second-order selection: which regressors a linear read-out can lose most cheaply once the others are refitted.

For y = x W with covariance S of x, dropping channel j and refitting the rest costs ||w_j||^2 / [S^-1]_jj (optimal
brain surgeon, Hassibi and Stork 1993), where w_j is the row of the current solution. The same removal updates W and
S^-1, so the next cost is again exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.blocked import inverse as inverse_of
from toast_onnx.importance.blocked import spans, strips
from toast_onnx.importance.regular import RELATIVE_JITTER, damping
from toast_onnx.importance.selection import Indices

Array = NDArray[np.float64]

#: Candidates for each removal of a batch.
POOL = 4
#: The inverse is brought up to date when a share of 1 / LATE of the channels is gone.
LATE = 16
#: How often the diagonal term is raised where rounding left a covariance short of positive definite.
ATTEMPTS = 6
#: Rows of the solution that are updated at once, so that they stay in the cache.
ROWS = 256


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

    The inverse is brought up to date late: removals add columns to a factor U, the present inverse being M - U U^T, and
    only every so often are they taken off M in one large product. Of M only the lower triangle is kept up to date.

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
        self._inverse = regular_inverse(covariance)  # M
        self._weights = np.array(w, dtype=np.float64)  # present solution, (n, m)
        self._channels = np.arange(n, dtype=np.int64)  # at each position
        self._labels = np.zeros(n, dtype=np.int64) if labels is None else labels
        self._there = np.ones(n, dtype=bool)
        self._diagonal = np.diagonal(self._inverse).copy()  # of the present inverse
        self._energies = np.square(self._weights).sum(axis=1)
        self._pending = np.empty((n, max(1, n // LATE)))  # U
        self._used = 0  # columns of U

    @property
    def alive(self) -> Indices:
        return self._channels[self._there]

    def costs(self) -> Array:
        """What removing each channel of `alive` alone costs, (k,)."""
        return np.asarray(self._energies[self._there] / self._diagonal[self._there])

    def run(self, kept: int, batch: int) -> None:
        """Remove the cheapest channels, up to `batch` at a time, until every group keeps `kept`."""
        while (spare := np.bincount(self._labels[self._there]) - kept).any():
            if self._used + batch > self._pending.shape[1]:
                self._settle()
                if batch > self._pending.shape[1]:
                    self._pending = np.empty((len(self._weights), batch))
            self._remove(self._cheapest(spare, batch))

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
        costs[open_] = self._energies[open_] / self._diagonal[open_]
        order = np.argsort(costs, kind="stable")
        pool, beyond = order[: POOL * batch], order[POOL * batch : POOL * batch + 1]
        pool = pool[open_[pool]]
        limit = costs[beyond].min(initial=np.inf)
        small, rows, left = self._corner(pool), self._weights[pool], spare.copy()
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

    def _corner(self, at: Indices) -> Array:
        """The present inverse at some positions (b,): (b, b)."""
        rows, columns = np.maximum(at[:, None], at), np.minimum(at[:, None], at)
        pending = self._pending[at, : self._used]
        return np.asarray(self._inverse[rows, columns] - pending @ pending.T)

    def _columns(self, at: Indices) -> Array:
        """Columns (k, b) of the present inverse at some positions (b,), ascending."""
        found = self._inverse[:, at]
        for column, position in enumerate(at):
            found[:position, column] = self._inverse[position, :position]
        found -= self._pending[:, : self._used] @ self._pending[at, : self._used].T
        return found

    def _remove(self, gone: Indices) -> None:
        """Take channels at some positions (b,) out: b steps of a Cholesky factorisation of the inverse."""
        columns = self._columns(gone)
        turn = np.linalg.inv(np.linalg.cholesky(columns[gone]))
        factor = columns @ turn.T  # (k, b)
        carry = turn @ self._weights[gone]  # (b, m)
        for rows in spans(len(self._weights), ROWS):
            part = self._weights[rows]
            part -= factor[rows] @ carry
            self._energies[rows] = np.einsum("ij,ij->i", part, part)
        self._diagonal -= np.einsum("ij,ij->i", factor, factor)
        self._pending[:, self._used : self._used + gone.size] = factor
        self._used += gone.size
        self._there[gone] = False

    def _settle(self) -> None:
        """Take what is pending off M, and close the gaps that removed channels left; in place, strip by strip."""
        stay = np.flatnonzero(self._there)
        factor = self._pending[stay, : self._used]
        for rows in strips(stay.size):
            present = self._inverse[stay[rows]].take(stay[: rows.stop], axis=1, mode="clip")
            present -= factor[rows] @ factor[: rows.stop].T
            self._inverse[rows, : rows.stop] = present
        n = stay.size
        self._inverse = self._inverse[:n, :n]
        self._weights, self._energies = self._weights[stay], self._energies[stay]
        self._channels, self._labels = self._channels[stay], self._labels[stay]
        self._there, self._diagonal = np.ones(n, dtype=bool), np.diagonal(self._inverse).copy()
        self._pending, self._used = self._pending[:n], 0


def regular_inverse(covariance: Array) -> Array:
    """Inverse of a covariance (n, n), with what makes it exist added to its diagonal.

    Rounding of sums over few tokens may lie beyond what `damping` says; ten times as much is added until the matrix is
    positive definite, for the inverse would else be of noise.

    Raises:
        LinAlgError: the covariance holds NaN or infinity.
    """
    least = damping(covariance, RELATIVE_JITTER)
    if not np.isfinite(least):
        raise np.linalg.LinAlgError("the covariance holds NaN or infinity")
    for more in range(ATTEMPTS):
        try:
            return inverse_of(covariance, least * 10**more)
        except np.linalg.LinAlgError:
            continue
    # Hardly any variance: what is left of sums that cancelled is noise of both signs.
    below = float(np.linalg.eigvalsh(covariance)[0])
    return inverse_of(covariance, least - 2 * min(below, 0.0))


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
