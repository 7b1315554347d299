"""Turns scores into kept indices; deterministic, so that the same scores give the same graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]


def top_k(scores: ArrayLike, kept: int, pairs: ArrayLike | None = None) -> Indices:
    """Indices of the `kept` highest scores along the last axis; ties go to the lower index.

    Args:
        scores: (..., n).
        kept: how many stay, 1..n.
        pairs: (n / 2, 2) indices that stay or go together (rotary embedding turns two dimensions into each
            other); a pair's score is the sum of both.

    Returns:
        (..., kept), ascending.

    Raises:
        ValueError: `kept` is outside 1..n, or odd where `pairs` are given.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not 1 <= kept <= values.shape[-1]:
        raise ValueError(f"cannot keep {kept} of {values.shape[-1]} channels")
    if pairs is None:
        order = np.argsort(-values, axis=-1, kind="stable")
        return np.sort(order[..., :kept], axis=-1).astype(np.int64)
    if kept % 2:
        raise ValueError(f"paired channels stay in twos, cannot keep {kept}")
    members = np.asarray(pairs, dtype=np.int64)  # (n / 2, 2)
    chosen = top_k(values[..., members].sum(axis=-1), kept // 2)  # (..., kept / 2)
    return np.sort(members[chosen].reshape(*values.shape[:-1], kept), axis=-1)


def top_k_shared(scores: ArrayLike, kept: int, pairs: ArrayLike | None = None) -> Indices:
    """The same indices for every head: those whose scores summed over the heads are highest.

    Args:
        scores: (heads, n).
        kept: how many stay, 1..n.
        pairs: as for `top_k`.

    Returns:
        (heads, kept), every row the same.

    Raises:
        ValueError: as for `top_k`.
    """
    values = np.asarray(scores, dtype=np.float64)
    chosen = top_k(values.sum(axis=0), kept, pairs)
    return np.tile(chosen, (values.shape[0], 1))


def dropped(kept: ArrayLike, n: int) -> Indices:
    """The indices of 0..n-1 that are not in `kept` (k,), ascending."""
    return np.setdiff1d(np.arange(n, dtype=np.int64), np.asarray(kept, dtype=np.int64))
