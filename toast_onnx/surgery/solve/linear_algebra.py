"""The few pieces of linear algebra all solvers share; float64 throughout."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError
from toast_onnx.importance.selection import dropped

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Compensation = Literal["none", "bias", "ridge"]
Ridge = float | Literal["auto"]

AUTO_RIDGE = 1e-6  # of the mean eigenvalue; see docs/method.md


def root(s: Array) -> Array:
    """Symmetric square root of a positive semi-definite matrix (..., n, n); rounding below zero is cut off."""
    values, vectors = np.linalg.eigh((s + np.swapaxes(s, -1, -2)) / 2)
    scaled = vectors * np.sqrt(np.clip(values, 0, None))[..., None, :]
    return np.asarray(scaled @ np.swapaxes(vectors, -1, -2), dtype=np.float64)


def ridge_solve(s: Array, target: Array, ridge: Ridge = "auto") -> Array:
    """(S + lambda I)^-1 target for a covariance S (n, n) and target (n, m), refined once against the bias of lambda.

    Args:
        s: covariance, possibly singular.
        target: (n, m).
        ridge: lambda as a fraction of the mean eigenvalue of `s`.

    Raises:
        ConfigError: a negative ridge strength.
    """
    strength = AUTO_RIDGE if ridge == "auto" else float(ridge)
    if strength < 0:
        raise ConfigError(f"ridge strength must not be negative, got {strength}; use auto or a small number like 1e-6")
    n = s.shape[0]
    mean_eigenvalue = max(float(np.trace(s)) / n, np.finfo(np.float64).tiny)
    # below the rounding of the Gram matrix itself there is nothing to solve for
    damped = s + max(strength, n * np.finfo(np.float64).eps) * mean_eigenvalue * np.eye(n)
    first = np.linalg.solve(damped, target)
    if ridge != "auto":
        return first
    return first + np.linalg.solve(damped, target - s @ first)


def predict_all(s: Array, kept: Indices, ridge: Ridge = "auto") -> Array:
    """Best linear prediction of all n channels from the kept ones: P (k, n) with x ~ x_K P, identity on the kept.

    Regularising the prediction of the dropped channels only leaves a kept channel's own weight as it was, so the
    solution shrinks towards plain removal, not towards zero.
    """
    n = s.shape[0]
    gone = dropped(kept, n)
    p = np.zeros((kept.size, n))
    p[np.arange(kept.size), kept] = 1.0
    if gone.size:
        p[:, gone] = ridge_solve(s[np.ix_(kept, kept)], s[np.ix_(kept, gone)], ridge)
    return p


def plain_removal(n: int, kept: Indices) -> Array:
    """The prediction that takes dropped channels for zero: P (k, n)."""
    return np.eye(n)[kept]
