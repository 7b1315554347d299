"""Covariances that can be inverted: what is added to the diagonal, and why that much."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Of the mean eigenvalue: makes dead and duplicated channels invertible.
RELATIVE_JITTER = 1e-6
SINGLE, DOUBLE = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)


def regular(s: Array, strength: float = RELATIVE_JITTER, eps: float = SINGLE) -> Array:
    """S + lambda I for a covariance S (n, n) of which some eigenvalues may be zero; arguments as for `damping`."""
    found = np.array(s, dtype=np.float64)
    found.flat[:: len(found) + 1] += damping(s, strength, eps)
    return found


def damping(s: Array, strength: float, eps: float = SINGLE) -> float:
    """How large lambda has to be for S + lambda I to be inverted.

    Statistics are sums taken and stored in float32: a symmetric error of eps |S|, which moves eigenvalues by about
    2 eps ||S||_F / sqrt(n) (Wigner's semicircle law). Those that should be zero, as many as samples are missing, then
    lie on either side of it. Lambda is never below twice that, or the inverse would be of noise.

    Args:
        s: covariance (n, n).
        strength: lambda as a fraction of the mean eigenvalue of `s`.
        eps: precision of `s`.
    """
    n = s.shape[0]
    rounding = 4 * eps * float(np.linalg.norm(s)) / n**0.5
    return float(max(strength * float(np.trace(s)) / n, rounding, 1e-30))  # the last of no variance at all


def root(s: Array) -> Array:
    """Symmetric square root of a positive semi-definite matrix (..., n, n); rounding below zero is cut off."""
    values, vectors = np.linalg.eigh((s + np.swapaxes(s, -1, -2)) / 2)
    scaled = vectors * np.sqrt(np.clip(values, 0, None))[..., None, :]
    return np.asarray(scaled @ np.swapaxes(vectors, -1, -2), dtype=np.float64)
