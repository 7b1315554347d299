"""Loss curves of a block's parts: what selection and compensation would leave of each, at every kept count.

The curves are those of each part alone on the dense model's statistics, up to a factor: they say how a part's damage
grows with what is removed, and one measurement at the output says where it starts (`toast_onnx.planning.prediction`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.choosing.blocks import Widths
from toast_onnx.choosing.fc2_rows import fc2_rows
from toast_onnx.choosing.groups import members, pooled, read_together, stacked, value_ranks
from toast_onnx.choosing.kept_heads import ranked_heads
from toast_onnx.importance.blocked import spans
from toast_onnx.importance.ffn import scaled_rows
from toast_onnx.importance.loss_curves import by_head, readout_losses, tail_energies
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.regular import root
from toast_onnx.importance.scores import Channels, QueriesKeys, Values, attention_score, ffn_score
from toast_onnx.importance.statistics import Statistics
from toast_onnx.importance.synthetic import AttentionStatistics
from toast_onnx.matching.blocks import Attention, Block, Ffn
from toast_onnx.matching.linear import weights
from toast_onnx.matching.norms import layer_scale
from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import BlockRatios
from toast_onnx.planning.width_costs import Part
from toast_onnx.rewriting.attention import head_weights
from toast_onnx.solving.compensations import compensation as compensation_named
from toast_onnx.solving.qk import unit_trace
from toast_onnx.solving.weights import BlockWeights

#: Rows of a symmetric product that are formed at once.
ROWS = 256

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def loss_curves(
    study: Study,
    block: Block,
    parts: Sequence[Part],
    settings: BlockRatios,
    compensation: str,
    statistics: Statistics,
) -> Mapping[Part, Array]:
    """For each part (n + 1,) losses, entry k with k heads, dimensions (of every head) or channels kept.

    Args:
        study: the model.
        block: one of its blocks.
        parts: what to look at; the block has these parts.
        settings: selection and scores; its ratios do not count.
        compensation: none, bias, ridge or local (which starts from ridge).
        statistics: of the dense model.
    """
    found: dict[Part, Array] = {}
    kind = compensation_named(compensation).solved
    if block.attention is not None:
        if "heads" in parts:
            found["heads"] = _heads(study, block.attention, settings, kind, statistics.attention(block.index).context)
        if "qk" in parts:
            found["qk"] = _qk(study, block.attention, settings, kind, statistics.attention(block.index))
        if "vo" in parts:
            found["vo"] = _vo(study, block.attention, settings, kind, statistics.attention(block.index).context)
    if block.ffn is not None:
        if "fc1" in parts:
            found["fc1"] = _fc1(study, block, block.ffn, settings, kind, statistics)
        if "fc2" in parts:
            found["fc2"] = _fc2(study, block, block.ffn, settings, kind, statistics)
    return found


def predicted_errors(
    study: Study,
    block: Block,
    widths: Widths,
    settings: BlockRatios,
    compensation: str,
    statistics: Statistics,
    new: BlockWeights,
) -> dict[str, float]:
    """The error that each smaller part is predicted to make, relative to its output: 1 where nothing is left of it.

    The output is the branch's for vo, heads and fc2, the scores for qk, and fc1's own for fc1. Parts chosen by
    their weights alone have no prediction.

    Args:
        study: the model.
        block: one of its blocks.
        widths: what is kept of each part.
        settings: selection and scores.
        compensation: none, bias, ridge or local (which starts from ridge).
        statistics: those that the new weights follow from.
        new: the new weights.
    """
    compensated = compensation_named(compensation).needs_moments
    parts: list[Part] = []
    if attention_score(settings.score).needs == "moments" or compensated:
        counts = {"heads": widths.heads, "qk": widths.qk, "vo": widths.vo}
        parts = [part for part, kept in counts.items() if kept is not None]  # type: ignore[misc]
    found: dict[str, float] = {}
    for part, curve in loss_curves(study, block, parts, settings, compensation, statistics).items():
        found[part] = _share(curve[getattr(widths, part)], curve[0])
    if block.ffn is not None and new.ffn is not None and (ffn_score(settings.ffn_score).reads_moments or compensated):
        kind = compensation_named(compensation).solved
        if new.ffn.units is not None and new.ffn.fc2 is not None:
            w = weights(study.view, study.facts, block.ffn.fc2)
            spread = _spread(statistics.hidden(block.index), kind)
            found["fc2"] = _readout_error(spread, w, new.ffn.units, new.ffn.fc2[0])
        if new.ffn.inputs is not None and new.ffn.entries is not None:
            w = np.concatenate([weights(study.view, study.facts, e) for e in block.ffn.entries], axis=1)
            spread = _spread(statistics.inputs(block.index), kind)
            found["fc1"] = _readout_error(spread, w, new.ffn.inputs, np.concatenate([e[0] for e in new.ffn.entries], 1))
    return found


def _readout_error(spread: Array, w: NDArray[Any], kept: Indices, new: NDArray[Any]) -> float:
    """Relative error of x W (n, m) by new rows (kept, m) for some channels, with second moments (n, n) of x."""
    lost = np.array(w, np.float64)
    lost[kept] -= np.asarray(new, np.float64)
    return _share(_energy(spread, lost), _energy(spread, np.asarray(w, np.float32)))


def _energy(spread: Array, w: NDArray[Any]) -> float:
    """Energy of x W over all outputs; half of W W^T is formed, which is symmetric as `spread` is.

    W W^T has the precision of W. float32 is enough for weights as they are, where little cancels; not for what a fit
    leaves.
    """
    found = 0.0
    for rows in spans(len(w), ROWS):
        pairs = w[rows] @ w[: rows.stop].T
        pairs[:, rows] *= 0.5
        found += 2 * float(np.einsum("ij,ij->", spread[rows, : rows.stop], pairs))
    return found


def _share(lost: float, whole: float) -> float:
    """Square root of the energy that is lost over all of it."""
    return float(np.sqrt(max(lost, 0.0) / whole)) if whole > 0 else 0.0


def _qk(study: Study, a: Attention, settings: BlockRatios, kind: str, measured: AttentionStatistics) -> Array:
    groups = a.qk_groups
    if groups is not None:
        measured = pooled(measured, groups)
    s_qq, s_kk = measured.s_qq, measured.s_kk
    subspace = settings.select == "subspace" and not a.regions
    if subspace and a.cosine:
        values = np.linalg.eigvalsh(unit_trace(s_qq) + unit_trace(s_kk))[:, ::-1]
        return tail_energies(np.sqrt(np.clip(values, 0, None)))
    root_k = root(s_kk)
    if subspace:
        return tail_energies(np.linalg.svd(root(s_qq) @ root_k, compute_uv=False))
    assert a.q is not None
    assert a.k is not None
    fold = "ridge" if a.folds and kind == "ridge" else "none"
    q, k = (head_weights(study.view, study.facts, b).weight for b in (a.q, a.k))
    q = q if groups is None else stacked(q, groups)
    score, subject = attention_score(settings.score), QueriesKeys(q, k, s_qq, s_kk, settings.coupling)
    scores = _shared(score.shared(subject), a.pairs) if a.regions else score.qk.ranks(subject)
    orders = [_ranked(s) for s in scores]
    heads = [readout_losses(s, r, o, fold) for s, r, o in zip(s_qq, root_k, orders, strict=True)]
    return np.asarray(np.sum(heads, axis=0))


def _heads(study: Study, a: Attention, settings: BlockRatios, kind: str, context: Moments) -> Array:
    wv, wo = _values_and_read_out(study, a)
    heads, d, _ = wo.shape
    ranked = ranked_heads(wv, wo, None, context, settings, kind)
    order = (d * ranked[:, None] + np.arange(d)).reshape(-1)
    return readout_losses(_spread(context, kind), wo.reshape(heads * d, -1), order, kind)[::d]


def _vo(study: Study, a: Attention, settings: BlockRatios, kind: str, context: Moments) -> Array:
    wv, wo = _values_and_read_out(study, a)
    heads, d, _ = wo.shape
    s, groups = context.covariance, a.vo_groups
    if settings.select == "subspace" and a.side is None:
        own = np.stack([s[h * d : (h + 1) * d, h * d : (h + 1) * d] for h in range(heads)])
        if groups is not None:
            own, wo = own[members(groups)].mean(axis=1), read_together(wo, groups)
        values = np.linalg.svd(root(own) @ wo, compute_uv=False)  # (H or G, min(d, C_out))
        return tail_energies(np.pad(values, ((0, 0), (0, d - values.shape[1]))))
    score = attention_score(settings.score)
    if groups is None:
        scores = score.vo.ranks(Values(wv, wo, context, settings.coupling))
    else:
        scores = value_ranks(score, wv, wo, context, settings.coupling, groups)[groups]
    losses = readout_losses(_spread(context, kind), wo.reshape(heads * d, -1), by_head(scores), kind)
    return losses[::heads]


def _values_and_read_out(study: Study, a: Attention) -> tuple[Array, Array]:
    """V's weights (C, H, d) and the output projection's (H, d, C_out), layer scale folded into these."""
    assert a.v is not None
    assert a.proj is not None
    view, facts, linear = study.view, study.facts, a.proj.linear
    gamma = layer_scale(view, facts, linear.output, linear.out_features)
    wo = scaled_rows(weights(view, facts, linear)[a.proj.layout.channels], gamma)
    return head_weights(view, facts, a.v).weight, wo


def _fc2(study: Study, block: Block, f: Ffn, settings: BlockRatios, kind: str, statistics: Statistics) -> Array:
    view, facts = study.view, study.facts
    moments = statistics.hidden(block.index)
    rows = fc2_rows(study, block.index, f, settings.ffn_score, statistics)
    writers = tuple(
        weights(view, facts, e)[:, u[:, p]]
        for e, u in zip(f.entries, f.units, strict=not f.selects_at_exit)
        for p in range(u.shape[1])
    )
    return _channels(block, writers, rows, moments, settings, kind, statistics, "fc2")


def _fc1(study: Study, block: Block, f: Ffn, settings: BlockRatios, kind: str, statistics: Statistics) -> Array:
    moments = statistics.inputs(block.index)
    rows = np.concatenate([weights(study.view, study.facts, e) for e in f.entries], axis=1).astype(np.float64)
    return _channels(block, (), rows, moments, settings, kind, statistics, "fc1")


def _channels(
    block: Block,
    writers: tuple[Array, ...],
    rows: Array,
    moments: Moments,
    settings: BlockRatios,
    kind: str,
    statistics: Statistics,
    part: str,
) -> Array:
    """Losses of a feed-forward network's channels in the order of their score; arguments as for `Channels`."""

    def tokens() -> Array:
        return np.asarray(statistics.activation_scores(block.index, part))

    ranks = ffn_score(settings.ffn_score).ranking.ranks(Channels(writers, rows, moments, tokens))
    return readout_losses(_spread(moments, kind), rows, _ranked(ranks), kind)


def _spread(moments: Moments, kind: str) -> Array:
    """(n, n) second moments of what is lost: around the mean where compensation restores it."""
    return moments.covariance if compensation_named(kind).restores_mean else moments.second


def _shared(scores: Array, pairs: NDArray[Any] | None) -> Array:
    """Scores (H, d) where all heads keep the same dimensions, pairs (d / 2, 2) of them together."""
    total = scores.sum(axis=0)
    if pairs is not None:
        total[pairs] = total[pairs].sum(axis=1, keepdims=True)
    return np.tile(total, (len(scores), 1))


def _ranked(scores: Array) -> Indices:
    """Channels from the highest score to the lowest, ties to the lower number."""
    return np.asarray(np.argsort(-scores, kind="stable"), np.int64)
