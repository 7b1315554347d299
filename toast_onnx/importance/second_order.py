"""Second-order selection: which regressors a linear read-out can lose most cheaply once the others are refitted.

For y = x W with covariance S of x, dropping channel j and refitting the rest costs ||w_j||^2 / [S^-1]_jj (optimal
brain surgeon, Hassibi and Stork 1993), where w_j is the row of the current solution. The same removal updates W and
S^-1, so the next cost is again exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.blocked import inverse as inverse_of
from toast_onnx.importance.blocked import mirror, strips
from toast_onnx.importance.regular import RELATIVE_JITTER, damping
from toast_onnx.importance.selection import Indices

Array = NDArray[np.float64]

#: Candidates for each removal of a batch.
POOL = 4
#: The inverse is brought up to date when a share of 1 / LATE of the channels is gone.
LATE = 4
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

    Both are brought up to date late: removals add rows to factors U and V, the present inverse being M - U^T U and the
    present solution W - U^T V, and only every so often are they taken off M and W in large products.

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
        self._weights = np.array(w, dtype=np.float64)  # W, (n, m)
        self._channels = np.arange(n, dtype=np.int64)  # at each position
        self._labels = np.zeros(n, dtype=np.int64) if labels is None else labels
        self._there = np.ones(n, dtype=bool)
        self._diagonal = np.diagonal(self._inverse).copy()  # of the present inverse
        self._energies = np.einsum("ij,ij->i", self._weights, self._weights)  # of the present solution
        self._begin(max(1, n // LATE))

    def _begin(self, room: int) -> None:
        """Nothing is pending; there is room for so many removals."""
        self._pending = np.empty((room, len(self._weights)))  # U
        self._carried = np.empty((room, self._weights.shape[1]))  # V
        self._used = 0  # rows of both

    @property
    def alive(self) -> Indices:
        return self._channels[self._there]

    def costs(self) -> Array:
        """What removing each channel of `alive` alone costs, (k,)."""
        return np.asarray(self._energies[self._there] / self._diagonal[self._there])

    def run(self, kept: int, batch: int) -> None:
        """Remove the cheapest channels, up to `batch` at a time, until every group keeps `kept`."""
        while (spare := np.bincount(self._labels[self._there]) - kept).any():
            if self._used + batch > len(self._pending):
                self._settle(batch)
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
        small, rows, left = self._corner(pool), self._rows(pool), spare.copy()
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
        pending = self._pending[: self._used, at]
        return np.asarray(self._inverse[at[:, None], at] - pending.T @ pending)

    def _rows(self, at: Indices) -> Array:
        """The present solution at some positions (b,): (b, m)."""
        return np.asarray(self._weights[at] - self._pending[: self._used, at].T @ self._carried[: self._used])

    def _remove(self, gone: Indices) -> None:
        """Take channels at some positions (b,) out: b steps of a Cholesky factorisation of the inverse."""
        turn = np.linalg.inv(np.linalg.cholesky(self._corner(gone)))
        carry = turn @ self._rows(gone)  # (b, m)
        # Of the present inverse and of what the present solution shares with `carry`, what is pending is one product.
        pending, past = self._pending[: self._used], self._carried[: self._used]
        late = np.concatenate([turn @ pending[:, gone].T, carry @ past.T]) @ pending
        factor = turn @ self._inverse[gone] - late[: gone.size]  # (b, n)
        shared = carry @ self._weights.T - late[gone.size :]  # (b, n)
        shared -= carry @ carry.T @ factor / 2
        self._energies -= 2 * np.einsum("ij,ij->j", factor, shared)
        self._diagonal -= np.einsum("ij,ij->j", factor, factor)
        added = slice(self._used, self._used + gone.size)
        self._pending[added], self._carried[added], self._used = factor, carry, added.stop
        self._there[gone] = False

    def _settle(self, batch: int) -> None:
        """Take what is pending off M and W, and close the gaps that removed channels left; in place, strip by strip.

        There is room for a batch then, at least.
        """
        stay = np.flatnonzero(self._there)
        factor = self._pending[: self._used, stay]
        for rows in strips(stay.size):
            present = self._inverse[stay[rows]].take(stay[: rows.stop], axis=1, mode="clip")
            present -= factor[:, rows].T @ factor[:, : rows.stop]
            self._inverse[rows, : rows.stop] = present
            mirror(present[:, : rows.start], self._inverse[: rows.start, rows])
        n = stay.size
        self._inverse = self._inverse[:n, :n]
        self._weights = self._weights[stay] - factor.T @ self._carried[: self._used]
        self._energies = np.einsum("ij,ij->i", self._weights, self._weights)
        self._channels, self._labels = self._channels[stay], self._labels[stay]
        self._there, self._diagonal = np.ones(n, dtype=bool), np.diagonal(self._inverse).copy()
        self._begin(max(batch, len(self._pending)))


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
