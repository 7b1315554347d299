"""Which whole heads a read-out of concatenated contexts can lose most cheaply.

For y = o W with covariance S of the contexts o, dropping all rows of a head h and refitting the others costs
tr(W_h^T ([S^-1]_hh)^-1 W_h): optimal brain surgeon (Hassibi and Stork 1993) for a group of rows. Heads go one after
another, W and S^-1 updated exactly in between, so that the costs add up to the error of the last refit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.second_order import regular_inverse, without
from toast_onnx.importance.selection import Indices

Array = NDArray[np.float64]


def rank_heads(second: ArrayLike, wo: ArrayLike, *, refitted: bool) -> Indices:
    """Heads (H,) by elimination, each time of the one that costs least now; the one that stays longest first.

    Args:
        second: (H * d, H * d) covariance of the concatenated contexts, head-major; their uncentred second moment where
            nothing restores the mean.
        wo: (H, d, C_out) output projection; fold layer scale in.
        refitted: whether the other heads' rows make up for what goes; else they stay as they are.
    """
    w, s = np.asarray(wo, np.float64), np.asarray(second, np.float64)
    return _refitted(s, w) if refitted else _plain(s, w)


def _refitted(s: Array, w: Array) -> Indices:
    heads, d, _ = w.shape
    inverse, rows = regular_inverse(s), w.reshape(heads * d, -1)
    alive = list(range(heads))
    gone: list[int] = []
    while alive:
        groups = [np.arange(k * d, (k + 1) * d) for k in range(len(alive))]
        k = int(np.argmin([removal_cost(inverse, rows, group) for group in groups]))
        inverse, rows, _ = without(inverse, rows, groups[k])
        gone.append(alive.pop(k))
    return np.array(gone[::-1], np.int64)


def removal_cost(inverse: Array, rows: Array, group: Indices) -> float:
    """tr(W_g^T ([S^-1]_gg)^-1 W_g): the squared error that dropping a group (g,) of rows leaves after a refit.

    Args:
        inverse: (n, n) inverse covariance.
        rows: (n, m) present solution.
        group: positions of the rows.
    """
    own = rows[group]
    return float((own * np.linalg.solve(inverse[np.ix_(group, group)], own)).sum())


def _plain(s: Array, w: Array) -> Indices:
    """Without refitting, a head costs its own energy and what it has in common with those that are gone."""
    heads, d, _ = w.shape
    rows = w.reshape(heads * d, -1)
    pairs = (s * (rows @ rows.T)).reshape(heads, d, heads, d).sum(axis=(1, 3))  # (H, H)
    alive = list(range(heads))
    gone: list[int] = []
    while alive:
        costs = [pairs[h, h] + 2 * pairs[h, gone].sum() for h in alive]
        gone.append(alive.pop(int(np.argmin(costs))))
    return np.array(gone[::-1], np.int64)
