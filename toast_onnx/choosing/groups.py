"""Heads of queries that share keys or values: statistics pooled, and weights stacked so that solvers see one head.

The scores' error of a group is || S_qq^(1/2) (I - M) S_kk^(1/2) ||_F^2 summed over its queries, so that with S_qq the
mean over them one choice for all is the best one; the queries' weights lie one behind the other along the inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.importance.moments import Moments
from toast_onnx.importance.scores import AttentionScore, Values, attention_score
from toast_onnx.importance.selection import top_k
from toast_onnx.importance.synthetic import AttentionStatistics
from toast_onnx.solving.weights import HeadWeights

Array = NDArray[Any]


def members(groups: Array) -> Array:
    """(H,) head of the keys of each head of the queries -> (G, H / G) heads of the queries of each of the keys."""
    return np.argsort(groups, kind="stable").reshape(int(groups.max()) + 1, -1)


def pooled(found: AttentionStatistics, groups: Array) -> AttentionStatistics:
    """Statistics of queries and keys (G, d, d), averaged over each group."""
    s_qq, s_kk = (s[members(groups)].mean(axis=1) for s in (found.s_qq, found.s_kk))
    return replace(found, s_qq=s_qq, s_kk=s_kk, tokens=found.tokens * groups.size / (groups.max() + 1))


def stacked(w: Array, groups: Array) -> Array:
    """(C, H, d) -> (n * C, G, d): the n queries of a group one behind the other."""
    found = np.moveaxis(w[:, members(groups)], 2, 0)  # (n, C, G, d)
    return found.reshape(-1, *found.shape[2:])


def apart(w: Array, groups: Array) -> Array:
    """The inverse of `stacked`: (n * C, G, r) -> (C, H, r)."""
    order = members(groups)
    whole = w.reshape(order.shape[1], -1, *w.shape[1:])  # (n, C, G, r)
    found = np.empty((whole.shape[1], groups.size, w.shape[2]), w.dtype)
    found[:, order] = np.moveaxis(whole, 0, 2)
    return found


def for_each_query(part: HeadWeights, groups: Array | None) -> HeadWeights:
    """Weights of keys or values, repeated for every head that shares them."""
    if groups is None:
        return part
    return replace(part, weight=part.weight[:, groups], bias=part.bias[groups], slots=part.slots[groups])


def read_together(wo: Array, groups: Array) -> Array:
    """(H, d, C_out) -> (G, d, n * C_out): what reads the values of a group, side by side."""
    found = np.moveaxis(wo[members(groups)], 1, 2)  # (G, d, n, C_out)
    return found.reshape(*found.shape[:2], -1)


def value_ranks(
    score: AttentionScore, wv: Array, wo: Array, context: Moments | None, coupling: str, groups: Array
) -> Array:
    """Scores (G, d) of the dimensions of values that a group shares.

    Scores that read moments are those of `energy`, added up: what an elimination says of one head has no meaning in
    another.

    Args:
        score: the score that was asked for.
        wv: (C, G, d).
        wo: (H, d, C_out), layer scale folded in.
        context: moments of the concatenated contexts of all H heads; None where weights are read alone.
        coupling: which weights count.
        groups: (H,).
    """
    if score.needs == "weights":
        return score.vo.ranks(Values(wv, read_together(wo, groups), None, coupling))
    ranks = attention_score("energy").vo.ranks(Values(wv, wo, context, coupling))  # (H, d)
    return np.asarray(ranks[members(groups)].sum(axis=1))


def kept_values(
    score: AttentionScore, wv: Array, wo: Array, context: Moments | None, coupling: str, groups: Array, kept: int
) -> Array:
    """Dimensions (G, kept) of values that stay, ascending; arguments as for `value_ranks`."""
    return top_k(value_ranks(score, wv, wo, context, coupling, groups), kept)
