"""Fewer dimensions for values, with the output projection refitted over all heads together.

The branch's output is y = o W_O + b_O with o the concatenated contexts (n = H * d, head-major). Softmax rows sum to
one, so a change of basis or a slice of V passes through the attention unchanged, its bias included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.arithmetic import arithmetic
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.regular import root
from toast_onnx.importance.selection import dropped
from toast_onnx.solving.linear_algebra import Compensation, Ridge, ridge_operator, ridge_solve, ridge_strength

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class VOSolution:
    """New value and output projections, in the dtype of the old ones.

    Attributes:
        wv: (C, H, r).
        bv: (H, r).
        wo: (H, r, C_out).
        bo: (C_out,).
        kept: (H, r) ascending indices, or None for a basis.
    """

    wv: NDArray[Any]
    bv: NDArray[Any]
    wo: NDArray[Any]
    bo: NDArray[Any]
    kept: Indices | None


def solve_vo_subspace(
    wv: ArrayLike,
    bv: ArrayLike,
    wo: ArrayLike,
    bo: ArrayLike,
    context: Moments,
    kept: int,
    compensation: Compensation = "ridge",
    ridge: Ridge = "auto",
    gamma: ArrayLike | None = None,
    sweeps: int = 2,
    groups: Indices | None = None,
) -> VOSolution:
    """A basis of rank `kept` for every head's values; `kept == d` returns the given weights untouched.

    Starts from the truncated SVD of S_oo^(1/2) W_O of each head alone. With ridge, every head's basis is then chosen
    again for what the other heads' reduced contexts leave unexplained (reduced-rank regression, Izenman 1975), and
    all of W_O is refitted together.

    Args:
        wv: (C, H, d).
        bv: (H, d).
        wo: (H, d, C_out).
        bo: (C_out,).
        context: moments of the concatenated contexts, n = H * d.
        kept: r.
        compensation: none projects each head on its basis, bias also restores the mean, ridge refits.
        ridge: strength as a fraction of the mean eigenvalue, or auto.
        gamma: layer scale (C_out,); weighs the outputs while the basis is chosen.
        sweeps: passes over the heads, with ridge.
        groups: (H,) which heads share their values and so have one basis; it is then that of their mean covariance
            and of all that reads them, and not chosen again. None where each has its own.
    """
    out = np.asarray(wo)
    heads, d, _ = out.shape
    _check_kept(kept, d)
    if kept == d:
        return VOSolution(np.asarray(wv), np.asarray(bv), out, np.asarray(bo), None)
    s = context.covariance
    w = out.reshape(heads * d, -1).astype(np.float64)  # (H * d, C_out)
    seen = w if gamma is None else w * np.asarray(gamma, dtype=np.float64)
    own = np.stack([s[_head(h, d), _head(h, d)] for h in range(heads)])  # (H, d, d)
    numbers = np.arange(heads) if groups is None else groups
    each = {}
    for number in np.unique(numbers):
        sharing = np.flatnonzero(numbers == number)
        readers = np.concatenate([seen[_head(int(h), d)] for h in sharing], axis=1)
        each[number] = _leading_basis(own[sharing].mean(axis=0), readers, kept)
    bases = np.stack([each[number] for number in numbers])  # (H, d, r)
    if compensation == "ridge" and groups is None:
        bases = _alternate(s, seen, bases, sweeps, ridge, context.tokens)
    known = s if compensation == "ridge" else _block_diagonal(own)
    new = _readout(known, bases, w, ridge, context.tokens)
    shift = context.mean @ (w - _restored(new, bases)) if compensation != "none" else np.zeros(w.shape[1])
    return _solution(wv, bv, out, bo, bases, new, shift, None)


def solve_vo_index(
    wv: ArrayLike,
    bv: ArrayLike,
    wo: ArrayLike,
    bo: ArrayLike,
    kept_indices: Indices,
    context: Moments | None = None,
    compensation: Compensation = "ridge",
    ridge: Ridge = "auto",
) -> VOSolution:
    """Keeps columns of V and rows of W_O; the removed are predicted from all heads' kept ones (ridge) or by their mean.

    Args:
        wv: (C, H, d).
        bv: (H, d).
        wo: (H, d, C_out).
        bo: (C_out,).
        kept_indices: (H, r), ascending.
        context: moments of the concatenated contexts, n = H * d; needed unless compensation is none.
        compensation: none, bias or ridge.
        ridge: strength as a fraction of the mean eigenvalue, or auto.

    Raises:
        ValueError: compensation without moments.
    """
    kept = np.asarray(kept_indices, dtype=np.int64)
    out = np.asarray(wo)
    heads, d, _ = out.shape
    _check_kept(kept.shape[1], d)
    if kept.shape[1] == d:
        return VOSolution(np.asarray(wv), np.asarray(bv), out, np.asarray(bo), kept)
    flat = (kept + d * np.arange(heads)[:, None]).reshape(-1)
    w = out.reshape(heads * d, -1).astype(np.float64)
    new, shift = refit(w, flat, context, compensation, ridge)
    bases = np.stack([np.eye(d)[:, indices] for indices in kept])  # (H, d, r)
    return _solution(wv, bv, out, bo, bases, new, shift, kept)


def refit(
    w: Array, kept: Indices, moments: Moments | None, compensation: Compensation, ridge: Ridge
) -> tuple[Array, Array]:
    """Rows of a read-out y = x W + b for the kept inputs, and what to add to b.

    Args:
        w: (n, m).
        kept: (k,), ascending.
        moments: of x; needed unless compensation is none.
        compensation: none drops rows, bias puts the mean of the dropped into b, ridge predicts them from the kept.
        ridge: strength as a fraction of the mean eigenvalue, or auto.

    Returns:
        (k, m) and (m,).
    """
    if compensation == "none":
        return w[kept], np.zeros(w.shape[1])
    if moments is None:
        raise ValueError(f"compensation {compensation} needs moments")
    new = w[kept]
    gone = dropped(kept, len(w))
    if compensation == "ridge" and gone.size:
        s = moments.covariance
        energy = np.diagonal(s)[gone]
        own, cross = s[np.ix_(kept, kept)], s[np.ix_(kept, gone)]
        target = arithmetic(len(own)).product(cross, w[gone])
        new = new + ridge_solve(own, cross, ridge, tokens=moments.tokens, energy=energy, target=target)
    return new, moments.mean @ w - moments.mean[kept] @ new


def _readout(s: Array, bases: Array, w: Array, ridge: Ridge, tokens: float) -> Array:
    """Rows for reduced contexts o A that come closest to o W: (H * r, m).

    The ridge acts on what is added to the plain projection A^T W, so that too strong a one falls back to that.

    Args:
        s: covariance of the contexts o, (n, n).
        bases: orthonormal blocks of A, (H, d, r).
        w: (n, m).
        ridge, tokens: as in `ridge_solve`.
    """
    plain = _reduced(w.T, bases).T
    left = w - _restored(plain, bases)
    unseen = arithmetic(len(s)).product(s, left)
    energy = np.einsum("ij,ij->j", left, unseen)
    own = _reduced(_reduced(s, bases).T, bases)
    return np.asarray(plain + ridge_solve(own, _reduced(unseen.T, bases).T, ridge, tokens=tokens, energy=energy))


def _leading_basis(s: Array, w: Array, rank: int) -> Array:
    """Orthonormal basis (d, r) of the contexts with the most variance after `w` (d, m); `s` (d, d) is theirs.

    It spans S^(-1/2) U with U the left singular vectors of S^(1/2) W: up to scale W W^T S^(1/2) U, without an inverse.
    U is taken from the square of that matrix, whose rounding hides less than 1e-15 of the variance.
    """
    half = root(s)
    through = (w @ w.T) @ half
    _, vectors = np.linalg.eigh(half @ through)
    span = through @ vectors[:, ::-1][:, :rank]
    q, _ = np.linalg.qr(span / np.maximum(np.linalg.norm(span, axis=0), np.finfo(np.float64).tiny))
    return np.asarray(q, dtype=np.float64)


def _alternate(s: Array, w: Array, bases: Array, sweeps: int, ridge: Ridge, tokens: float) -> Array:
    """Bases (H, d, r) of all heads, each in turn the best one when the others' reduced contexts are regressed out.

    What the reduced contexts share with all contexts and with the outputs is kept, and only the head that changed is
    computed again. The regressions of all contexts on those of all heads but one differ so little that the ridge's
    strength is chosen at the first of them.

    Args:
        s: covariance of the contexts, (n, n).
        w: (n, m) read-out.
        bases: (H, d, r), where to start.
        sweeps: passes over the heads.
        ridge, tokens: as in `ridge_solve`.
    """
    heads, d, rank = bases.shape
    if heads == 1:
        return bases
    found, shared = bases.copy(), s @ w  # (n, m) covariance of contexts and outputs
    total = float(np.sum(w * shared))
    with_contexts = np.concatenate([a.T @ s[_head(h, d)] for h, a in enumerate(found)])  # (H * r, n)
    with_outputs = np.concatenate([a.T @ shared[_head(h, d)] for h, a in enumerate(found)])  # (H * r, m)
    among = _reduced(with_contexts, found)  # (H * r, H * r), and so the next one
    alike = with_outputs @ with_outputs.T
    first, spread = with_contexts[rank:], np.diagonal(s)
    strength = ridge_strength(among[rank:, rank:], first, ridge, tokens=tokens, energy=spread)
    for h in list(range(heads)) * sweeps:
        own, mine = _head(h, d), _head(h, rank)
        solve = ridge_operator(_without(among, mine), strength, refined=ridge == "auto")
        by_others = solve @ np.delete(with_contexts[:, own], mine, axis=0)
        explained = np.insert(by_others, mine.start, np.zeros((rank, d)), axis=0)  # (H * r, d), nothing by its own
        own_cov = s[own, own] - with_contexts[:, own].T @ explained  # of what the others leave
        unseen = shared[own] - explained.T @ with_outputs  # its covariance with the outputs, (d, m)
        energy = total - float(np.vdot(solve, _without(alike, mine)))
        solution = ridge_solve(own_cov, unseen, ridge, tokens=tokens, energy=energy)
        found[h] = _leading_basis(own_cov, solution, rank)
        with_contexts[mine] = found[h].T @ s[own]
        with_outputs[mine] = found[h].T @ shared[own]
        among[mine] = _reduced(with_contexts[mine], found)
        alike[mine] = with_outputs[mine] @ with_outputs.T
        for each in (among, alike):
            each[:, mine] = each[mine].T
    return found


def _without(x: Array, gone: slice) -> Array:
    """X (n, n) less some rows and the same columns."""
    return np.delete(np.delete(x, gone, axis=0), gone, axis=1)


def _reduced(x: Array, bases: Array) -> Array:
    """X A for X (k, H * d) and A of the heads' bases (H, d, r) on its diagonal: (k, H * r)."""
    heads, d, _ = bases.shape
    by_head = x.reshape(len(x), heads, d).swapaxes(0, 1) @ bases  # (H, k, r)
    return np.asarray(by_head.swapaxes(0, 1).reshape(len(x), -1))


