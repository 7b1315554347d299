"""The few pieces of linear algebra all solvers share; float64 throughout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError
from toast_onnx.importance.blocked import Cholesky
from toast_onnx.importance.regular import DOUBLE, damping, regular
from toast_onnx.importance.selection import dropped

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Compensation = Literal["none", "bias", "ridge"]
Ridge = float | Literal["auto"]

#: Fractions of the mean eigenvalue that `auto` takes: the first with plenty of tokens, else one of them; see
#: docs/method.md.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
#: With more tokens than this for each channel, they are plenty.
PLENTY = 80
#: Tokens of one image are alike: so many of them tell as much as one that is independent.
ALIKE = 20


def ridge_solve(
    s: Array,
    cross: Array,
    ridge: Ridge = "auto",
    *,
    tokens: float = math.inf,
    energy: float = 0.0,
    target: Array | None = None,
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
        target: covariance of the channels with what is made of the targets, C R (n, p); gives the coefficients times R
            (n, p) without forming these, lambda still being that of the targets themselves.

    Raises:
        ConfigError: a negative ridge strength.
    """
    if ridge == "auto" and tokens < s.shape[0] * PLENTY:
        values, vectors = np.linalg.eigh((s + s.T) / 2)
        values, turned = np.clip(values, 0, None), vectors.T @ cross
        found = best_strength(values, np.square(turned).sum(axis=1), tokens, energy, damping(s, 0.0))
        return np.asarray(
            vectors @ (gains(values, found)[:, None] * (turned if target is None else vectors.T @ target))
        )
    target = cross if target is None else target
    if ridge == "auto":
        solve = _solver(regular(s, STRENGTHS[0]))
        first = solve(target)
        return np.asarray(first + solve(target - s @ first))
    if ridge < 0:
        raise ConfigError(f"ridge strength must not be negative, got {ridge}; use auto or a small number like 1e-6")
    return np.asarray(np.linalg.solve(regular(s, ridge, DOUBLE), target))


def _solver(s: Array) -> Callable[[Array], Array]:
    """What solves S X = B; S is factored once, without pivots where rounding left it positive definite."""
    try:
        return Cholesky(s).solve
    except np.linalg.LinAlgError:
        return lambda b: np.asarray(np.linalg.solve(s, b))


def gains(values: Array, shift: float) -> Array:
    """Of each direction: the refined solution over what its targets share with it, (1 + l / (e + l)) / (e + l)."""
    return np.asarray((1 + shift / (values + shift)) / (values + shift))


def best_strength(values: Array, seen: Array, tokens: float, energy: float, least: float) -> float:
    """The lambda with the least error on tokens left out, by generalized cross-validation (Golub, Heath, Wahba 1979).

    In the eigenvectors of S a solution with one refinement keeps the fraction f = 1 - (lambda / (e + lambda))^2 of each
    direction's coefficient. The error that it leaves is divided by (1 - `ALIKE` (1 + sum f) / tokens)^2, which
    estimates the error on new tokens. Of those as good to a hundredth, or exact, the least.

    Args:
        values: eigenvalues e of S, (n,).
        seen: squared covariance of each direction with the targets, summed over these, (n,).
        tokens: how many tokens both were measured on.
        energy: variance of the targets, summed.
        least: what lambda may not fall below.

    Returns:
        Lambda, by one of `STRENGTHS`; by the greatest where the tokens determine nothing.
    """
    if not energy > 0:
        return max(STRENGTHS[0] * float(values.mean()), least)
    exact = 1e-6 * energy  # what the sums' rounding leaves of redundant channels
    shifts = [max(strength * float(values.mean()), least) for strength in STRENGTHS]
    scores = []
    for shift in shifts:
        gain = gains(values, shift)
        fraction = values * gain
        left = energy - float(seen @ (gain * (2 - fraction)))
        used = 1 + float(fraction.sum())
        if used < tokens and left <= exact:  # more equations than unknowns, and all hold
            return shift
        freedom = 1 - ALIKE * used / max(tokens, 1.0)
        scores.append(max(left, exact) / freedom**2 if freedom > 0 else math.inf)
    if math.isinf(min(scores)):
        return shifts[-1]
    return next(shift for shift, score in zip(shifts, scores, strict=True) if score <= 1.01 * min(scores))


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
