"""Weight-only scores of attention dimensions (ToaSt, arXiv 2602.15720, structured coupled weight pruning).

A dimension of a head lives in two weights at once: Q and K meet in the scores, V and the output projection in
the context. A coupling says which of the two (or how both) speak for the dimension. Biases take no part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.errors import ConfigError
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.regular import root
from toast_onnx.importance.second_order import keep_second_order
from toast_onnx.importance.selection import Indices

Array = NDArray[np.float64]
RowScore = Literal["gm", "l1", "l2"]
Coupling = Literal["coupled", "q_only", "k_only", "proj_only", "average"]


def lower_median(rows: Array) -> Array:
    """Column-wise median of `rows` (..., d, n), the lower of the two middle values where d is even: (..., n).

    This is `torch.median`; numpy's median averages the two middles and picks other dimensions.
    """
    middle = (rows.shape[-2] - 1) // 2
    return np.asarray(np.partition(rows, middle, axis=-2)[..., middle, :], dtype=np.float64)


def gm(rows: Array) -> Array:
    """Euclidean distance of each row of `rows` (..., d, n) from the column-wise lower median: (..., d)."""
    return np.asarray(np.linalg.norm(rows - lower_median(rows)[..., None, :], axis=-1), dtype=np.float64)


def l1(rows: Array) -> Array:
    """Sum of magnitudes of each row: (..., d, n) -> (..., d)."""
    return np.asarray(np.abs(rows).sum(axis=-1), dtype=np.float64)


def l2(rows: Array) -> Array:
    """Sum of squares of each row: (..., d, n) -> (..., d)."""
    return np.asarray(np.square(rows).sum(axis=-1), dtype=np.float64)


ROW_SCORES: dict[str, Callable[[Array], Array]] = {"gm": gm, "l1": l1, "l2": l2}


def _couple(first: Array, second: Array, alone: str | None, score: str, coupling: str) -> Array:
    """Scores (H, d) of a pair of row matrices (H, d, n); `alone` names the side a one-sided coupling reads."""
    if score not in ROW_SCORES:
        raise ConfigError(f"unknown attention score {score!r}; choose one of {', '.join(get_args(RowScore))}")
    if coupling not in get_args(Coupling):
        raise ConfigError(f"unknown coupling {coupling!r}; choose one of {', '.join(get_args(Coupling))}")
    row_score = ROW_SCORES[score]
    if coupling == "coupled":
        return row_score(np.concatenate([first, second], axis=-1))
    if coupling == "average":
        return (row_score(first) + row_score(second)) / 2
    return row_score(first if alone == "first" else second)


def qk_scores(wq: ArrayLike, wk: ArrayLike, score: str = "gm", coupling: str = "coupled") -> Array:
    """Scores of the Q/K dimensions of every head; the highest stay.

    Couplings: `coupled` scores the rows of [W_Q | W_K], `average` the mean of both scores, `k_only` those of
    W_K, `q_only` and `proj_only` those of W_Q.

    Args:
        wq: (C, H, d), y = x @ W layout.
        wk: (C, H, d).
        score: gm, l1 or l2.
        coupling: see above.

    Returns:
        (H, d).

    Raises:
        ConfigError: an unknown score or coupling.
    """
    side = "second" if coupling == "k_only" else "first"
    return _couple(_head_rows(wq), _head_rows(wk), side, score, coupling)


def vo_scores(wv: ArrayLike, wo: ArrayLike, score: str = "gm", coupling: str = "coupled") -> Array:
    """Scores of the V/output-projection dimensions of every head; the highest stay.

    Couplings: `coupled` scores the rows of [W_V | W_O^T], `average` the mean of both scores, `q_only` those of
    W_V (the upstream half, as for Q), `k_only` and `proj_only` those of W_O^T.

    Args:
        wv: (C, H, d).
        wo: (H, d, C_out), layer scale folded in.
        score: gm, l1 or l2.
        coupling: see above.

    Returns:
        (H, d).

    Raises:
        ConfigError: an unknown score or coupling.
    """
    side = "first" if coupling == "q_only" else "second"
    return _couple(_head_rows(wv), np.asarray(wo, dtype=np.float64), side, score, coupling)


def qk_energy(s_qq: Array, s_kk: Array) -> Array:
    """Part of the scores' energy that each dimension carries alone, E[q_e^2] E[k_e^2]: (H, d, d) twice -> (H, d)."""
    energy = np.diagonal(s_qq, axis1=1, axis2=2) * np.diagonal(s_kk, axis1=1, axis2=2)
    return np.asarray(energy, dtype=np.float64)


def vo_energy(context_covariance: Array, wo: ArrayLike) -> Array:
    """Variance each context dimension sends to the output, var(o_e) ||W_O,e||^2.

    Args:
        context_covariance: (H * d, H * d) or (H, d, d).
        wo: (H, d, C_out), layer scale folded in.

    Returns:
        (H, d).
    """
    out = np.asarray(wo, dtype=np.float64)
    variance = np.diagonal(context_covariance, axis1=-2, axis2=-1).reshape(out.shape[:2])
    return np.asarray(variance * np.square(out).sum(axis=-1), dtype=np.float64)


def _head_rows(w: ArrayLike) -> Array:
    """(C, H, d) -> (H, d, C), one row a dimension."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(w, dtype=np.float64), 0, -1))


def select_qk_second_order(s_qq: Array, s_kk: Array, kept: int) -> Indices:
    """Indices whose removal costs the scores least once the keys are refitted: (H, kept), ascending.

    Args:
        s_qq: E[q q^T], (H, d, d).
        s_kk: covariance of the keys within an image, (H, d, d).
        kept: dimensions that stay in every head.
    """
    roots = root(s_kk)
    return np.stack([keep_second_order(s_qq[h], roots[h], kept) for h in range(s_qq.shape[0])])


def select_vo_second_order(context: Moments, wo: ArrayLike, kept: int) -> Indices:
    """Indices of all heads chosen together, each removal refitting W_O of every head: (H, kept), ascending.

    Args:
        context: moments of the concatenated contexts, n = H * d.
        wo: (H, d, C_out), layer scale folded in.
        kept: dimensions that stay in every head.
    """
    out = np.asarray(wo, dtype=np.float64)
    heads, d, _ = out.shape
    groups = np.repeat(np.arange(heads), d)
    channels = keep_second_order(context.covariance, out.reshape(heads * d, -1), kept, groups=groups)
    return np.asarray(channels - d * np.arange(heads)[:, None], dtype=np.int64)