def _restored(x: Array, bases: Array) -> Array:
    """A X for X (H * r, m), A as in `_reduced`: (H * d, m)."""
    heads, d, rank = bases.shape
    return np.asarray((bases @ x.reshape(heads, rank, -1)).reshape(heads * d, -1))


def _solution(
    wv: ArrayLike,
    bv: ArrayLike,
    out: NDArray[Any],
    bo: ArrayLike,
    bases: Array,
    new: Array,
    shift: Array,
    kept: Indices | None,
) -> VOSolution:
    """Projects V on the bases (H, d, r) and shapes the refitted read-out `new` (H * r, C_out)."""
    values, value_bias, out_bias = np.asarray(wv), np.asarray(bv), np.asarray(bo)
    heads, _, rank = bases.shape
    return VOSolution(
        wv=np.einsum("chd,hdr->chr", values.astype(np.float64), bases).astype(values.dtype),
        bv=np.einsum("hd,hdr->hr", value_bias.astype(np.float64), bases).astype(value_bias.dtype),
        wo=new.reshape(heads, rank, -1).astype(out.dtype),
        bo=(out_bias.astype(np.float64) + shift).astype(out_bias.dtype),
        kept=kept,
    )


def _head(h: int, d: int) -> slice:
    return slice(h * d, (h + 1) * d)


def _block_diagonal(blocks: Array) -> Array:
    """(H, d, d) on the diagonal of a matrix."""
    d = blocks.shape[1]
    result = np.zeros((len(blocks) * d, len(blocks) * d))
    for h, block in enumerate(blocks):
        result[_head(h, d), _head(h, d)] = block
    return result


def _check_kept(kept: int, d: int) -> None:
    if not 1 <= kept <= d:
        raise ValueError(f"cannot keep {kept} of {d} dimensions")
