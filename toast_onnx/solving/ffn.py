"""Fewer hidden units (fc2 inputs) and fewer fc1 inputs, with what the kept ones predict of the dropped folded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.moments import Moments
from toast_onnx.solving.linear_algebra import Compensation, Ridge
from toast_onnx.solving.vo import refit

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class HiddenSolution:
    """What fc2 becomes; fc1 and everything per channel between the two is sliced by `kept`.

    Attributes:
        kept: (K,) ascending indices of hidden units.
        w2: (K, C_out).
        b2: (C_out,).
    """

    kept: Indices
    w2: NDArray[Any]
    b2: NDArray[Any]


@dataclass(frozen=True)
class InputSolution:
    """What fc1 becomes when it reads only some channels of the normalised input.

    Attributes:
        kept: (K,) ascending indices of input channels.
        w1: one (K, F) array for each entry (two where the FFN is gated).
        b1: one (F,) array for each entry.
    """

    kept: Indices
    w1: tuple[NDArray[Any], ...]
    b1: tuple[NDArray[Any], ...]


def solve_ffn(
    kept: Indices,
    w2: ArrayLike,
    b2: ArrayLike,
    moments: Moments | None = None,
    compensation: Compensation = "ridge",
    ridge: Ridge = "auto",
) -> HiddenSolution:
    """New fc2 for the kept hidden units; keeping all returns the given weights untouched.

    Args:
        kept: (K,), ascending.
        w2: (F, C_out).
        b2: (C_out,); zeros where there is none (the result then needs one unless compensation is none).
        moments: of the hidden activations, n = F; needed unless compensation is none.
        compensation: none, bias (means of the dropped) or ridge.
        ridge: strength as a fraction of the mean eigenvalue, or auto.

    Raises:
        ValueError: compensation without moments.
    """
    weight, bias, indices = np.asarray(w2), np.asarray(b2), np.asarray(kept, dtype=np.int64)
    if indices.size == weight.shape[0]:
        return HiddenSolution(indices, weight, bias)
    new, shift = refit(weight.astype(np.float64), indices, moments, compensation, ridge)
    return HiddenSolution(indices, new.astype(weight.dtype), (bias.astype(np.float64) + shift).astype(bias.dtype))


def solve_fc1_inputs(
    kept: Indices,
    w1: ArrayLike | Sequence[ArrayLike],
    b1: ArrayLike | Sequence[ArrayLike],
    moments: Moments | None = None,
    compensation: Compensation = "ridge",
    ridge: Ridge = "auto",
) -> InputSolution:
    """New fc1 for the kept input channels; keeping all returns the given weights untouched.

    Args:
        kept: (K,), ascending.
        w1: (C, F), or a sequence of such entries for a gated FFN.
        b1: (F,), or a sequence of such entries; zeros where there is none.
        moments: of the normalised input, n = C; needed unless compensation is none.
        compensation: none, bias or ridge.
        ridge: strength as a fraction of the mean eigenvalue, or auto.

    Raises:
        ValueError: compensation without moments.
    """
    indices = np.asarray(kept, dtype=np.int64)
    weights = [np.asarray(w) for w in w1] if isinstance(w1, tuple | list) else [np.asarray(w1)]
    biases = [np.asarray(b) for b in b1] if isinstance(b1, tuple | list) else [np.asarray(b1)]
    if indices.size == weights[0].shape[0]:
        return InputSolution(indices, tuple(weights), tuple(biases))
    solved = [refit(w.astype(np.float64), indices, moments, compensation, ridge) for w in weights]
    return InputSolution(
        indices,
        tuple(new.astype(w.dtype) for (new, _), w in zip(solved, weights, strict=True)),
        tuple((b.astype(np.float64) + shift).astype(b.dtype) for (_, shift), b in zip(solved, biases, strict=True)),
    )
