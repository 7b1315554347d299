"""Which whole heads a read-out of concatenated contexts can lose most cheaply.

For y = o W with covariance S of the contexts o, dropping all rows of a head h and refitting the others costs
tr(W_h^T ([S^-1]_hh)^-1 W_h): optimal brain surgeon (Hassibi and Stork 1993) for a group of rows. Heads go one after
another, W and S^-1 updated exactly in between, so that the costs add up to the error of the last refit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.second_order import regular_inverse, without
from toast_onnx.importance.selection import Indices

Array = NDArray[np.float64]


@dataclass(frozen=True)
class HeadOrder:
    """All heads of an attention in the order in which they go.

    Attributes:
        order: (H,) heads, the one that goes first in front.
        costs: (H,) what each removal adds to the squared error of the output.
    """

    order: Indices
    costs: Array

    def kept(self, count: int) -> Indices:
        """The `count` heads that stay, ascending."""
        return np.sort(self.order[self.order.size - count :])

    @property
    def losses(self) -> Array:
        """(H + 1,) squared error of the output with k = 0 .. H heads kept."""
        return np.append(np.cumsum(self.costs)[::-1], 0.0)


def order_heads(second: ArrayLike, wo: ArrayLike, *, refitted: bool) -> HeadOrder:
    """The order in which heads go, each time the one that costs least now.

    Args:
        second: (H * d, H * d) covariance of the concatenated contexts, head-major; their uncentred second moment where
            nothing restores the mean.
        wo: (H, d, C_out) output projection; fold layer scale in.
        refitted: whether the other heads' rows make up for what goes; else they stay as they are.
    """
    w = np.asarray(wo, np.float64)
    s = np.asarray(second, np.float64)
    return _refitted(s, w) if refitted else _plain(s, w)


def order_by_score(scores: ArrayLike) -> HeadOrder:
    """The order of heads (H,) from the lowest score to the highest; of equal ones the later goes first."""
    values = np.asarray(scores, np.float64)
    order = np.argsort(-values, kind="stable")[::-1].astype(np.int64)
    return HeadOrder(order, values[order])


def _refitted(s: Array, w: Array) -> HeadOrder:
    heads, d, _ = w.shape
    inverse, rows = regular_inverse(s), w.reshape(heads * d, -1)
    alive = list(range(heads))
    order, costs = [], []
    while alive:
        now = [_group_cost(inverse, rows, np.arange(k * d, (k + 1) * d)) for k in range(len(alive))]
        k = int(np.argmin(now))
        costs.append(now[k])
        inverse, rows, _ = without(inverse, rows, np.arange(k * d, (k + 1) * d))
        order.append(alive.pop(k))
    return HeadOrder(np.array(order, np.int64), np.maximum(costs, 0.0))


def _group_cost(inverse: Array, rows: Array, group: Indices) -> float:
    own = rows[group]
    return float((own * np.linalg.solve(inverse[np.ix_(group, group)], own)).sum())


def _plain(s: Array, w: Array) -> HeadOrder:
    """Costs without refitting: the energy of what has gone, that with earlier heads included."""
    heads, d, _ = w.shape
    rows = w.reshape(heads * d, -1)
    pairs = (s * (rows @ rows.T)).reshape(heads, d, heads, d).sum(axis=(1, 3))  # (H, H)
    alive = list(range(heads))
    order: list[int] = []
    costs = []
    while alive:
        now = [pairs[h, h] + 2 * pairs[h, order].sum() for h in alive]
        k = int(np.argmin(now))
        costs.append(now[k])
        order.append(alive.pop(k))
    return HeadOrder(np.array(order, np.int64), np.asarray(costs, np.float64))
