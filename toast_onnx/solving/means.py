"""Bias correction along the depth: each block of the pruned model gives back the dense model's mean output."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def match_mean(
    b2: ArrayLike, dense_mean: ArrayLike, pruned_mean: ArrayLike, gamma: ArrayLike | None = None
) -> NDArray[Any]:
    """The output bias of a block's last branch that restores the mean of the residual stream after the block.

    Errors of earlier blocks have a mean that no layer-wise solution sees. Call it block by block in order, with the
    pruned mean measured after the earlier blocks were corrected.

    Args:
        b2: (C_out,) present bias.
        dense_mean: (C_out,) weighted token mean after the dense block.
        pruned_mean: (C_out,) the same tokens' mean after the pruned block.
        gamma: layer scale (C_out,) between the bias and the residual stream; channels it switches off stay as they are.

    Returns:
        (C_out,) in the dtype of `b2`.
    """
    bias = np.asarray(b2)
    shift = np.asarray(dense_mean, dtype=np.float64) - np.asarray(pruned_mean, dtype=np.float64)
    scale = np.ones_like(shift) if gamma is None else np.asarray(gamma, dtype=np.float64)
    live = scale != 0
    return (bias.astype(np.float64) + np.where(live, shift / np.where(live, scale, 1.0), 0.0)).astype(bias.dtype)
