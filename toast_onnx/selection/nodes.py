"""Nodes that choose channels while the graph runs: scores of a batch, the highest of them, gathered weights.

Plain ONNX operators throughout, so that any runtime that takes the model takes the selection as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import GraphEdit
from toast_onnx.importance.activation import CLASS_WEIGHT
from toast_onnx.selection.plan import Selection
from toast_onnx.tokens.nodes import Writer, write_sums
from toast_onnx.tokens.rewrite import WrittenMerge


def write_scores(edit: GraphEdit, at: int, selection: Selection, scored: str) -> str:
    """Insert the scores of a tensor's channels over the batch.

    Args:
        edit: graph edit.
        at: position to insert at, behind what is read.
        selection: what is scored.
        scored: tensor (batch, ..., channels).

    Returns:
        Tensor (channels,) in float32.
    """
    write = _Writer(edit, at, selection.name)
    x = write.emit("Reshape", [scored, write.constant("token_shape", np.asarray([0, -1, selection.channels]))])
    tokens = selection.tokens
    if tokens is not None:
        read = tokens if selection.probabilities is None else np.concatenate([[0], tokens])
        x = write.emit("Gather", [x, write.constant("tokens", read)], axis=1)
    magnitude = write.emit("Abs", [write.emit("Cast", [x], to=onnx.TensorProto.FLOAT)])
    if selection.probabilities is None or tokens is None:
        return write.mean(magnitude, [0, 1])
    each = write.mean(magnitude, [0])  # (1 + sampled, channels): class token, then patches
    weights = _token_weights(write, selection, tokens)  # (1, 1 + sampled)
    return write.flat(write.emit("MatMul", [weights, each]))


def _token_weights(write: _Writer, selection: Selection, tokens: np.ndarray) -> str:
    """Weights of the class token and of sampled patches, these by the attention they get, batch and heads averaged.

    The class token counts 2 / (1 + P); the patches share P / (1 + P) (arXiv 2602.15720).
    """
    assert selection.probabilities is not None
    zero, columns = write.constant("class_row", np.asarray([0])), write.constant("columns", tokens)
    row = write.emit("Gather", [selection.probabilities, zero], axis=-2)  # (batch, heads, 1, tokens) or folded
    if selection.merge is not None:
        row = _of_those_left(Writer(write.edit, write.at, selection.name), row, selection.heads, selection.merge)
    seen = write.emit("Cast", [write.emit("Gather", [row, columns], axis=-1)], to=onnx.TensorProto.FLOAT)
    rows = write.emit("Reshape", [seen, write.constant("row_shape", np.asarray([-1, tokens.size]))])
    attention = write.mean(rows, [0], keep=True)  # (1, sampled)
    total = 1.0 + selection.patches
    share = np.asarray(selection.patches / total / tokens.size, np.float32)
    patches = write.emit("Mul", [attention, write.constant("patch_share", share)])
    boosted = write.constant("class_share", np.asarray([[CLASS_WEIGHT / total]], np.float32))
    return write.emit("Concat", [boosted, patches], axis=1)


def _of_those_left(w: Writer, row: str, heads: int, merge: WrittenMerge) -> str:
    """(batch, heads, tokens left) the attention that merged tokens get together, from each one's (batch..., tokens)."""
    counts = merge.counts
    rows = w.reshape(w.cast(row, onnx.TensorProto.FLOAT), [-1, heads, counts.count], "by_head")
    if merge.matched is None:
        front = w.slice(rows, 2, 0, counts.front, what="front")
        return w.one("Concat", [front, w.slice(rows, 2, counts.count - counts.back, what="back")], "special", axis=2)
    each = w.one("Transpose", [rows], "tokens_first", perm=[0, 2, 1])
    return w.one("Transpose", [write_sums(w, each, merge.matched, counts)], "tokens_last", perm=[0, 2, 1])


def write_choice(edit: GraphEdit, at: int, selection: Selection, scores: str, spare: int = 0) -> str:
    """Insert the choice of the highest scores.

    Args:
        edit: graph edit.
        at: position to insert at.
        selection: how many stay.
        scores: tensor (channels,).
        spare: how many of the next best to name behind them.

    Returns:
        Tensor (kept + spare,) of channel numbers, best first.
    """
    write = _Writer(edit, at, selection.name)
    count = write.constant("kept_count", np.asarray([selection.kept + spare]))
    chosen = edit.fresh(f"{selection.name}/chosen")
    values = edit.fresh(f"{selection.name}/chosen_scores")
    node = onnx.helper.make_node(
        "TopK", [scores, count], [values, chosen], name=edit.fresh(f"{selection.name}/TopK"), axis=0
    )
    edit.insert(at, node)
    return chosen


def write_mask(edit: GraphEdit, at: int, selection: Selection, kept: str, dtype: int) -> str:
    """Insert a mask (channels,) of element type `dtype`: one for the `kept` (kept,) channel numbers, zero elsewhere."""
    write = _Writer(edit, at, selection.name)
    numpy_type = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    zeros = write.constant("zeros", np.zeros(selection.channels, numpy_type))
    ones = write.constant("ones", np.ones(selection.kept, numpy_type))
    return write.emit("ScatterElements", [zeros, kept, ones], axis=0)


