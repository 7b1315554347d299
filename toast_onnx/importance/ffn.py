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


def hidden_weight_scores(
    w1: ArrayLike | Sequence[ArrayLike], w2: ArrayLike, score: str = "l2", gamma: ArrayLike | None = None
) -> Array:
    """Magnitude of each hidden unit: its fc1 column (both columns where gated) and its fc2 row, concatenated.

    The two halves are scored together, as ToaSt couples V with the output projection, so a unit survives on what
    it reads and on what it writes.

    Args:
        w1: (C, F), or a sequence of such entries for a gated FFN.
        w2: (F, C_out).
        score: l1 or l2.
        gamma: layer scale (C_out,), folded into `w2`.

    Returns:
        (F,), the highest stay.

    Raises:
        ConfigError: an unknown score.
    """
    out = scaled_rows(w2, gamma)
    return _magnitude(np.concatenate([*(entry.T for entry in entries(w1)), out], axis=1), score)


def input_weight_scores(w1: ArrayLike | Sequence[ArrayLike], gain: ArrayLike | None = None, score: str = "l2") -> Array:
    """Magnitude of each fc1 input: its row of W1 times the gain of the norm before it.

    Args:
        w1: (C, F), or a sequence of such entries for a gated FFN.
        gain: (C,) of the norm; None where there is no norm.
        score: l1 or l2.

    Returns:
        (C,), the highest stay.

    Raises:
        ConfigError: an unknown score.
    """
    rows = np.concatenate(entries(w1), axis=1)
    if gain is not None:
        rows = rows * np.asarray(gain, dtype=np.float64)[:, None]
    return _magnitude(rows, score)


def variance_scores(moments: Moments, w2: ArrayLike, gamma: ArrayLike | None = None) -> Array:
    """Variance each channel sends to the output when its mean moves into the bias: var(h_j) ||w2_j||^2, (F,).

    Variance-based pruning (arXiv 2507.12988) ranks by the activation's variance; the weight norm turns it into
    the squared error of the output.
    """
    variance = np.diagonal(moments.covariance)
    return np.asarray(variance * np.square(scaled_rows(w2, gamma)).sum(axis=1), dtype=np.float64)


def wanda_scores(moments: Moments, rows: ArrayLike) -> Array:
    """Wanda's |W_jo| ||x_j|| (arXiv 2306.11695) added up for whole channels: sqrt(E[x_j^2]) sum_o |w_jo|, (F,).

    Args:
        moments: of the channels, n = F; not centred, as Wanda's norm of the input is not.
        rows: (F, C_out) weights that read them, layer scale folded in.
    """
    norms = np.sqrt(np.clip(np.diagonal(moments.second), 0, None))
    return np.asarray(norms * np.abs(np.asarray(rows, dtype=np.float64)).sum(axis=1))


def entries(w1: ArrayLike | Sequence[ArrayLike]) -> list[Array]:
    """The fc1 weights as a list of (C, F) float64 arrays, one entry unless the FFN is gated."""
    if isinstance(w1, tuple | list):
        return [np.asarray(entry, dtype=np.float64) for entry in w1]
    return [np.asarray(w1, dtype=np.float64)]


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


def _magnitude(rows: Array, score: str) -> Array:
    if score not in ("l1", "l2"):
        raise ConfigError(f"unknown weight score {score!r} for an FFN; choose l1 or l2")
    return ROW_SCORES[score](rows)


def select_ffn_second_order(
    moments: Moments, w2: ArrayLike, kept: int, batch: int | None = None, gamma: ArrayLike | None = None
) -> Indices:
    """Hidden units whose removal costs the output least once fc2 is refitted: (kept,), ascending.

    Args:
        moments: of the hidden activations, n = F.
        w2: (F, C_out).
        kept: units that stay.
        batch: removals between two refits; None grows it with the width.
        gamma: layer scale (C_out,), folded into `w2`.
    """
    rows = scaled_rows(w2, gamma)
    return keep_second_order(moments.covariance, rows, kept, batch or default_batch(rows.shape[0]))
