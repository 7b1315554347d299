"""Padded tokens: nodes that say of every token whether any query may see it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention, Block
from toast_onnx.matching.masks import Mask, masks
from toast_onnx.matching.span import block_masks, follows, span_of
from toast_onnx.matching.study import Study
from toast_onnx_calibration.graph_writer import GraphWriter
from toast_onnx_calibration.tokens import Tokens, as_float, as_tokens

#: Additive masks are at or below this where a token is padding (-10000, or the smallest number of the type).
MASKED = -1000.0


@dataclass(frozen=True)
class Padding:
    """(batch or 1, tokens) ones where a key can be seen by some query, zeros where it is padding."""

    tensor: str
    batch: int
    tokens: int

    def fits(self, batch: int, tokens: int) -> bool:
        """Whether it is about the tokens of a tensor of such extents."""
        return self.tokens == tokens and self.batch in (1, batch)


def padding_of(writer: GraphWriter, study: Study, attention: Attention) -> tuple[Padding | None, bool]:
    """The keys that count, over all masks of an attention (None where all do), and whether a mask's shape is unusual.

    Args:
        writer: appends nodes.
        study: of the model.
        attention: one of its attentions.
    """
    valid: Padding | None = None
    strange = False
    for mask in masks(study.view, study.facts, attention.core):
        seen = _visible(writer, study, mask)
        shape = study.facts.shape(mask.tensor)
        if seen is None or shape is None:
            strange = True
            continue
        batch = shape[0] if mask.kind == "keys" or len(shape) > 2 else 1
        if valid is None:
            valid = Padding(seen, batch, shape[-1])
        else:
            valid = Padding(writer.one("Mul", [valid.tensor, seen]), max(valid.batch, batch), shape[-1])
    return valid, strange


@dataclass(frozen=True)
class Placed:
    """Padding, and where its tokens are in some tensor.

    Attributes:
        tensor: the tensor.
        seen: (batch or 1, tokens) ones and zeros, which nodes make.
        axis: axis of the tokens, 0 or 1, where the tensor is seen as three axes, channels last; None where tokens
            cannot be told apart.
    """

    tensor: str
    seen: str
    axis: int | None

    def tokens(self, seen: NDArray[Any], shape: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens of a batch of the tensor count, as an array of its shape without channels.

        Args:
            seen: the value of `seen` for that batch.
            shape: of the batch, without channels.

        Raises:
            MatchError: some are hidden, and which ones cannot be told.
        """
        if np.all(seen):
            return np.ones(shape, np.bool_)
        rows, left = divmod(prod(shape), seen.shape[-1])
        if self.axis is None or left or len(seen) not in (1, rows):
            raise MatchError(f"which tokens of '{self.tensor}' are padding cannot be told")
        found = np.broadcast_to(seen > 0, (rows, seen.shape[-1]))
        return (found if self.axis else found.T).reshape(shape)


def placed(writer: GraphWriter, study: Study, block: Block, tensor: str, channel_axis: int = -1) -> Placed | None:
    """Which tokens of a tensor the masks of a block hide; None where it has no mask.

    Args:
        writer: appends nodes.
        study: of the model.
        block: one of its blocks.
        tensor: an activation.
        channel_axis: its axis of channels.

    Raises:
        MatchError: a mask has an unusual shape.
    """
    if block.attention is None:
        return None
    padding, strange = padding_of(writer, study, block.attention)
    if strange:
        raise MatchError(f"block {block.index} ({block.name}) has a mask of an unusual shape")
    if padding is None:
        return None
    tokens = as_tokens(writer, study, tensor, channel_axis)
    fits = block.attention.own_keys and padding.fits(tokens.batch, tokens.count)
    return Placed(tensor, padding.tensor, tokens.axis if fits else None)


def placed_behind(writer: GraphWriter, study: Study, output: str) -> Placed | None:
    """Which tokens of an output the masks hide of the last block that it is made of; None where there is none.

    An output that is made of anything besides one block's stream has tokens that nobody knows: of two towers, say.
    """
    if not (study.facts.shape(output) or ()):
        return None
    every = {name for block in study.match.blocks for name in block_masks(study.view, study.facts, block)}
    for block in reversed(study.match.blocks):
        span = span_of(study.view, study.facts, block)
        if span is None or not span.beside or not follows(study.view, study.facts, span.end, output, every):
            continue
        with suppress(MatchError):
            return placed(writer, study, block, output)
    return None


def token_weights(writer: GraphWriter, tokens: Tokens, padding: Padding) -> str | None:
    """(batch, tokens, 1) weights for a tensor, in the order of its axes; None where its tokens cannot be told apart."""
    if tokens.axis is None or not padding.fits(tokens.batch, tokens.count):
        return None
    x = writer.unsqueeze(padding.tensor, [2])
    if tokens.axis == 0:
        x = writer.one("Transpose", [x], perm=[1, 0, 2])
    leading = writer.gather(writer.one("Shape", [tokens.tensor]), [0, 1], 0)
    shape = writer.one("Concat", [leading, writer.numbers([1])], axis=0)
    return writer.one("Expand", [x, shape])


def _visible(writer: GraphWriter, study: Study, mask: Mask) -> str | None:
    x = mask.tensor
    rank = len(study.facts.shape(x) or ())
    if mask.kind == "additive":
        x = writer.one("Greater", [as_float(writer, study, x), writer.constant(MASKED, dtype=np.float32)])
    elif mask.kind == "hidden":
        x = writer.one("Not", [x])
    elif mask.kind == "keys":
        x = writer.one("Cast", [x], to=onnx.TensorProto.BOOL)
    x = writer.one("Cast", [x], to=onnx.TensorProto.FLOAT)
    if rank == 2:
        return x if mask.kind == "keys" else writer.reduce("ReduceMax", x, [0], keep=True)
    return writer.reduce("ReduceMax", x, list(range(1, rank - 1))) if rank > 2 else None
