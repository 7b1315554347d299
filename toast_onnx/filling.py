"""Where a block's new weights lie among the old ones: what is written, padded, and trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.matching.blocks import Attention, Block, Ffn
from toast_onnx.matching.linear import Linear
from toast_onnx.solving.weights import AttentionWeights, BlockWeights, FfnWeights

Array = NDArray[Any]
_EVERY = np.s_[:]


@dataclass(frozen=True)
class Filling:
    """New weights of one layer W (in_features, out_features), or of the heads that it makes.

    Attributes:
        part: `q`, `k`, `v`, `proj`, `entry0`, ..., `fc2`.
        linear: the layer.
        index: what of W the new weights fill.
        outputs: what of the bias they fill.
        new: weight and bias; None where the old ones stay.
        cleared: outputs that hold nothing but the new weights.
        gone: outputs that hold nothing at all; None where hidden units stay as many as they were.
    """

    part: str
    linear: Linear
    index: Any
    outputs: Any
    new: tuple[Array, Array] | None
    cleared: Any
    gone: Array | None = None


def fillings(block: Block, new: BlockWeights) -> Iterator[Filling]:
    """All layers of a block that get new weights.

    Args:
        block: the matched block.
        new: its new weights.
    """
    if block.attention is not None and new.attention is not None:
        yield from _attention(block.attention, new.attention)
    if block.ffn is not None and new.ffn is not None:
        yield from ffn_fillings(block.ffn, new.ffn)


def _attention(attention: Attention, new: AttentionWeights) -> Iterator[Filling]:
    for part, heads in new.heads.items():
        branch = attention.branches.get(part)
        if branch is not None:
            channels = branch.layout.channels
            columns = heads.channels(channels)  # (heads, kept)
            made = heads.weight, heads.bias
            yield Filling(part, branch.linear, np.s_[:, columns], columns, made, channels.reshape(-1))
    if attention.proj is not None and new.proj is not None and new.v is not None:
        rows = new.v.channels(attention.proj.layout.channels, attention.vo_groups)
        yield Filling("proj", attention.proj.linear, rows, _EVERY, (new.proj.weight, new.proj.bias), _EVERY)


def ffn_fillings(ffn: Ffn, new: FfnWeights) -> Iterator[Filling]:
    """The layers of a network that get new weights, fc2 last; all entries among them, even those that stay."""
    hides = new.units is not None and not ffn.selects_at_exit
    units = np.arange(ffn.width) if new.units is None else new.units
    dropped = np.setdiff1d(np.arange(ffn.width), units)
    for k, entry in enumerate(ffn.entries):
        rows = np.arange(entry.in_features) if new.inputs is None else new.inputs
        made = None if new.entries is None else new.entries[k]
        gone = ffn.units[k][dropped].reshape(-1) if hides else None
        yield Filling(f"entry{k}", entry, rows, _EVERY, made, _EVERY, gone)
    if new.fc2 is not None:
        yield Filling("fc2", ffn.fc2, units, _EVERY, new.fc2, _EVERY)
