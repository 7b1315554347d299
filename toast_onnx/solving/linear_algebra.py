"""The few pieces of linear algebra all solvers share; float64 throughout."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError
from toast_onnx.importance.arithmetic import arithmetic
from toast_onnx.importance.regular import DOUBLE, SINGLE, damping, regular
from toast_onnx.importance.selection import dropped
from toast_onnx.solving.banded import Banded
from toast_onnx.solving.factored import Factored, used_by

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
    energy: float | Array = 0.0,
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
        energy: variance of each target (m,), or of all; needed with few tokens.
        target: covariance of the channels with what is made of the targets, C R (n, p); gives the coefficients times R
            (n, p) without forming these, lambda still being that of the targets themselves.

    Raises:
        ConfigError: a negative ridge strength.
    """
    if ridge == "auto" and tokens < s.shape[0] * PLENTY:
        spectrum = _analysed(s, cross, energy, tokens)
        found = best_strength(spectrum, tokens, float(np.sum(energy)), damping(s, 0.0))
        return spectrum.solve(cross if target is None else target, found)
    target = cross if target is None else target
    if ridge == "auto":
        solve = _solver(regular(s, STRENGTHS[0]))
        first = solve(target)
        return np.asarray(first + solve(target - arithmetic(len(s)).product(s, first)))
    return _solver(regular(s, _fraction(ridge), DOUBLE))(target)


def ridge_strength(s: Array, cross: Array, ridge: Ridge = "auto", *, tokens: float, energy: Array) -> float:
    """The lambda of `ridge_solve` as a fraction of the mean eigenvalue of `s`; arguments as there.

    Raises:
        ConfigError: a negative ridge strength.
    """
    if ridge != "auto":
        return _fraction(ridge)
    if tokens >= s.shape[0] * PLENTY:
        return STRENGTHS[0]
    spectrum = _analysed(s, cross, energy, tokens)
    found = best_strength(spectrum, tokens, float(np.sum(energy)), damping(s, 0.0))
    return found / spectrum.mean if spectrum.mean > 0 else STRENGTHS[0]


def ridge_operator(s: Array, strength: float, *, refined: bool) -> Array:
    """What a ridge regression multiplies its targets by, (n, n) and symmetric: R = (S + lambda I)^-1.

    Args:
        s: covariance S of the channels (n, n), possibly singular.
        strength: lambda as a fraction of the mean eigenvalue of `s`.
        refined: whether the solution is refined once against the bias of lambda, R + lambda R^2, as with auto.
    """
    shift = damping(s, strength, SINGLE if refined else DOUBLE)
    once = _inverse(s, shift)
    return once + shift * arithmetic(len(s)).product(once, once.T) if refined else once


def _fraction(ridge: float) -> float:
    if ridge < 0:
        raise ConfigError(f"ridge strength must not be negative, got {ridge}; use auto or a small number like 1e-6")
    return ridge


def _analysed(s: Array, cross: Array, energy: float | Array, tokens: float) -> Spectrum | Banded | Factored:
    """What cross-validation reads; no matrix is taken apart further than it needs."""
    if isinstance(energy, np.ndarray):
        least = damping(s, STRENGTHS[0])
        with suppress(np.linalg.LinAlgError):  # rounding beyond what the least strength lifts
            used = _least_used(s, tokens)
            if used and ALIKE * (1 + used) >= tokens:
                return Factored(s, cross, energy, least, used)
            if len(s) >= arithmetic(len(s)).banded:
                return Banded(s, cross, energy, least)
    return Spectrum(s, arithmetic(len(s)).product(cross, cross.T), float(np.sum(energy)))


def _least_used(s: Array, tokens: float) -> float:
    """At least so many coefficients are used at any strength; 0 where it was not asked and nothing is known.

    Of interest is whether they are beyond what the tokens support, which half as many channels again can tell.
    """
    part = math.ceil(1.5 * tokens / ALIKE) if len(s) + 1 < tokens < math.inf else len(s) + 1
    return 0.0 if part > len(s) else used_by(s[:part, :part], STRENGTHS[-1] * float(np.trace(s)) / len(s))


def _inverse(s: Array, shift: float) -> Array:
    """(S + shift I)^-1, with pivots where rounding left it indefinite, as `_solver` has them."""
    try:
        return arithmetic(len(s)).inverse(s, shift)
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.inv(s + shift * np.eye(len(s))))


def _solver(s: Array) -> Callable[[Array], Array]:
    """What solves S X = B; S is factored once, without pivots where rounding left it positive definite."""
    try:
        return arithmetic(len(s)).factor(s).solve
    except np.linalg.LinAlgError:
        return lambda b: np.asarray(np.linalg.solve(s, b))


