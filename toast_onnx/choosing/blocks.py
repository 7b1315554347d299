"""New weights for a block: widths from its ratios, what stays by its scores, values by the solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from toast_onnx.choosing.fc2_rows import fc2_rows
from toast_onnx.choosing.groups import apart, kept_values, members, pooled, stacked
from toast_onnx.choosing.head_norms import centred, energy_kept
from toast_onnx.choosing.kept_heads import KeptHeads, keep_heads, ranked_heads
from toast_onnx.errors import DataError, MatchError, ModelError
from toast_onnx.importance.ffn import scaled_rows
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.scores import Channels, QueriesKeys, Values, attention_score, ffn_score
from toast_onnx.importance.statistics import Statistics
from toast_onnx.importance.synthetic import AttentionStatistics
from toast_onnx.matching.blocks import Attention, Block, Ffn
from toast_onnx.matching.linear import Linear, bias, weights
from toast_onnx.matching.norms import layer_scale
from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import BlockRatios, Ratios
from toast_onnx.planning.widths import kept_count, kept_width, tied_head_dims
from toast_onnx.reasons import Reason
from toast_onnx.rewriting.attention import head_weights
from toast_onnx.solving.compensations import Solved, compensation
from toast_onnx.solving.ffn import solve_fc1_inputs, solve_ffn
from toast_onnx.solving.qk import (
    QKSolution,
    solve_qk_cosine,
    solve_qk_index,
    solve_qk_subspace,
)
from toast_onnx.solving.vo import VOSolution, solve_vo_index, solve_vo_subspace
from toast_onnx.solving.weights import AttentionWeights, BlockWeights, FfnWeights, HeadWeights, ProjWeights


@dataclass(frozen=True)
class Widths:
    """Kept counts of one block; None where a part is absent or keeps its width."""

    qk: int | None = None
    vo: int | None = None
    fc1: int | None = None
    fc2: int | None = None
    heads: int | None = None


def plan_widths(block: Block, ratio: BlockRatios, ratios: Ratios, skip_unprunable: bool) -> Widths:
    """Kept counts of a block; a ratio for all blocks passes over those that lack the part.

    Raises:
        MatchError: a ratio is given for a part that cannot be pruned, unless skipped.
    """

    def kept(part: str, kind: Literal["head_dim", "width"], original: int, reason: Reason | None) -> int | None:
        removed = getattr(ratio, part)
        if not removed:
            return None
        if reason is not None:
            if skip_unprunable:
                return None
            raise MatchError(
                f"block {block.index} ({block.name}): {part} cannot be pruned: {reason}; "
                f"set its ratio to 0 or use --skip-unprunable"
            )
        if part == "heads":
            count = kept_count(original, removed, 1)
            return None if count == original else count
        align = ratios.align.head_dim if kind == "head_dim" else ratios.align.width
        count = kept_width(kind, original, removed, align=align, rounding=ratios.rounding)
        if part == "qk" and a is not None and a.pairs is not None:
            count += count % 2  # rotary embedding turns dimensions in pairs
        return None if count == original else count

    a, f = block.attention, block.ffn
    qk = None if a is None else kept("qk", "head_dim", a.qk_dim, a.qk_reason)
    vo = None if a is None else kept("vo", "head_dim", a.vo_dim, a.vo_reason)
    one = a is not None and a.core.one_width
    if (ratios.attention.tie or one) and a is not None and (qk, vo) != (None, None):
        tied = tied_head_dims((a.qk_dim, a.vo_dim), (qk or a.qk_dim, vo or a.vo_dim))
        qk, vo = (None if n == dense else n for n, dense in zip(tied, (a.qk_dim, a.vo_dim), strict=True))
    return Widths(
        qk,
        vo,
        None if f is None else kept("fc1", "width", f.in_features, f.fc1_reason),
        None if f is None else kept("fc2", "width", f.width, f.fc2_reason),
        None if a is None else kept("heads", "head_dim", a.num_heads, a.heads_reason),
    )


def held_by_ties(blocks: Sequence[Block], settings: Sequence[BlockRatios], ratios: Ratios) -> tuple[str, ...]:
    """What to say where one of Q/K and V/Proj was to shrink alone and keeps its width with the other.

    Args:
        blocks: the matched blocks.
        settings: of every block.
        ratios: what all blocks share.
    """
    held = []
    for block, setting in zip(blocks, settings, strict=True):
        a = block.attention
        if a is None or not (ratios.attention.tie or a.core.one_width) or bool(setting.qk) == bool(setting.vo):
            continue
        if (a.qk_reason if setting.qk else a.vo_reason) is None:
            held.append(str(block.index))
    if not held:
        return ()
    why = "attention.tie" if ratios.attention.tie else "their fused node takes no other"
    return (
        f"Q/K and V/Proj of {'blocks' if len(held) > 1 else 'block'} {', '.join(held)} keep one width ({why}), and a "
        "ratio was given for one of them alone: nothing goes there; give both",
    )


def heads_rounded_away(
    blocks: Sequence[Block], ratios: Sequence[BlockRatios], widths: Sequence[Widths]
) -> dict[int, int]:
    """Blocks where a share of the heads was to go and rounds to none, with their number of heads.

    Args:
        blocks: the matched blocks.
        ratios: settings of every block.
        widths: kept counts of every block, as `plan_widths` says.
    """
    return {
        block.index: block.attention.num_heads
        for block, ratio, width in zip(blocks, ratios, widths, strict=True)
        if block.attention is not None and block.attention.heads_reason is None and ratio.heads and width.heads is None
    }


def solve_block(
    study: Study, block: Block, widths: Widths, ratio: BlockRatios, ratios: Ratios, statistics: Statistics
) -> BlockWeights | None:
    """New weights of a block; None when nothing changes.

    Raises:
        ModelError: its weights are NaN or infinite.
        ConfigError: what was asked for is not to be had (statistics without data, say).
    """
    kind = compensation(ratios.compensation.kind).solved
    ridge = ratios.compensation.ridge if ratios.compensation.ridge == "auto" else float(ratios.compensation.ridge)
    solver = _Solver(study, block, ratio, statistics, kind, ridge)
    attention = ffn = None
    try:
        if block.attention is not None and (widths.qk or widths.vo or widths.heads):
            attention = solver.attention(block.attention, widths)
        if block.ffn is not None and (widths.fc1 or widths.fc2):
            ffn = solver.ffn(block.ffn, widths.fc1, widths.fc2)
    except np.linalg.LinAlgError as e:  # what was not measured is NaN
        raise DataError(
            f"block {block.index} ({block.name}) cannot be solved with these statistics ({e}); if they come from a "
            "file, run `toast-onnx calibrate` with the same --ratios"
        ) from e
    return None if attention is None and ffn is None else BlockWeights(attention, ffn)


@dataclass
class _Solver:
    study: Study
    block: Block
    ratio: BlockRatios
    statistics: Statistics
    compensation: Solved
    ridge: Any

    def attention(self, attention: Attention, widths: Widths) -> AttentionWeights:
        """New weights of an attention: heads first, then dimensions of those that stay."""
        needed = attention_score(self.ratio.score).needs != "weights" or compensation(self.compensation).needs_moments
        found = self.statistics.attention(self.block.index) if needed else None
        heads = None if widths.heads is None else self._heads(attention, widths.heads, found)
        if heads is not None:
            found = heads.statistics
        q = k = v = proj = None
        if widths.qk is not None or heads is not None:
            q, k = self._queries_and_keys(attention, widths.qk, heads, found)
        if widths.vo is not None or heads is not None:
            v, proj = self._values(attention, widths.vo, heads, found)
        return AttentionWeights(q, k, v, proj)

    def _queries_and_keys(
        self, attention: Attention, kept: int | None, heads: KeptHeads | None, found: AttentionStatistics | None
    ) -> tuple[HeadWeights, HeadWeights]:
        assert attention.q is not None
        assert attention.k is not None
        stay = None if heads is None else heads.heads
        view, facts = self.study.view, self.study.facts
        old_q, old_k = (head_weights(view, facts, b).only(stay) for b in (attention.q, attention.k))
        self._check(old_q.weight, old_q.bias, old_k.weight, old_k.bias)
        if kept is None:
            return old_q, old_k
        if attention.qk_groups is not None:
            return self._grouped_queries_and_keys(attention, attention.qk_groups, kept, old_q, old_k, found)
        return self._reduced_queries_and_keys(attention, kept, old_q, old_k, found, stay)

    def _reduced_queries_and_keys(
        self,
        attention: Attention,
        kept: int,
        old_q: HeadWeights,
        old_k: HeadWeights,
        found: AttentionStatistics | None,
        stay: np.ndarray | None,
    ) -> tuple[HeadWeights, HeadWeights]:
        if attention.norms:
            old_q, old_k = (centred(p, norm) for p, norm in zip((old_q, old_k), attention.norms, strict=True))
        arrays = (old_q.weight, old_q.bias, old_k.weight, old_k.bias)
        if self.ratio.select == "subspace" and not attention.regions:
            assert found is not None
            solve = solve_qk_cosine if attention.cosine else solve_qk_subspace
            return _qk_weights(solve(*arrays, found.s_qq, found.s_kk, kept), stay)
        indices = self._qk_indices(attention, old_q, old_k, found, kept)
        # Rotary embedding in front of the split into heads: statistics are those of all heads together.
        s_qq = np.empty(0) if found is None else np.broadcast_to(found.s_qq, (*old_q.bias.shape, attention.qk_dim))
        # Folding into the keys alone would change their lengths, or mix what is turned by different angles.
        fold: Solved = self.compensation if attention.folds else "none"
        queries = math.inf if found is None else found.tokens
        new_q, new_k = _qk_weights(solve_qk_index(*arrays, s_qq, indices, fold, self.ridge, queries), stay)
        if attention.norms:
            s_q, s_k = (None, None) if found is None else (found.s_qq, found.s_kk)
            norm_q, norm_k = attention.norms
            shares = (
                energy_kept(old_q, norm_q, s_q, indices[0], offset=True),
                energy_kept(old_k, norm_k, s_k, indices[0], offset=False),
            )
            new_q, new_k = replace(new_q, energy=shares[0]), replace(new_k, energy=shares[1])
        return new_q, new_k

    def _grouped_queries_and_keys(
        self,
        attention: Attention,
        groups: np.ndarray,
        kept: int,
        q: HeadWeights,
        k: HeadWeights,
        found: AttentionStatistics | None,
    ) -> tuple[HeadWeights, HeadWeights]:
        """One choice for the keys of a head and all queries that meet them."""
        rows = stacked(np.concatenate([q.weight, q.bias[None]]), groups)  # (n * (C + 1), G, d), biases as rows
        stack = replace(q, weight=rows, bias=np.zeros_like(k.bias), slots=k.slots)
        together = None if found is None else pooled(found, groups)
        alone = replace(attention, qk_groups=None)
        new_q, new_k = self._reduced_queries_and_keys(alone, kept, stack, k, together, None)
        whole = apart(new_q.weight, groups)
        return replace(new_q, weight=whole[:-1], bias=whole[-1], slots=new_q.slots[groups]), new_k

    def _values(
        self, attention: Attention, kept: int | None, heads: KeptHeads | None, found: AttentionStatistics | None
    ) -> tuple[HeadWeights, ProjWeights]:
        stay = None if heads is None else heads.heads
        context = None if found is None else found.context
        v, wo, bo, gamma = self._read_out(attention)
        v = v.only(stay)
        if heads is not None:
            wo, bo = heads.wo, heads.bo
        if kept is None:
            return v, ProjWeights(wo, bo)
        groups = attention.vo_groups
        wv, bv = (v.weight, v.bias) if groups is None else (v.weight[:, groups], v.bias[groups])
        if self.ratio.select == "subspace" and attention.side is None:
            assert context is not None
            solved = solve_vo_subspace(
                wv, bv, wo, bo, context, kept, self.compensation, self.ridge, gamma, groups=groups
            )
        else:
            indices = self._vo_indices(v, wo, found, kept, gamma, groups)
            solved = solve_vo_index(wv, bv, wo, bo, indices, context, self.compensation, self.ridge)
        new_v, new_proj = _vo_weights(solved, stay)
        if groups is not None:
            first = members(groups)[:, 0]
            new_v = replace(new_v, weight=new_v.weight[:, first], bias=new_v.bias[first], slots=new_v.slots[first])
        return new_v, new_proj

    def _read_out(self, attention: Attention) -> tuple[HeadWeights, np.ndarray, np.ndarray, np.ndarray | None]:
        """Values of all heads, the output projection (H, d, C_out) with its bias (C_out,), and layer scale (C_out,)."""
        assert attention.v is not None
        assert attention.proj is not None
        view, facts, linear = self.study.view, self.study.facts, attention.proj.linear
        v = head_weights(view, facts, attention.v)
        wo = weights(view, facts, linear)[attention.proj.layout.channels]
        bo, gamma = self._bias(linear), layer_scale(view, facts, linear.output, linear.out_features)
        self._check(v.weight, v.bias, wo, bo)
        return v, wo, bo, gamma

    def _heads(self, attention: Attention, kept: int, found: AttentionStatistics | None) -> KeptHeads:
        v, wo, bo, gamma = self._read_out(attention)
        context = None if found is None else found.context
        ranked = ranked_heads(v.weight, wo, gamma, context, self.ratio, self.compensation)
        return keep_heads(np.sort(ranked[:kept]), wo, bo, found, self.compensation, self.ridge)

    def _qk_indices(self, attention: Attention, q: HeadWeights, k: HeadWeights, found: Any, kept: int) -> np.ndarray:
        score = attention_score(self.ratio.score)
        s_qq, s_kk = (None, None) if found is None else (found.s_qq, found.s_kk)
        subject = QueriesKeys(q.weight, k.weight, s_qq, s_kk, self.ratio.coupling)
        if attention.regions:
            return score.keep_shared(subject, kept, attention.pairs)
        return score.qk.keep(subject, kept)

    def _vo_indices(
        self,
        v: HeadWeights,
        wo: np.ndarray,
        found: Any,
        kept: int,
        gamma: np.ndarray | None,
        groups: np.ndarray | None,
    ) -> np.ndarray:
        """Dimensions (H, kept) of every head that stay."""
        context, score = None if found is None else found.context, attention_score(self.ratio.score)
        rows = scaled_rows(wo, gamma)
        if groups is not None:
            return np.asarray(kept_values(score, v.weight, rows, context, self.ratio.coupling, groups, kept)[groups])
        return score.vo.keep(Values(v.weight, rows, context, self.ratio.coupling), kept)

    def ffn(self, ffn: Ffn, fc1: int | None, fc2: int | None) -> FfnWeights:
        view, facts = self.study.view, self.study.facts
        inputs = entries = units = exit_ = None
        entry_weights = tuple(weights(view, facts, e) for e in ffn.entries)
        w2, b2 = weights(view, facts, ffn.fc2), self._bias(ffn.fc2)
        self._check(*entry_weights, *(self._bias(e) for e in ffn.entries), w2, b2)
        if fc2 is not None:
            # by unit: the parts of a gated form side by side; behind an inner norm fc2's rows alone count
            by_unit = tuple(
                w[:, u[:, p]]
                for w, u in zip(entry_weights, ffn.units, strict=not ffn.selects_at_exit)
                for p in range(u.shape[1])
            )
            moments = self._moments(self.statistics.hidden)
            rows = fc2_rows(self.study, self.block.index, ffn, self.ratio.ffn_score, self.statistics)
            units = self._keep(by_unit, rows, moments, "fc2", fc2)
            solved = solve_ffn(units, w2, b2, moments, self.compensation, self.ridge)
            exit_ = (solved.w2, solved.b2)
        if fc1 is not None:
            moments = self._moments(self.statistics.inputs)
            inputs = self._keep((), np.concatenate(entry_weights, axis=1).astype(np.float64), moments, "fc1", fc1)
            biases = tuple(self._bias(e) for e in ffn.entries)
            found = solve_fc1_inputs(inputs, entry_weights, biases, moments, self.compensation, self.ridge)
            entries = tuple(zip(found.w1, found.b1, strict=True))
        return FfnWeights(inputs, entries, units, exit_)

    def _moments(self, ask: Callable[[int], Moments]) -> Moments | None:
        read = ffn_score(self.ratio.ffn_score).reads_moments or compensation(self.compensation).needs_moments
        return ask(self.block.index) if read else None

    def _keep(
        self, writers: tuple[np.ndarray, ...], rows: np.ndarray, moments: Moments | None, part: str, kept: int
    ) -> np.ndarray:
        def tokens() -> np.ndarray:
            return np.asarray(self.statistics.activation_scores(self.block.index, part))

        return ffn_score(self.ratio.ffn_score).ranking.keep(Channels(writers, rows, moments, tokens), kept)

    def _bias(self, linear: Linear) -> np.ndarray:
        b = bias(self.study.view, self.study.facts, linear)
        dtype = weights(self.study.view, self.study.facts, linear).dtype
        return np.zeros(linear.out_features, dtype) if b is None else np.asarray(b)

    def _check(self, *arrays: np.ndarray) -> None:
        if not all(np.isfinite(a.astype(np.float32)).all() for a in arrays):
            raise ModelError(
                f"{self.study.view.model.path}: block {self.block.index} ({self.block.name}) "
                "has NaN or infinite weights; export the model again"
            )


def _slots(kept: np.ndarray | None, heads: int, count: int) -> np.ndarray:
    """Old dimensions that the new ones stand in for: the kept indices, or the first ones for a basis."""
    return np.broadcast_to(np.arange(count), (heads, count)) if kept is None else kept


def _qk_weights(new: QKSolution, heads: np.ndarray | None) -> tuple[HeadWeights, HeadWeights]:
    slots, basis = _slots(new.kept, *new.bq.shape), new.kept is None
    return HeadWeights(new.wq, new.bq, slots, basis, heads), HeadWeights(new.wk, new.bk, slots, basis, heads)


def _vo_weights(new: VOSolution, heads: np.ndarray | None) -> tuple[HeadWeights, ProjWeights]:
    slots, basis = _slots(new.kept, *new.bv.shape), new.kept is None
    return HeadWeights(new.wv, new.bv, slots, basis, heads), ProjWeights(new.wo, new.bo)
