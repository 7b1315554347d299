"""Nodes that choose channels while the graph runs: scores of a batch, the highest of them, gathered weights.

Plain ONNX operators throughout, so that any runtime that takes the model takes the selection as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import PlaceWriter
from toast_onnx.importance.activation import CLASS_WEIGHT
from toast_onnx.selection.plan import Selection
from toast_onnx.tokens.nodes import write_sums
from toast_onnx.tokens.rewrite import WrittenMerge


def write_scores(write: PlaceWriter, selection: Selection, scored: str) -> str:
    """Insert the scores of a tensor's channels over the batch.

    Args:
        write: writer, behind what is read.
        selection: what is scored.
        scored: tensor (batch, ..., channels).

    Returns:
        Tensor (channels,) in float32.
    """
    x = write.reshape(scored, [0, -1, selection.channels], called="token_shape")
    tokens = selection.tokens
    if tokens is not None:
        read = tokens if selection.probabilities is None else np.concatenate([[0], tokens])
        x = write.gather(x, read, 1, "tokens")
    magnitude = write.one("Abs", [write.cast(x, onnx.TensorProto.FLOAT)])
    if selection.probabilities is None or tokens is None:
        return write.reduce("ReduceMean", magnitude, [0, 1])
    each = write.reduce("ReduceMean", magnitude, [0])  # (1 + sampled, channels): class token, then patches
    weights = _token_weights(write, selection, tokens)  # (1, 1 + sampled)
    return write.reshape(write.one("MatMul", [weights, each]), [-1], called="flat")


def _token_weights(write: PlaceWriter, selection: Selection, tokens: np.ndarray) -> str:
    """Weights of the class token and of sampled patches, these by the attention they get, batch and heads averaged.

    The class token counts 2 / (1 + P); the patches share P / (1 + P) (arXiv 2602.15720).
    """
    assert selection.probabilities is not None
    zero, columns = write.numbers([0], "class_row"), write.constant(tokens, "columns", np.int64)
    row = write.one("Gather", [selection.probabilities, zero], axis=-2)  # (batch, heads, 1, tokens) or folded
    if selection.merge is not None:
        row = _of_those_left(write, row, selection.heads, selection.merge)
    seen = write.cast(write.one("Gather", [row, columns], axis=-1), onnx.TensorProto.FLOAT)
    rows = write.reshape(seen, [-1, tokens.size], called="row_shape")
    attention = write.reduce("ReduceMean", rows, [0], keep=True)  # (1, sampled)
    total = 1.0 + selection.patches
    share = write.constant(selection.patches / total / tokens.size, "patch_share", np.float32)
    patches = write.one("Mul", [attention, share])
    boosted = write.constant([[CLASS_WEIGHT / total]], "class_share", np.float32)
    return write.one("Concat", [boosted, patches], axis=1)


def _of_those_left(w: PlaceWriter, row: str, heads: int, merge: WrittenMerge) -> str:
    """(batch, heads, tokens left) the attention that merged tokens get together, from each one's (batch..., tokens)."""
    counts = merge.counts
    rows = w.reshape(w.cast(row, onnx.TensorProto.FLOAT), [-1, heads, counts.count], "by_head")
    if merge.matched is None:
        front = w.slice(rows, 2, 0, counts.front, what="front")
        return w.one("Concat", [front, w.slice(rows, 2, counts.count - counts.back, what="back")], "special", axis=2)
    each = w.one("Transpose", [rows], "tokens_first", perm=[0, 2, 1])
    return w.one("Transpose", [write_sums(w, each, merge.matched, counts)], "tokens_last", perm=[0, 2, 1])


def write_choice(write: PlaceWriter, selection: Selection, scores: str, spare: int = 0) -> str:
    """Insert the choice of the highest scores.

    Args:
        write: writer.
        selection: how many stay.
        scores: tensor (channels,).
        spare: how many of the next best to name behind them.

    Returns:
        Tensor (kept + spare,) of channel numbers, best first.
    """
    count = write.numbers([selection.kept + spare], "kept_count")
    names = [write.edit.fresh(f"{selection.name}/{what}") for what in ("chosen_scores", "chosen")]
    return write.node("TopK", [scores, count], outputs=names, axis=0)[1]