class Spectrum:
    """Covariance S of channels by its eigenvectors, and what targets share with each direction.

    Attributes:
        size: number of channels.
        mean: mean eigenvalue.
    """

    def __init__(self, s: Array, shared: Array, energy: float) -> None:
        """S (n, n), possibly singular, C C^T with C its covariance with the targets, and the summed variance of these.

        What rounding of C C^T adds to the variance left is below n eps |S| / lambda of all variance: lambda never lies
        below the rounding of float32 sums (`damping`), so that is 1e-9 n of it at most, less than what is called exact.
        """
        values, self._vectors = arithmetic(len(s)).eigen((s + s.T) / 2)
        self._values = np.clip(values, 0, None)
        self._shared, self._energy = shared, energy
        self.size = len(s)
        self.mean = float(self._values.mean())

    @cached_property
    def _seen(self) -> Array:
        """Squared covariance of each direction with the targets, summed over these, (n,)."""
        return np.asarray(
            np.einsum("ij,ij->j", self._vectors, arithmetic(self.size).product(self._shared, self._vectors))
        )

    def _gains(self, shift: float) -> Array:
        """Of each direction: the refined solution over what its targets share with it, (1 + l / (e + l)) / (e + l)."""
        return np.asarray((1 + shift / (self._values + shift)) / (self._values + shift))

    def used(self, shift: float) -> float:
        """Coefficients that the data determine: the fraction f that is kept of each direction's, summed."""
        return float((self._values * self._gains(shift)).sum())

    def left(self, shift: float, limit: float) -> float:
        """Variance of the targets that the solution leaves, summed."""
        gain = self._gains(shift)
        return self._energy - float(self._seen @ (gain * (2 - self._values * gain)))

    def solve(self, target: Array, shift: float) -> Array:
        """The refined solution for targets (n, p)."""
        on = arithmetic(self.size)
        return on.product(self._vectors, self._gains(shift)[:, None] * on.product(self._vectors.T, target))


def best_strength(spectrum: Spectrum | Banded | Factored, tokens: float, energy: float, least: float) -> float:
    """The lambda with the least error on tokens left out, by generalized cross-validation (Golub, Heath, Wahba 1979).

    In the eigenvectors of S a solution with one refinement keeps the fraction f = 1 - (lambda / (e + lambda))^2 of each
    direction's coefficient. The error that it leaves is divided by (1 - `ALIKE` (1 + sum f) / tokens)^2, which
    estimates the error on new tokens. Of those as good to a hundredth, or exact, the least.

    Args:
        spectrum: of the channels, with their targets.
        tokens: how many tokens both were measured on.
        energy: variance of the targets, summed.
        least: what lambda may not fall below.

    Returns:
        Lambda, by one of `STRENGTHS`; by the greatest where the tokens determine nothing.
    """
    shifts = [max(strength * spectrum.mean, least) for strength in STRENGTHS]
    if not energy > 0:
        return shifts[0]
    left = exact = 1e-6 * energy  # what the sums' rounding leaves of redundant channels
    scores: list[float] = []
    for shift, used in zip(shifts, _coefficients(spectrum, shifts, tokens), strict=True):
        best = min(scores, default=math.inf)
        freedom = max(1 - ALIKE * used / max(tokens, 1.0), 0.0) ** 2
        # A stronger ridge leaves no less than a weaker one; the last one needs no score when no other has one.
        idle = freedom == 0 or left >= best * freedom or (math.isinf(best) and shift == shifts[-1])
        if not idle or (left <= exact and used < tokens):
            left = max(spectrum.left(shift, exact if idle else math.inf), exact)
            if left <= exact and used < tokens:  # more equations than unknowns, and all hold
                return shift
        scores.append(math.inf if idle else left / freedom)
    if math.isinf(min(scores)):
        return shifts[-1]
    return next(shift for shift, score in zip(shifts, scores, strict=True) if score <= 1.01 * min(scores))


def _coefficients(spectrum: Spectrum | Banded | Factored, shifts: list[float], tokens: float) -> list[float]:
    """Coefficients in use at each lambda (ascending), the mean's among them; what is beyond use may be told too low.

    A weaker ridge uses no fewer than a stronger one. So where a stronger one leaves no freedom, and there are more
    tokens than coefficients, its number does for the weaker ones.
    """
    found: list[float] = []
    for shift in reversed(shifts):
        beyond = found and ALIKE * found[-1] >= tokens > spectrum.size + 1
        found.append(found[-1] if beyond else 1 + spectrum.used(shift))
    return found[::-1]


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
