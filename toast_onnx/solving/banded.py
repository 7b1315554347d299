"""A covariance turned until it is banded, which is all that solutions at several ridge strengths need.

An eigendecomposition serves the same purpose, but half of its reduction to a tridiagonal matrix reads the whole matrix
once for every channel, at the speed of the memory. Here blocks of channels are eliminated together (Householder
reflections in the compact form of Schreiber and Van Loan 1989), in large matrix products. float64 throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toast_onnx.importance.blocked import mirror, spans

Array = NDArray[np.float64]

#: Channels that are eliminated together: the size of the band's blocks.
BLOCK = 64
#: Eliminated blocks whose reflections act on the targets as one.
GATHERED = 4
#: Targets that are looked at before it is asked whether more are needed.
STRIP = 256
#: Targets that are solved for at once.
SOLVED = 1024


class Banded:
    """S = Q B Q^T with B of blocks on the diagonal and beside it, and the covariance with the targets, turned by Q.

    R stands for (S + lambda I)^-1; solutions are refined once: (R + lambda R^2) C.

    Attributes:
        size: number of channels.
        mean: mean eigenvalue.
    """

    def __init__(self, s: Array, cross: Array, energy: Array, least: float) -> None:
        """Turn S (n, n).

        Args:
            s: covariance of the channels, possibly singular.
            cross: their covariance with the targets C (n, m).
            energy: variance of each target (m,).
            least: the smallest lambda.

        Raises:
            LinAlgError: S + least I is not positive definite.
        """
        self.size, self.mean = len(s), float(np.trace(s)) / len(s)
        self._turns: list[tuple[int, Array, Array]] = []  # where, V and T of I - V T V^T
        self._diagonal, self._below = self._reduce(np.array(s, np.float64))
        self._factor(least)
        self._cross, self._energy = cross, energy
        self._seen: dict[int, Array] = {}  # targets turned by Q, `STRIP` of them (n, c), by the first

    def _reduce(self, a: Array) -> tuple[list[Array], list[Array]]:
        """Blocks of B on the diagonal, and below it; `a` is used up.

        What `GATHERED` blocks of reflections do to `a` is taken off it at once, left @ right.T; until then, off the
        columns that are eliminated and off products with `a`.
        """
        n, diagonal, below = len(a), list[Array](), list[Array]()
        left, right = np.empty((2, n, 2 * GATHERED * BLOCK))
        waiting: list[Array] = []
        for start in range(0, n, BLOCK):
            own, rest, used = slice(start, start + BLOCK), slice(start + BLOCK, None), 2 * BLOCK * len(waiting)
            diagonal.append(a[own, own] - left[own, :used] @ right[own, :used].T)
            panel = a[rest, own] - left[rest, :used] @ right[own, :used].T
            if len(panel) <= BLOCK:
                below.extend([panel] if len(panel) else [])
                continue
            corner, v, t = _eliminated(panel)
            below.append(corner)
            moved = ((v.T @ a[rest, rest]).T - left[rest, :used] @ (right[rest, :used].T @ v)) @ t
            moved -= v @ (t.T @ (v.T @ moved) / 2)
            added = slice(used, used + 2 * BLOCK)
            np.concatenate([moved, v], axis=1, out=left[rest, added])
            np.concatenate([v, moved], axis=1, out=right[rest, added])
            waiting.append(v)
            if len(waiting) == GATHERED or len(panel) <= 2 * BLOCK:
                _take_off(a[rest, rest], left[rest, : added.stop], right[rest, : added.stop])
                self._gather(n, waiting)
                waiting = []
        return diagonal, below

    def _gather(self, n: int, reflections: list[Array]) -> None:
        """Keep blocks of reflections, the first of which is the tallest, as one."""
        height = len(reflections[0])
        gathered = np.hstack([np.pad(each, ((height - len(each), 0), (0, 0))) for each in reflections])
        self._turns.append((n - height, gathered, _together(gathered)))

    def _turned(self, x: Array) -> Array:
        """Q^T X for X (n, m)."""
        found = np.array(x, np.float64)
        for start, v, t in self._turns:
            found[start:] -= v @ (t.T @ (v.T @ found[start:]))
        return found

    def _factor(self, shift: float) -> tuple[list[Array], list[Array]]:
        """Inverses of the diagonal blocks of L, and its blocks below them, with B + shift I = L L^T."""
        inverses: list[Array] = []
        links: list[Array] = []
        for k, block in enumerate(self._diagonal):
            present = block + shift * np.eye(len(block))
            if k:
                links.append(self._below[k - 1] @ inverses[-1].T)
                present -= links[-1] @ links[-1].T
            inverses.append(np.asarray(np.linalg.inv(np.linalg.cholesky(present))))
        return inverses, links

    def _forward(self, factor: tuple[list[Array], list[Array]], x: Array) -> Array:
        """L^-1 X."""
        inverses, links = factor
        found = np.empty_like(x)
        for k, turn in enumerate(inverses):
            own = slice(k * BLOCK, (k + 1) * BLOCK)
            part = x[own] - links[k - 1] @ found[own.start - BLOCK : own.start] if k else x[own]
            found[own] = turn @ part
        return found

    def _backward(self, factor: tuple[list[Array], list[Array]], x: Array) -> Array:
        """L^-T X."""
        inverses, links = factor
        found = np.empty_like(x)
        for k in reversed(range(len(inverses))):
            own = slice(k * BLOCK, (k + 1) * BLOCK)
            part = x[own] - links[k].T @ found[own.stop : own.stop + BLOCK] if k < len(links) else x[own]
            found[own] = inverses[k].T @ part
        return found

    def used(self, shift: float) -> float:
        """Coefficients that the data determine: n - shift^2 tr R^2.

        With D what the elimination leaves of the diagonal's blocks, log det (B + shift I) is the sum of log det D, and
        tr R^2 is minus its second derivative.
        """
        inverses, _ = self._factor(shift)
        trace, known = 0.0, np.zeros((0, 0))
        first = second = known  # derivatives of D
        for k, turn in enumerate(inverses):
            step = self._below[k - 1] @ known if k else np.zeros((len(turn), 0))
            inner = second - 2 * first @ known @ first
            first, second, known = np.eye(len(turn)) + step @ first @ step.T, step @ inner @ step.T, turn.T @ turn
            relative = known @ first
            trace += float(np.sum(relative * relative.T) - np.sum(known * second))
        return sum(map(len, inverses)) - shift**2 * trace

    def left(self, shift: float, limit: float) -> float:
        """Variance of the targets that the solution leaves, summed; of only so many that it is above a limit.

        What it explains is tr C^T R (I + q + q^2 + q^3) C with q = shift R.
        """
        factor, left = self._factor(shift), 0.0
        for columns in spans(self._cross.shape[1], STRIP):
            if columns.start not in self._seen:
                self._seen[columns.start] = self._turned(self._cross[:, columns])
            part = self._seen[columns.start]
            left += float(self._energy[columns].sum())
            for power, solve in enumerate((self._forward, self._backward, self._forward, self._backward)):
                part = solve(factor, part)
                left -= shift**power * float(np.vdot(part, part))
            if left > limit:
                break
        return left

    def solve(self, target: Array, shift: float) -> Array:
        """The refined solution for targets (n, p)."""
        factor, solution = self._factor(shift), np.empty_like(target)
        for columns in spans(target.shape[1], SOLVED):
            once = self._backward(factor, self._forward(factor, self._turned(target[:, columns])))
            found = once + shift * self._backward(factor, self._forward(factor, once))
            for start, v, t in reversed(self._turns):
                found[start:] -= v @ (t @ (v.T @ found[start:]))
            solution[:, columns] = found
        return solution


def _eliminated(panel: Array) -> tuple[Array, Array, Array]:
    """Reflections I - V T V^T that leave nothing of a panel (n, b) below its upper triangle: that, V and T."""
    packed, scale = np.linalg.qr(panel, mode="raw")
    v = np.tril(packed.T, -1)
    np.fill_diagonal(v, 1.0)
    v[:, scale == 0] = 0.0  # nothing to eliminate
    return np.triu(packed.T[: panel.shape[1]]), v, _together(v)


def _take_off(a: Array, left: Array, right: Array) -> None:
    """A -= left @ right.T in place, which is symmetric as A (n, n) is."""
    for rows in spans(len(a), STRIP):
        own = a[rows, : rows.stop]
        own -= left[rows] @ right[: rows.stop].T
        mirror(own[:, : rows.start], a[: rows.start, rows])


def _together(v: Array) -> Array:
    """T (b, b) with I - V T V^T the product of the reflections along V's columns (n, b), of which some may be zero."""
    inner = v.T @ v
    lengths = np.diagonal(inner) / 2
    return np.asarray(np.linalg.inv(np.triu(inner, 1) + np.diag(np.where(lengths > 0, lengths, 1.0))))
