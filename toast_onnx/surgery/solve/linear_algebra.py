"""The few pieces of linear algebra all solvers share; float64 throughout."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError
from toast_onnx.importance.regular import DOUBLE, regular
from toast_onnx.importance.selection import dropped

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Compensation = Literal["none", "bias", "ridge"]
Ridge = float | Literal["auto"]

#: Fractions of the mean eigenvalue that `auto` takes: the first with plenty of tokens, else one of them; see
#: docs/method.md.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
#: Fewer tokens than this for a channel are few.
PLENTY = 20
#: Tokens of one image are alike: so many of them tell as much as one that is independent.
ALIKE = 4


def root(s: Array) -> Array:
    """Symmetric square root of a positive semi-definite matrix (..., n, n); rounding below zero is cut off."""
    values, vectors = np.linalg.eigh((s + np.swapaxes(s, -1, -2)) / 2)
    scaled = vectors * np.sqrt(np.clip(values, 0, None))[..., None, :]
    return np.asarray(scaled @ np.swapaxes(vectors, -1, -2), dtype=np.float64)


def ridge_solve(
    s: Array, cross: Array, ridge: Ridge = "auto", *, tokens: float = math.inf, energy: float = math.inf
) -> Array:
    """(S + lambda I)^-1 C: regression coefficients of m targets on n channels, (n, m).

    With auto, lambda is next to nothing where tokens are plenty, and otherwise what generalized cross-validation finds
    best for tokens that were not measured; the solution is then refined once against the bias of lambda, so that
    redundant channels are recovered to rounding.

    Args:
        s: covariance S of the channels (n, n), possibly singular.
        cross: covariance C of the channels with the targets, (n, m).
        ridge: lambda as a fraction of the mean eigenvalue of `s`, or auto.
        tokens: how many tokens both were measured on.
        energy: variance of the targets, summed; needed with few tokens.

    Raises:
        ConfigError: a negative ridge strength.
    """
    if ridge == "auto":
        few = s.shape[0] * PLENTY > tokens
        damped = regular(s, cross_validated(s, cross, tokens, energy) if few else STRENGTHS[0])
        first = np.linalg.solve(damped, cross)
        return np.asarray(first + np.linalg.solve(damped, cross - s @ first))
    if ridge < 0:
        raise ConfigError(f"ridge strength must not be negative, got {ridge}; use auto or a small number like 1e-6")
    return np.asarray(np.linalg.solve(regular(s, ridge, DOUBLE), cross))


def cross_validated(s: Array, cross: Array, tokens: float, energy: float) -> float:
    """The strength with the least error on tokens left out, by generalized cross-validation (Golub, Heath, Wahba 1979).

    In the eigenvectors of S a solution with one refinement keeps the fraction f = 1 - (lambda / (e + lambda))^2 of each
    direction's coefficient; the error that it leaves is divided by (1 - sum f / tokens)^2, which estimates the error on
    new tokens. Of strengths that are as good to a hundredth, or exact, the least.

    Args:
        s, cross, tokens, energy: as in `ridge_solve`.

    Returns:
        One of `STRENGTHS`; the greatest where the tokens determine nothing.
    """
    values, vectors = np.linalg.eigh((s + s.T) / 2)
    values = np.clip(values, 0, None)
    seen = np.square(vectors.T @ cross).sum(axis=1)  # (n,)
    exact = 1e-6 * max(energy, 0.0)  # what the sums' rounding leaves of redundant channels
    scores = []
    for strength in STRENGTHS:
        shift = strength * max(float(values.mean()), np.finfo(np.float64).tiny)
        gain = (1 + shift / (values + shift)) / (values + shift)  # solution = V diag(gain) V^T C
        fraction = values * gain
        left = energy - float(seen @ (gain * (2 - fraction)))
        used = 1 + float(fraction.sum())
        if used < tokens and left <= exact:  # more equations than unknowns, and all hold
            return strength
        freedom = 1 - ALIKE * used / tokens
        scores.append(left / freedom**2 if freedom > 0 else math.inf)
    if math.isinf(min(scores)):
        return STRENGTHS[-1]
    return next(strength for strength, score in zip(STRENGTHS, scores, strict=True) if score <= 1.01 * min(scores))


def predict_all(s: Array, kept: Indices, ridge: Ridge = "auto", tokens: float = math.inf) -> Array:
    """Best linear prediction of all n channels from the kept ones: P (k, n) with x ~ x_K P, identity on the kept.

    Regularising the prediction of the dropped channels only leaves a kept channel's own weight as it was, so the
    solution shrinks towards plain removal, not towards zero.
    """
    n = s.shape[0]
    gone = dropped(kept, n)
    p = np.zeros((kept.size, n))
    p[np.arange(kept.size), kept] = 1.0
    if gone.size:
        energy = float(np.diagonal(s)[gone].sum())
        p[:, gone] = ridge_solve(s[np.ix_(kept, kept)], s[np.ix_(kept, gone)], ridge, tokens=tokens, energy=energy)
    return p


def plain_removal(n: int, kept: Indices) -> Array:
    """The prediction that takes dropped channels for zero: P (k, n)."""
    return np.eye(n)[kept]
