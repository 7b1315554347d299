"""Inverse covariance and solution of the channels that stay while others leave, brought up to date late.

Removals add rows to factors U and V, the present inverse being M - U^T U and the present solution W - U^T V, and only
every so often are they taken off M and W in large products. float64 throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toast_onnx.importance.blocked import mirror, strips

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

#: The inverse is brought up to date when a share of 1 / LATE of the channels is gone.
LATE = 4


class Remaining:
    """M and W of some channels, of which more and more are gone.

    Attributes:
        diagonal: of the present inverse, (n,).
        energies: squared length of each row of the present solution, (n,).
    """

    def __init__(self, inverse: Array, weights: Array) -> None:
        """Start with all channels.

        Args:
            inverse: inverse covariance (n, n); it is worked on in place.
            weights: solution (n, m).
        """
        self._inverse, self._weights = inverse, np.array(weights, np.float64)  # M and W
        self._look()
        self._begin(max(1, len(inverse) // LATE))

    def _look(self) -> None:
        """Take diagonal and energies from M and W, of which nothing is pending."""
        self.diagonal: Array = np.diagonal(self._inverse).copy()
        self.energies: Array = np.einsum("ij,ij->i", self._weights, self._weights)

    def _begin(self, room: int) -> None:
        """Nothing is pending; there is room for so many removals."""
        self._pending = np.empty((room, len(self._weights)))  # U
        self._carried = np.empty((room, self._weights.shape[1]))  # V
        self._used = 0  # rows of both

    def room(self) -> int:
        """How many more channels may be removed before `settle`."""
        return len(self._pending) - self._used

    def corner(self, at: Indices) -> Array:
        """The present inverse at some positions (b,): (b, b)."""
        pending = self._pending[: self._used, at]
        return np.asarray(self._inverse[at[:, None], at] - pending.T @ pending)

    def rows(self, at: Indices) -> Array:
        """The present solution at some positions (b,): (b, m)."""
        return np.asarray(self._weights[at] - self._pending[: self._used, at].T @ self._carried[: self._used])

    def remove(self, gone: Indices) -> None:
        """Take channels at some positions (b,) out: b steps of a Cholesky factorisation of the inverse."""
        turn = np.linalg.inv(np.linalg.cholesky(self.corner(gone)))
        carry = turn @ self.rows(gone)  # (b, m)
        # Of the present inverse and of what the present solution shares with `carry`, what is pending is one product.
        pending, past = self._pending[: self._used], self._carried[: self._used]
        late = np.concatenate([turn @ pending[:, gone].T, carry @ past.T]) @ pending
        factor = turn @ self._inverse[gone] - late[: gone.size]  # (b, n)
        shared = carry @ self._weights.T - late[gone.size :]  # (b, n)
        shared -= carry @ carry.T @ factor / 2
        self.energies -= 2 * np.einsum("ij,ij->j", factor, shared)
        self.diagonal -= np.einsum("ij,ij->j", factor, factor)
        added = slice(self._used, self._used + gone.size)
        self._pending[added], self._carried[added], self._used = factor, carry, added.stop

    def settle(self, stay: Indices, batch: int) -> None:
        """Take what is pending off M and W, and keep some positions alone (k,); in place, strip by strip.

        There is room for a batch then, at least.
        """
        factor = self._pending[: self._used, stay]
        for rows in strips(stay.size):
            present = self._inverse[stay[rows]].take(stay[: rows.stop], axis=1, mode="clip")
            present -= factor[:, rows].T @ factor[:, : rows.stop]
            self._inverse[rows, : rows.stop] = present
            mirror(present[:, : rows.start], self._inverse[: rows.start, rows])
        self._inverse = self._inverse[: stay.size, : stay.size]
        self._weights = self._weights[stay] - factor.T @ self._carried[: self._used]
        self._look()
        self._begin(max(batch, len(self._pending)))
