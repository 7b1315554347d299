"""How many dimensions a ratio keeps.

The house rule works in exact decimal arithmetic on aligned widths. The paper's own rule works in binary floating point
and is reproduced as it is, because its published schedules mean what that arithmetic gives.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Literal

Kind = Literal["head_dim", "width"]
Rounding = Literal["nearest", "paper"]

#: Head sizes that fused attention kernels have in 16 bits: multiples of the first number, from the second to the third.
FUSED_HEAD_DIMS = (8, 16, 256)


def kept_count(original: int, ratio: Decimal, align: int, *, floor: bool = False) -> int:
    """Returns how many of `original` dimensions stay when the fraction `ratio` is removed.

    `original x (1 - ratio)`, computed exactly, is rounded to the nearest multiple of `align`, ties up; at least one
    multiple stays and never more than `original`. A ratio of 0 keeps the width, aligned or not.

    Args:
        original: The dense width, at least 1.
        ratio: The fraction removed, in [0, 1).
        align: The multiple to keep, at least 1.
        floor: Round down instead of to the nearest multiple.

    Returns:
        The kept width, from 1 to `original`.

    Raises:
        ValueError: An argument is outside its range.
    """
    _check(original, ratio)
    if align < 1:
        raise ValueError(f"align must be at least 1, got {align}")
    if ratio == 0:
        return original
    multiples = original * (1 - Fraction(ratio)) / align
    rounded = math.floor(multiples if floor else multiples + Fraction(1, 2))
    return min(max(1, rounded) * align, original)


def fused_head_dim(size: int) -> int | None:
    """Returns the smallest head size of a fused attention kernel that holds `size` dimensions; None above the largest.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"a width must be at least 1, got {size}")
    step, least, most = FUSED_HEAD_DIMS
    wide = max(-(-size // step) * step, least)
    return wide if wide <= most else None


def tied_head_dims(original: tuple[int, int], kept: tuple[int, int]) -> tuple[int, int]:
    """Returns kept widths of Q/K and V/Proj under which attention stays one fused kernel: the same for both.

    The wider of the two wishes decides, rounded up to a size that such kernels have: a tie never removes more than was
    asked for. Heads that are uneven from the start, or have no fused size within the dense width, keep what was asked.

    Args:
        original: The dense widths (qk, vo).
        kept: The widths that would be kept each on its own.

    Raises:
        ValueError: A kept width is below 1 or above the dense one.
    """
    for dense, wish in zip(original, kept, strict=True):
        if not 1 <= wish <= dense:
            raise ValueError(f"a kept width must be from 1 to {dense}, got {wish}")
    tied = fused_head_dim(max(kept))
    if original[0] != original[1] or tied is None:
        return kept
    return (tied, tied) if tied <= original[0] else original


def paper_kept_channels(channels: int, ratio: Decimal) -> int:
    """Returns the FFN channels the paper's channel selection keeps: `int(C x (1 - ratio))` in double precision.

    1280 channels at 0.9 keep 127, because `1 - 0.9` is a little less than 0.1 in binary; exact arithmetic keeps 128.

    Raises:
        ValueError: `channels` is below 1 or `ratio` outside [0, 1).
    """
    _check(channels, ratio)
    return min(max(1, int(channels * (1.0 - float(ratio)))), channels)


def paper_kept_head_dims(head_dim: int, ratio: Decimal) -> int:
    """Returns the dimensions of a head the paper's attention pruning keeps: `int(d x (100 - percent) / 100)`.

    The release states attention sparsity in percent, so its floats round differently from its FFN rule: 80 dimensions
    at 90 % keep 8, which the published 103.292 GMACs of ViT-H confirm, where `int(80 x (1 - 0.9))` would keep 7.

    Raises:
        ValueError: `head_dim` is below 1 or `ratio` outside [0, 1).
    """
    _check(head_dim, ratio)
    return max(1, int(head_dim * (100.0 - float(100 * ratio)) / 100.0))


def kept_width(kind: Kind, original: int, ratio: Decimal, *, align: int, rounding: Rounding = "nearest") -> int:
    """Returns the kept width under the rounding that a ratios file asks for.

    Args:
        kind: `head_dim` for Q/K and V/Proj, `width` for FFN channels.
        original: The dense width, at least 1.
        ratio: The fraction removed, in [0, 1).
        align: The multiple to keep; the paper's rounding knows none and takes 1 only.
        rounding: `nearest` for `kept_count`, `paper` for the paper's rule of that kind.

    Raises:
        ValueError: An argument is outside its range, or `align` is not 1 under the paper's rounding.
    """
    if rounding == "nearest":
        return kept_count(original, ratio, align)
    if align != 1:
        raise ValueError(f"the paper's rounding has no alignment; align must be 1, got {align}")
    return paper_kept_head_dims(original, ratio) if kind == "head_dim" else paper_kept_channels(original, ratio)


def _check(original: int, ratio: Decimal) -> None:
    if original < 1:
        raise ValueError(f"a width must be at least 1, got {original}")
    if not 0 <= ratio < 1:
        raise ValueError(f"a ratio must be in [0, 1), got {ratio}")
