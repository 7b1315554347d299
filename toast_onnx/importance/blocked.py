"""Inverse, Cholesky factor and solutions of symmetric positive definite systems, by halves.

NumPy's own inverse knows nothing of symmetry, and its solutions factor anew every time. Here a matrix is halved until
its blocks are small, so that nearly all work lies in large matrix products, which run at the speed of the machine.
float64, but where a caller asks a `Cholesky` for less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Matrices up to this size are left to LAPACK.
LEAF = 64
#: Rows and columns that are transposed at once.
TILE = 64
#: Columns of a triangular factor that are multiplied at once, without the zeros above them.
STRIP = 512
#: Row blocks of a product of which one half is the other's mirror image.
STRIPS = 16


def spans(n: int, block: int) -> Iterator[slice]:
    """0..n in pieces of `block`."""
    return (slice(start, min(start + block, n)) for start in range(0, n, block))


def strips(n: int) -> Iterator[slice]:
    """0..n in at most `STRIPS` pieces, none of them too small for a matrix product to be fast."""
    return spans(n, max(LEAF, -(-n // STRIPS)))


def inverse(s: Array, shift: float = 0.0) -> Array:
    """Inverse of a symmetric positive definite matrix S + shift I (n, n) by Schur complements: n^3 flops.

    Raises:
        LinAlgError: it is not positive definite.
    """
    a = np.array(s, np.float64)
    a.flat[:: len(a) + 1] += shift
    _invert(a)
    return a


def _invert(a: Array) -> None:
    n = len(a)
    if n <= LEAF:
        lower = np.linalg.inv(np.linalg.cholesky(a))
        a[:] = lower.T @ lower
        return
    half = n // 2
    first, cross, last = a[:half, :half], a[:half, half:], a[half:, half:]
    _invert(first)
    carry = first @ cross
    _symmetric(np.subtract, last, cross.T, carry)
    _invert(last)
    back = carry @ last
    _symmetric(np.add, first, back, carry.T)
    np.negative(back, out=cross)
    mirror(cross, a[half:, :half])


def _symmetric(operation: np.ufunc, a: Array, x: Array, y: Array) -> None:
    """A becomes A + X Y, or A - X Y, in place, where X Y (n, n) is known to be symmetric."""
    for rows in strips(len(a)):
        own = a[rows, : rows.stop]
        operation(own, x[rows] @ y[:, : rows.stop], out=own)
        mirror(own[:, : rows.start], a[: rows.start, rows])


def mirror(source: Array, target: Array) -> None:
    """Write the transpose of (m, n) into (n, m), by tiles that stay in the cache."""
    for rows in spans(len(source), TILE):
        for columns in spans(source.shape[1], TILE):
            target[columns, rows] = source[rows, columns].T


class Cholesky:
    """L with L L^T = S + shift I, and what it solves.

    Attributes:
        factor: L (n, n), zero above the diagonal.
    """

    def __init__(self, s: NDArray[Any], shift: float = 0.0, dtype: type[np.floating[Any]] = np.float64) -> None:
        """Factor S (n, n).

        Args:
            s: the matrix.
            shift: what is added to its diagonal.
            dtype: in which precision.

        Raises:
            LinAlgError: S + shift I is not positive definite.
        """
        self.factor: NDArray[Any] = np.array(s, dtype)
        self.factor.flat[:: len(s) + 1] += shift
        self._leaves: dict[int, NDArray[Any]] = {}  # inverses of the diagonal blocks of L, by their start
        self._factor(slice(0, len(s)))

    def _factor(self, own: slice) -> None:
        a, n = self.factor, own.stop - own.start
        if n <= LEAF:
            a[own, own] = np.linalg.cholesky(a[own, own])
            self._leaves[own.start] = np.linalg.inv(a[own, own])
            return
        first, last = _halves(own)
        self._factor(first)
        self._divide(a[last, first], first)
        panel = a[last, first]
        for rows in strips(len(panel)):
            below = slice(last.start + rows.start, last.start + rows.stop)
            a[below, last.start : below.stop] -= panel[rows] @ panel[: rows.stop].T
        self._factor(last)
        a[first, last] = 0.0

    def _divide(self, b: NDArray[Any], own: slice) -> None:
        """B L^-T in place, for B (m, k) and the k rows and columns of L that `own` names."""
        if own.stop - own.start <= LEAF:
            b[:] = b @ self._leaves[own.start].T
            return
        first, last = _halves(own)
        half = first.stop - first.start
        self._divide(b[:, :half], first)
        b[:, half:] -= b[:, :half] @ self.factor[last, first].T
        self._divide(b[:, half:], last)

    def _multiply_back(self, b: NDArray[Any], own: slice) -> None:
        """B L^-1 in place; as `_divide`."""
        if own.stop - own.start <= LEAF:
            b[:] = b @ self._leaves[own.start]
            return
        first, last = _halves(own)
        half = first.stop - first.start
        self._multiply_back(b[:, half:], last)
        b[:, :half] -= b[:, half:] @ self.factor[last, first]
        self._multiply_back(b[:, :half], first)

    def solve(self, b: Array) -> Array:
        """S^-1 B for B (n, m)."""
        x = np.array(b.T, np.float64, order="C")  # (m, n)
        own = slice(0, len(self.factor))
        self._divide(x, own)
        self._multiply_back(x, own)
        return x.T

    def energies(self, rows: Array) -> Array:
        """Squared lengths (n,) of the rows of L^T W, for W (n, m)."""
        pieces = spans(len(self.factor), STRIP)
        return np.concatenate(
            [np.square(self.factor[at.start :, at].T @ rows[at.start :]).sum(axis=1) for at in pieces]
        )


def _halves(own: slice) -> tuple[slice, slice]:
    middle = (own.start + own.stop) // 2
    return slice(own.start, middle), slice(middle, own.stop)
