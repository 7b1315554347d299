"""Scores of feed-forward channels: the hidden units (fc2's inputs) and the normalised inputs (fc1's inputs)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.errors import ConfigError
from toast_onnx.importance.attention import ROW_SCORES
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.regular import root
from toast_onnx.importance.second_order import default_batch, keep_second_order
from toast_onnx.importance.selection import Indices

Array = NDArray[np.float64]

#: Of the mean eigenvalue of the Fisher information, added to its diagonal; see docs/method.md.
DAMPING = 0.1


def weight_scores(writers: Sequence[ArrayLike], rows: ArrayLike, score: str = "l2") -> Array:
    """Magnitude of each channel: the columns that make it and the row that reads it, concatenated.

    Both are scored together, as ToaSt couples V with the output projection, so a hidden unit survives on what it reads
    and on what it writes. An input of fc1 has a row alone.

    Args:
        writers: (C, F) each, two where the FFN is gated; none for inputs of fc1.
        rows: (F, C_out) weights that read the channels, layer scale folded in.
        score: l1 or l2.

    Returns:
        (F,), the highest stay.

    Raises:
        ConfigError: an unknown score.
    """
    if score not in ("l1", "l2"):
        raise ConfigError(f"unknown weight score {score!r} for an FFN; choose l1 or l2")
    sides = [*(np.asarray(each, dtype=np.float64).T for each in writers), np.asarray(rows, dtype=np.float64)]
    return ROW_SCORES[score](np.concatenate(sides, axis=1))


def variance_scores(moments: Moments, rows: ArrayLike) -> Array:
    """Variance each channel sends to the output when its mean moves into the bias: var(h_j) ||w_j||^2, (F,).

    Variance-based pruning (arXiv 2507.12988) ranks by the activation's variance; the weight norm turns it into
    the squared error of the output. `rows` (F, C_out) read the channels, layer scale folded in.
    """
    variance = np.diagonal(moments.covariance)
    return np.asarray(variance * np.square(np.asarray(rows, dtype=np.float64)).sum(axis=1), dtype=np.float64)


def wanda_scores(moments: Moments, rows: ArrayLike) -> Array:
    """Wanda's |W_jo| ||x_j|| (arXiv 2306.11695) added up for whole channels: sqrt(E[x_j^2]) sum_o |w_jo|, (F,).

    Args:
        moments: of the channels, n = F; not centred, as Wanda's norm of the input is not.
        rows: (F, C_out) weights that read them, layer scale folded in.
    """
    norms = np.sqrt(np.clip(np.diagonal(moments.second), 0, None))
    return np.asarray(norms * np.abs(np.asarray(rows, dtype=np.float64)).sum(axis=1))


def scaled_rows(w2: ArrayLike, gamma: ArrayLike | None) -> Array:
    """fc2's weights (F, C_out) in float64 with the layer scale folded in."""
    out = np.asarray(w2, dtype=np.float64)
    return out if gamma is None else out * np.asarray(gamma, dtype=np.float64)


def rows_in_metric(w2: ArrayLike, metric: Array) -> Array:
    """fc2's weights (F, C_out), turned so that squared lengths are what an error costs in a metric.

    Args:
        w2: (F, C_out), without layer scale.
        metric: (C_out, C_out) mean of g g^T, g being a gradient at fc2's output; its scale does not count. `DAMPING` of
            its mean eigenvalue is added: what the model's answers do not see at first order they may see at second.
    """
    size = len(metric)
    scale = float(np.trace(metric)) / size
    even = metric / scale if scale > 0 else np.zeros_like(metric)
    return np.asarray(np.asarray(w2, dtype=np.float64) @ root(even + DAMPING * np.eye(size)))


def select_ffn_second_order(moments: Moments, rows: ArrayLike, kept: int, batch: int | None = None) -> Indices:
    """Hidden units whose removal costs the output least once fc2 is refitted: (kept,), ascending.

    Args:
        moments: of the hidden activations, n = F.
        rows: (F, C_out) weights that read them, layer scale folded in.
        kept: units that stay.
        batch: removals between two refits; None grows it with the width.
    """
    return keep_second_order(moments.covariance, rows, kept, batch or default_batch(moments.covariance.shape[0]))
