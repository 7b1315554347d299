"""Which heads of an attention stay, and what is left of its weights and statistics without the others.

The heads that stay first take over what they can of the others: W_O of them all is refitted to the whole output.
Fewer dimensions of these heads are then solved for like those of any attention, because the best reduced read-out of
the whole output is the best one of its projection on the kept contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from toast_onnx.importance.ffn import scaled_rows
from toast_onnx.importance.head_ranking import rank_heads
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.scores import Values, attention_score
from toast_onnx.importance.synthetic import AttentionStatistics
from toast_onnx.planning.ratios import BlockRatios
from toast_onnx.solving.linear_algebra import Compensation, Ridge
from toast_onnx.solving.vo import refit

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class KeptHeads:
    """What is left of an attention with fewer heads.

    Attributes:
        heads: (H',) heads that stay, ascending.
        wo: (H', d, C_out) output projection, refitted.
        bo: (C_out,) its bias.
        statistics: of these heads; None where none were given.
    """

    heads: Indices
    wo: np.ndarray
    bo: np.ndarray
    statistics: AttentionStatistics | None


def ranked_heads(
    wv: np.ndarray,
    wo: np.ndarray,
    gamma: np.ndarray | None,
    context: Moments | None,
    ratio: BlockRatios,
    compensation: str,
) -> Indices:
    """Heads (H,) of an attention under the block's own settings, the one that stays longest first.

    Args:
        wv: (C, H, d).
        wo: (H, d, C_out).
        gamma: layer scale (C_out,), None for none.
        context: moments of the concatenated contexts; needed but for scores from weights.
        ratio: selection and scores.
        compensation: with ridge the other heads are refitted.
    """
    rows = scaled_rows(wo, gamma)
    score = attention_score(ratio.score)
    if score.needs == "weights":
        scores = score.vo.ranks(Values(wv, rows, None, ratio.coupling)).sum(axis=1)  # (H,)
        return np.asarray(np.argsort(-scores, kind="stable"), np.int64)
    assert context is not None
    second = context.second if compensation == "none" else context.covariance
    return rank_heads(second, rows, refitted=compensation == "ridge")


def keep_heads(
    kept: Indices,
    wo: np.ndarray,
    bo: np.ndarray,
    statistics: AttentionStatistics | None,
    compensation: Compensation,
    ridge: Ridge,
) -> KeptHeads:
    """The output projection and the statistics of the heads that stay.

    Args:
        kept: (H',) heads, ascending.
        wo: (H, d, C_out).
        bo: (C_out,).
        statistics: of all heads; needed unless compensation is none.
        compensation: none, bias or ridge.
        ridge: strength as a fraction of the mean eigenvalue, or auto.
    """
    heads, d, _ = wo.shape
    flat = (d * kept[:, None] + np.arange(d)).reshape(-1)  # (H' * d,)
    context = None if statistics is None else statistics.context
    rows, shift = refit(wo.reshape(heads * d, -1).astype(np.float64), flat, context, compensation, ridge)
    new_wo = rows.reshape(kept.size, d, -1).astype(wo.dtype)
    new_bo = (bo.astype(np.float64) + shift).astype(bo.dtype)
    return KeptHeads(
        kept, new_wo, new_bo, None if statistics is None else _statistics_of(statistics, kept, flat, heads)
    )


def _statistics_of(found: AttentionStatistics, kept: Indices, flat: Indices, heads: int) -> AttentionStatistics:
    """Statistics of some heads; those of queries and keys that all heads share stay."""
    s_qq, s_kk = (s[kept] if s.ndim == 3 and len(s) == heads else s for s in (found.s_qq, found.s_kk))
    whole, square = found.context, np.ix_(flat, flat)
    context = Moments.known(whole.mean[flat], whole.covariance[square], whole.count, whole.tokens)
    return replace(found, s_qq=s_qq, s_kk=s_kk, context=context)