def write_first(edit: GraphEdit, at: int, selection: Selection, chosen: str) -> str:
    """Insert the cut of `chosen` to its first `kept` entries."""
    write = _Writer(edit, at, selection.name)
    start, end = (write.constant(n, np.asarray([v])) for n, v in (("start", 0), ("end", selection.kept)))
    return write.emit("Slice", [chosen, start, end])


def write_small_linear(
    edit: GraphEdit,
    at: int,
    selection: Selection,
    x: str,
    chosen: str,
    w: np.ndarray,
    b: np.ndarray | None,
    output: str,
) -> None:
    """Insert y = x[..., chosen] @ W[chosen] + b.

    Args:
        edit: graph edit.
        at: position to insert at.
        selection: what is selected.
        x: input tensor.
        chosen: tensor (kept,) of channel numbers.
        w: (channels, out_features).
        b: (out_features,), None for no bias.
        output: name of y.
    """
    write = _Writer(edit, at, selection.name)
    small = write.emit("Gather", [write.constant("weight", w), chosen], axis=0)
    write.product(write.emit("Gather", [x, chosen], axis=-1), small, b, output)


def write_normed_linear(
    edit: GraphEdit,
    at: int,
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
        edit: graph edit.
        at: position to insert at.
        selection: what is selected.
        unit: tensor (..., channels), before gain and bias.
        chosen: tensor (kept + 1,) of channel numbers, the last one dropped.
        w: (channels, out_features), in the graph's precision.
        gain: (channels,) of the norm, in the graph's precision.
        b: (out_features,), the norm's bias folded in, in float64.
        output: name of y.
    """
    write = _Writer(edit, at, selection.name)
    start, end = (write.constant(n, np.asarray([v])) for n, v in (("start", 0), ("end", selection.kept)))
    kept = write.emit("Slice", [chosen, start, end])
    small = write.emit("Gather", [write.constant("weight", w), kept], axis=0)
    gains = write.emit("Gather", [write.constant("gain", gain[:, None]), kept], axis=0)  # (kept, 1)
    scaled = write.emit("Mul", [small, gains])
    every = gain.astype(np.float64)[None] @ w.astype(np.float64)
    dropped = write.emit("Sub", [write.precise("weight_sum", every, w.dtype), write.total(scaled, [0])])
    rows = write.emit("Concat", [scaled, dropped], axis=0)
    y = write.emit("MatMul", [write.emit("Gather", [unit, chosen], axis=-1), rows])
    edit.emit(at, "Add", [y, write.precise("bias", b, w.dtype)], output, f"{selection.name}/Add")


class _Writer:
    """Inserts nodes at one place under one module path."""

    def __init__(self, edit: GraphEdit, at: int, name: str) -> None:
        self.edit, self.at, self.name = edit, at, name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer; integers become int64."""
        value = value.astype(np.int64) if value.dtype.kind in "iu" else value
        return self.edit.constant(f"{self.name}/{name}", value)

    def precise(self, name: str, value: np.ndarray, dtype: np.dtype[Any]) -> str:
        """Add an initializer that half precision would round: kept in float32 and cast where the graph is half."""
        if dtype.itemsize >= 4:
            return self.constant(name, value.astype(dtype))
        stored = self.constant(name, value.astype(np.float32))
        return self.emit("Cast", [stored], to=onnx.helper.np_dtype_to_tensor_dtype(dtype))

    def emit(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Insert a node with one output; returns the output's name."""
        output = self.edit.fresh(f"{self.name}/{op}_output")
        return self.edit.emit(self.at, op, inputs, output, f"{self.name}/{op}", **attributes)

    def mean(self, x: str, axes: list[int], *, keep: bool = False) -> str:
        """ReduceMean, whose axes became an input with opset 18."""
        if self.edit.opset < 18:
            return self.emit("ReduceMean", [x], axes=axes, keepdims=int(keep))
        return self.emit("ReduceMean", [x, self.constant("axes", np.asarray(axes))], keepdims=int(keep))

    def total(self, x: str, axes: list[int]) -> str:
        """ReduceSum that keeps its axes, which became an input with opset 13."""
        if self.edit.opset < 13:
            return self.emit("ReduceSum", [x], axes=axes, keepdims=1)
        return self.emit("ReduceSum", [x, self.constant("axes", np.asarray(axes))], keepdims=1)

    def flat(self, x: str) -> str:
        """Reshape to one axis."""
        return self.emit("Reshape", [x, self.constant("flat", np.asarray([-1]))])

    def product(self, x: str, w: str, b: np.ndarray | None, output: str) -> None:
        """MatMul, and Add where there is a bias, into a tensor of the given name."""
        if b is None:
            self.edit.emit(self.at, "MatMul", [x, w], output, f"{self.name}/MatMul")
            return
        y = self.emit("MatMul", [x, w])
        self.edit.emit(self.at, "Add", [y, self.constant("bias", b)], output, f"{self.name}/Add")
