"""Statistics without data: the graph's own pieces run on synthetic tokens.

A LayerNorm's output is close to isotropic before its gain and bias, so seeded tokens gain * N(0, I) + bias stand for
real ones. Attention statistics follow in closed form; hidden activations come from running fc1 and the activation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import onnx

from toast_onnx.choosing.blocks import Widths
from toast_onnx.choosing.groups import for_each_query
from toast_onnx.choosing.head_norms import behind_norm
from toast_onnx.errors import ConfigError, MatchError, ModelError
from toast_onnx.importance.moments import Moments, merge
from toast_onnx.importance.scores import attention_score, ffn_score
from toast_onnx.importance.synthetic import (
    AttentionStatistics,
    context_moments,
    layer_norm_moments,
    synthetic_tokens,
)
from toast_onnx.matching.blocks import Block, Branch
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.norms import Norm, norm_before
from toast_onnx.matching.operators import MOVEMENT, PASSING
from toast_onnx.matching.piece import cut_piece
from toast_onnx.matching.study import Study
from toast_onnx.model import scratch_folder
from toast_onnx.planning.ratios import BlockRatios, Ratios
from toast_onnx.rewriting.attention import head_weights
from toast_onnx.runtime import open_session, run_session
from toast_onnx.solving.compensations import compensation

#: Synthetic tokens for every hidden unit; enough for a well-conditioned Gram matrix.
TOKENS_PER_UNIT = 8
#: Rows multiplied at once.
CHUNK = 4096


class SyntheticStatistics:
    """Statistics from weights and synthetic tokens (implements `toast_onnx.importance.statistics.Statistics`)."""

    def __init__(self, study: Study, seed: int = 0) -> None:
        self._study = study
        self._seed = seed

    @cached_property
    def source(self) -> str:
        """Where the statistics come from."""
        return f"weights and synthetic tokens (seed {self._seed}); no data was given"

    def attention(self, block: int) -> AttentionStatistics:
        """Closed-form statistics of a block's queries, keys and contexts."""
        attention = self._block(block).attention
        if attention is None:
            raise MatchError(f"block {block} has no attention")
        view, facts = self._study.view, self._study.facts
        present = {name: b for name, b in attention.branches.items() if name != "proj"}
        shared = {"k": attention.qk_groups, "v": attention.vo_groups}
        weights = {name: for_each_query(head_weights(view, facts, b), shared.get(name)) for name, b in present.items()}
        self._check(block, *(array for w in weights.values() for array in (w.weight, w.bias)))
        any_ = next(iter(present))  # what stands for a layer that was not found is never read
        read = [(self._moments(block, present[n]), weights[n]) for n in (n if n in present else any_ for n in "qkv")]
        (of_q, q), (of_k, k), (of_v, v) = read
        s_qq, s_kk = of_q.through(q.weight, q.bias).second, of_k.through(k.weight, k.bias).covariance
        if attention.cosine and attention.k is not None:
            # Cosine attention does not forgive a shift of all keys: their lengths change with it.
            s_kk = of_k.through(k.weight, k.bias).second
        if attention.norms:
            s_qq = behind_norm(s_qq, attention.norms[0], offset=True)
            s_kk = behind_norm(s_kk, attention.norms[1], offset=False)
        return AttentionStatistics(s_qq, s_kk, context_moments(of_v, v.weight, v.bias))

    def inputs(self, block: int) -> Moments:
        """Moments of the normalised input of a block's feed-forward network."""
        ffn = self._block(block).ffn
        if ffn is None:
            raise MatchError(f"block {block} has no feed-forward network")
        norm = self._norm(block, ffn.entries[0])
        return layer_norm_moments(norm.gain, norm.bias)

    def hidden(self, block: int) -> Moments:
        """Moments of the hidden activations of a block, its own nodes run on synthetic tokens."""
        ffn = self._block(block).ffn
        if ffn is None:
            raise MatchError(f"block {block} has no feed-forward network")
        view, facts = self._study.view, self._study.facts
        start, end = ffn.entries[0].input, ffn.fc2.input
        norm = self._norm(block, ffn.entries[0])
        shape, axis = facts.shape(start) or (), ffn.entries[0].channel_axis
        rows = int(np.prod(shape)) // ffn.in_features
        runs = -(-TOKENS_PER_UNIT * ffn.width // rows)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(facts.elem_type(start))
        piece = cut_piece(view, facts, start, end)
        with scratch_folder("toast-piece-") as folder:
            path = folder / "piece.onnx"
            onnx.save(piece, str(path))
            session = open_session(path, [end])
            feeds = (
                {
                    start: np.moveaxis(
                        self._tokens(norm.gain, norm.bias, rows, block, run, shape, axis), -1, axis
                    ).astype(dtype)
                }
                for run in range(runs)
            )
            outputs = (run_session(session, [end], feed)[end] for feed in feeds)
            rows_of = (np.moveaxis(out, ffn.fc2.channel_axis, -1).reshape(-1, ffn.width) for out in outputs)
            moments = merge(_moments_of(chunk) for chunk in _chunks(rows_of))
        self._check(block, moments.mean, moments.covariance)
        return moments

    def metric(self, block: int) -> np.ndarray:
        """Not to be had without samples."""
        raise ConfigError(f"ffn score 'fisher' (block {block}) needs samples: give --data, or choose second-order")

    def activation_scores(self, block: int, part: str) -> object:
        """Not to be had without images."""
        raise ConfigError(
            f"ffn score 'activation' (block {block}, {part}) needs images: give --data, or choose second-order"
        )

    def _tokens(
        self, gain: np.ndarray, bias: np.ndarray, rows: int, block: int, run: int, shape: tuple[int, ...], axis: int
    ) -> np.ndarray:
        """Tokens in the activation's shape, channels moved last."""
        tokens = synthetic_tokens(gain, bias, rows, self._seed + 1000 * block + run)
        last = [extent for k, extent in enumerate(shape) if k != axis % len(shape)]
        return tokens.reshape(*last, gain.size)

    def _block(self, index: int) -> Block:
        return self._study.match.blocks[index]

    def _moments(self, block: int, branch: Branch) -> Moments:
        norm = self._norm(block, branch.linear)
        return layer_norm_moments(norm.gain, norm.bias)

    def _norm(self, block: int, linear: Linear) -> Norm:
        """The norm in front of a layer of a block."""
        norm = norm_before(self._study.view, self._study.facts, linear.input, linear.in_features)
        self._check(block, norm.gain, norm.bias)
        return norm

    def _check(self, block: int, *arrays: np.ndarray) -> None:
        """Refuse a block whose weights, biases or norms are no numbers.

        Raises:
            ModelError: one of the arrays holds NaN or infinity.
        """
        if not all(np.isfinite(a.astype(np.float64)).all() for a in arrays):
            path, name = self._study.view.model.path, self._block(block).name
            raise ModelError(f"{path}: block {block} ({name}) has NaN or infinite weights; export the model again")


def founded_widths(
    study: Study,
    widths: Sequence[Widths],
    settings: Sequence[BlockRatios],
    ratios: Ratios,
    statistics: object,
) -> tuple[tuple[Widths, ...], tuple[int, ...]]:
    """Kept counts without the parts that synthetic tokens would be asked for and do not stand for.

    Args:
        study: the model.
        widths: kept counts of every block.
        settings: settings of every block.
        ratios: what all blocks share.
        statistics: what the new weights will follow from; measured ones leave everything as it is.

    Returns:
        The counts, and the blocks of which something is left alone.
    """
    if not isinstance(statistics, SyntheticStatistics):
        return tuple(widths), ()
    compensated = compensation(ratios.compensation.kind).needs_moments
    found: list[Widths] = []
    left: list[int] = []
    for block, width, setting in zip(study.match.blocks, widths, settings, strict=True):
        read: tuple[str, ...] = ()
        if attention_score(setting.score).needs == "moments" or compensated:
            read += ("heads", "qk", "vo")
        if setting.mode == "static" and (ffn_score(setting.ffn_score).reads_moments or compensated):
            read += ("fc1", "fc2")
        asked = [part for part in read if getattr(width, part) is not None]
        alone = dict.fromkeys((part for part in asked if not founded(study, block, part)), None)
        found.append(replace(width, **alone))
        left += [block.index] if alone else []
    return tuple(found), tuple(left)


def founded(study: Study, block: Block, part: str) -> bool:
    """Whether synthetic tokens stand for real ones in a part of a block: all its layers read what a norm made.

    A sum in which a norm's output is an addend counts (positions that are added; norms behind the branches, as in Swin
    V2), and so does what no input reaches (a learned query). Values that are also convolved do not: what a convolution
    makes follows from tokens beside each other, of which made-up ones know nothing.

    Args:
        study: the model.
        block: one of its blocks.
        part: heads, qk, vo, fc1 or fc2.
    """
    read: list[Linear] = []
    if part in ("fc1", "fc2"):
        read = [] if block.ffn is None else list(block.ffn.entries)
    elif block.attention is not None:
        a = block.attention
        if a.side is not None and part != "qk":
            return False
        named = {"qk": "qk", "vo": "v"}.get(part, "qkv")
        read = [branch.linear for name, branch in a.branches.items() if name in named]
    return all(_rests_on_norm(study, each) for each in read)


def _rests_on_norm(study: Study, linear: Linear) -> bool:
    view, facts, channels = study.view, study.facts, linear.in_features
    if norm_before(view, facts, linear.input, channels).found:
        return True
    name = linear.input
    while (node := view.producer_of(name)) is not None and (node.op_type in MOVEMENT or node.op_type in PASSING):
        name = node.input[0]
    if facts.is_constant(name) or name in view.initializers:
        return True
    return (
        node is not None
        and node.op_type == "Add"
        and any(norm_before(view, facts, each, channels).found for each in node.input)
    )


def _chunks(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Rows put together to pieces of `CHUNK` or more: few large products cost less than many small ones."""
    waiting: list[np.ndarray] = []
    for part in parts:
        waiting.append(part)
        if sum(len(p) for p in waiting) >= CHUNK:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _moments_of(tokens: np.ndarray) -> Moments:
    """Moments of (tokens, channels): each product in single precision, the sum over pieces in double."""
    rows = tokens.astype(np.float32)
    return Moments(float(rows.shape[0]), rows.sum(axis=0, dtype=np.float64), (rows.T @ rows).astype(np.float64))
