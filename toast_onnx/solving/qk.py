"""Fewer dimensions for queries and keys.

Scores are q M k^T with M = I; the reduced pair has M = A B^T of rank r. With pooled statistics the squared error of
the scores is || S_qq^(1/2) (I - M) S_kk^(1/2) ||_F^2, keys centred within each image because softmax ignores what
all keys share. Its minimum is a truncated SVD (Eckart and Young 1936).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.regular import root
from toast_onnx.solving.linear_algebra import Compensation, Ridge, plain_removal, predict_all

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class QKSolution:
    """New query and key projections, in the dtype of the old ones.

    Attributes:
        wq: (C, H, r), and so wk.
        bq: (H, r), and so bk.
        kept: (H, r) ascending indices, or None for a basis.
    """

    wq: NDArray[Any]
    bq: NDArray[Any]
    wk: NDArray[Any]
    bk: NDArray[Any]
    kept: Indices | None


def solve_qk_subspace(
    wq: ArrayLike, bq: ArrayLike, wk: ArrayLike, bk: ArrayLike, s_qq: Array, s_kk: Array, kept: int
) -> QKSolution:
    """Best rank-`kept` pair for every head; `kept == d` returns the given weights untouched.

    Args:
        wq: (C, H, d), and so wk.
        bq: (H, d), and so bk; zeros where a layer has none.
        s_qq: E[q q^T], (H, d, d), not centred.
        s_kk: covariance of the keys within an image, (H, d, d).
        kept: r.
    """
    d = np.asarray(wq).shape[2]
    _check_kept(kept, d)
    if kept == d:
        return _untouched(wq, bq, wk, bk, None)
    root_q, root_k = root(s_qq), root(s_kk)
    u, energy, vt = np.linalg.svd(root_q @ root_k)
    u, energy, vt = u[..., :kept], energy[..., :kept], vt[..., :kept, :]
    # S_qq^(-1/2) U s^(1/2) written without an inverse; directions without energy become zero columns
    alive = energy > np.finfo(np.float64).eps * d * energy[..., :1]
    scale = np.where(alive, 1 / np.sqrt(np.where(alive, energy, 1.0)), 0.0)[..., None, :]
    a = root_k @ np.swapaxes(vt, -1, -2) * scale  # (H, d, r)
    b = root_q @ u * scale
    return QKSolution(*_project(wq, bq, a), *_project(wk, bk, b), kept=None)


def solve_qk_index(
    wq: ArrayLike,
    bq: ArrayLike,
    wk: ArrayLike,
    bk: ArrayLike,
    s_qq: Array,
    kept_indices: Indices,
    compensation: Compensation = "ridge",
    ridge: Ridge = "auto",
    tokens: float = math.inf,
) -> QKSolution:
    """Keeps the same columns of Q and K; with ridge, folds what the kept queries predict of the dropped into K.

    q k^T = q_K k_K^T + q_D k_D^T, and q_D ~ q_K P gives k' = k_K + k_D P^T. A bias alone cannot help here: it would
    have to change from query to query, so `bias` is the same as `none`.

    Args:
        wq: (C, H, d), and so wk.
        bq: (H, d), and so bk.
        s_qq: E[q q^T], (H, d, d); read with ridge only.
        kept_indices: (H, r), ascending.
        compensation: none, bias or ridge.
        ridge: strength as a fraction of the mean eigenvalue, or auto.
        tokens: number of queries behind `s_qq`.
    """
    kept = np.asarray(kept_indices, dtype=np.int64)
    d = np.asarray(wq).shape[2]
    _check_kept(kept.shape[1], d)
    if kept.shape[1] == d:
        return _untouched(wq, bq, wk, bk, kept)
    plain = np.stack([plain_removal(d, indices) for indices in kept])  # (H, r, d)
    fold = plain
    if compensation == "ridge":
        fold = np.stack([predict_all(s, indices, ridge, tokens) for s, indices in zip(s_qq, kept, strict=True)])
    new_q = _project(wq, bq, np.swapaxes(plain, -1, -2))
    return QKSolution(*new_q, *_project(wk, bk, np.swapaxes(fold, -1, -2)), kept=kept)


def solve_qk_cosine(
    wq: ArrayLike, bq: ArrayLike, wk: ArrayLike, bk: ArrayLike, s_qq: Array, s_kk: Array, kept: int
) -> QKSolution:
    """One orthogonal basis for queries and keys, for attention that divides both by their length.

    Lengths must survive, so nothing is folded and nothing centred: the basis spans the directions that hold most of
    the energy of unit-scaled queries and keys together.

    Args:
        wq: (C, H, d), and so wk.
        bq: (H, d), and so bk.
        s_qq: E[q q^T], (H, d, d), not centred.
        s_kk: E[k k^T], (H, d, d), not centred.
        kept: r; d returns the given weights untouched.
    """
    d = np.asarray(wq).shape[2]
    _check_kept(kept, d)
    if kept == d:
        return _untouched(wq, bq, wk, bk, None)
    _, vectors = np.linalg.eigh(unit_trace(s_qq) + unit_trace(s_kk))
    basis = vectors[..., ::-1][..., :kept]  # (H, d, r)
    return QKSolution(*_project(wq, bq, basis), *_project(wk, bk, basis), kept=None)


def unit_trace(s: Array) -> Array:
    """Second moments (H, d, d) of vectors scaled to mean squared length one."""
    trace = np.trace(s, axis1=-2, axis2=-1)[..., None, None]
    return np.asarray(s / np.maximum(trace, np.finfo(np.float64).tiny), dtype=np.float64)


def _project(w: ArrayLike, b: ArrayLike, basis: Array) -> tuple[NDArray[Any], NDArray[Any]]:
    """(C, H, d) and (H, d) times a basis (H, d, r), back in the weights' own dtype."""
    weight, bias = np.asarray(w), np.asarray(b)
    new_weight = np.einsum("chd,hdr->chr", weight.astype(np.float64), basis)
    new_bias = np.einsum("hd,hdr->hr", bias.astype(np.float64), basis)
    return new_weight.astype(weight.dtype), new_bias.astype(bias.dtype)


def _untouched(wq: ArrayLike, bq: ArrayLike, wk: ArrayLike, bk: ArrayLike, kept: Indices | None) -> QKSolution:
    return QKSolution(np.asarray(wq), np.asarray(bq), np.asarray(wk), np.asarray(bk), kept)


def _check_kept(kept: int, d: int) -> None:
    if not 1 <= kept <= d:
        raise ValueError(f"cannot keep {kept} of {d} dimensions")