def write_mask(write: PlaceWriter, selection: Selection, kept: str, dtype: int) -> str:
    """Insert a mask (channels,) of element type `dtype`: one for the `kept` (kept,) channel numbers, zero elsewhere."""
    numpy_type = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    zeros = write.constant(np.zeros(selection.channels, numpy_type), "zeros")
    ones = write.constant(np.ones(selection.kept, numpy_type), "ones")
    return write.one("ScatterElements", [zeros, kept, ones], axis=0)


def write_first(write: PlaceWriter, selection: Selection, chosen: str) -> str:
    """Insert the cut of `chosen` to its first `kept` entries."""
    return write.one("Slice", [chosen, write.numbers([0], "start"), write.numbers([selection.kept], "end")])


def write_small_linear(
    write: PlaceWriter, x: str, chosen: str, w: np.ndarray, b: np.ndarray | None, output: str
) -> None:
    """Insert y = x[..., chosen] @ W[chosen] + b.

    Args:
        write: writer.
        x: input tensor.
        chosen: tensor (kept,) of channel numbers.
        w: (channels, out_features).
        b: (out_features,), None for no bias.
        output: name of y.
    """
    small = write.one("Gather", [write.constant(w, "weight"), chosen], axis=0)
    kept = write.one("Gather", [x, chosen], axis=-1)
    if b is None:
        write.node("MatMul", [kept, small], outputs=[output])
    else:
        write.node("Add", [write.one("MatMul", [kept, small]), write.constant(b, "bias")], outputs=[output])


def write_normed_linear(
    write: PlaceWriter,
    selection: Selection,
    unit: str,
    chosen: str,
    w: np.ndarray,
    gain: np.ndarray,
    b: np.ndarray,
    output: str,
) -> None:
    """Insert y = (n * gain) @ W + b for a normalised `unit` n of a stream whose dropped channels are zero.

    Zero channels are all the same number once normalised, so one of them stands for all: its row is the sum of the
    dropped rows. Nothing is approximated, and the product has kept + 1 rows in place of all.

    Args:
        write: writer.
        selection: what is selected.
        unit: tensor (..., channels), before gain and bias.
        chosen: tensor (kept + 1,) of channel numbers, the last one dropped.
        w: (channels, out_features), in the graph's precision.
        gain: (channels,) of the norm, in the graph's precision.
        b: (out_features,), the norm's bias folded in, in float64.
        output: name of y.
    """
    kept = write_first(write, selection, chosen)
    small = write.one("Gather", [write.constant(w, "weight"), kept], axis=0)
    gains = write.one("Gather", [write.constant(gain[:, None], "gain"), kept], axis=0)  # (kept, 1)
    scaled = write.one("Mul", [small, gains])
    every = gain.astype(np.float64)[None] @ w.astype(np.float64)
    whole = _precise(write, "weight_sum", every, w.dtype)
    dropped = write.one("Sub", [whole, write.reduce("ReduceSum", scaled, [0], keep=True)])
    rows = write.one("Concat", [scaled, dropped], axis=0)
    y = write.one("MatMul", [write.one("Gather", [unit, chosen], axis=-1), rows])
    write.node("Add", [y, _precise(write, "bias", b, w.dtype)], outputs=[output])


def _precise(write: PlaceWriter, name: str, value: np.ndarray, dtype: np.dtype[Any]) -> str:
    """A constant that half precision would round: kept in float32 and cast where the graph is half."""
    if dtype.itemsize >= 4:
        return write.constant(value, name, dtype)
    return write.cast(write.constant(value, name, np.float32), onnx.helper.np_dtype_to_tensor_dtype(dtype))
