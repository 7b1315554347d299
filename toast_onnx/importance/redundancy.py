"""How redundant the channels of a layer are: dead ones, ones the others predict, and how many directions they span.

The three measures of the paper's figure 4 (arXiv 2602.15720), from first and second moments alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toast_onnx.importance.moments import Moments

Array = NDArray[np.float64]

#: A channel is nearly dead below this fraction of the layer's mean activity.
DEAD = 0.2
#: Added to the correlations' diagonal, so that exact copies stay solvable; it lowers an R^2 by about as much.
_JITTER = 1e-6
#: A sum of channels counts as constant below this share of the mean channel's variance.
_TIED = 1e-3


@dataclass(frozen=True)
class Redundancy:
    """Redundancy of one layer's channels.

    Attributes:
        width: number of channels.
        dead: share of nearly dead channels, 0..1.
        r2_mean: mean R^2 of a channel as a linear function of all others; NaN where no channel varies.
        r2_median: its median.
        effective_rank: number of directions, 1..width; 0 where no channel varies.
    """

    width: int
    dead: float
    r2_mean: float
    r2_median: float
    effective_rank: float


def redundancy(moments: Moments, dead: float = DEAD, tied: ArrayLike | None = None) -> Redundancy:
    """All three measures of one layer.

    Args:
        moments: of the layer's input over tokens.
        dead: as for `dead_share`.
        tied: as for `reconstruction_r2`.
    """
    r2 = reconstruction_r2(moments.covariance, tied)
    known = r2[np.isfinite(r2)]
    return Redundancy(
        width=r2.size,
        dead=dead_share(moments.second, dead),
        r2_mean=float(known.mean()) if known.size else float("nan"),
        r2_median=float(np.median(known)) if known.size else float("nan"),
        effective_rank=effective_rank(moments.covariance),
    )


def dead_share(second: ArrayLike, threshold: float = DEAD) -> float:
    """Share of channels whose root mean square is below `threshold` of the channels' mean root mean square.

    Args:
        second: (n, n) second moments E[x x^T], not centred.
        threshold: fraction of the mean, 0..1.
    """
    activity = np.sqrt(np.maximum(np.diagonal(np.asarray(second, dtype=np.float64)), 0))
    limit = threshold * activity.mean()
    return float((activity <= limit).mean() if limit == 0 else (activity < limit).mean())


def reconstruction_r2(covariance: ArrayLike, tied: ArrayLike | None = None) -> Array:
    """R^2 of every channel's best linear prediction from all others, in the sample itself.

    With C the correlations, 1 - R^2_j = 1 / [C^-1]_jj, the reciprocal of the variance inflation factor.

    Args:
        covariance: (n, n).
        tied: (n,) weights of a sum of the channels that is constant by construction, which alone would make every R^2
            one: behind a LayerNorm the reciprocal gains. Predictions do not use that sum; the data must confirm it.

    Returns:
        (n,) in 0..1; NaN for channels that do not vary.
    """
    cov = np.asarray(covariance, dtype=np.float64)
    deviation = np.sqrt(np.maximum(np.diagonal(cov), 0))
    varies = deviation > 0
    r2 = np.full(deviation.size, np.nan)
    if not varies.any():
        return r2
    scale = deviation[varies]
    correlation = cov[np.ix_(varies, varies)] / np.outer(scale, scale)
    if tied is not None:
        u = np.asarray(tied, dtype=np.float64)[varies] * scale
        u /= np.linalg.norm(u)
        if np.isfinite(u).all() and u @ correlation @ u < _TIED:
            correlation = correlation + scale.size * np.outer(u, u)  # far from singular: says nothing any more
    values, vectors = np.linalg.eigh((correlation + correlation.T) / 2)
    inverse = (vectors**2 / (np.maximum(values, 0) + _JITTER)).sum(axis=1)
    r2[varies] = np.clip(1 - 1 / inverse, 0, 1)
    return r2


def effective_rank(covariance: ArrayLike) -> float:
    """exp of the entropy of the normalised singular values of the centred activations (Roy and Vetterli, 2007).

    Args:
        covariance: (n, n); its eigenvalues are the squared singular values up to a factor that cancels.

    Returns:
        From 1 (one direction) to n (all alike); 0 for a matrix of zeros.
    """
    cov = np.asarray(covariance, dtype=np.float64)
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh((cov + cov.T) / 2), 0))
    total = singular.sum()
    if total == 0:
        return 0.0
    p = singular[singular > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))
