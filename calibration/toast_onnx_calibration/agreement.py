"""How far two versions of one tensor are apart, summed over batches: agreement, divergence, cosine, relative error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Agreement:
    """Sums over the samples seen so far.

    Attributes:
        classes: whether rows are class scores, which adds `top1` and `kl`.
        rows: vectors compared: class scores of a sample, or the channels of a token.
        same: rows with the same largest entry.
        divergence: sum of KL(softmax dense || softmax pruned) over rows, in nats.
        cosine_sum: sum of the rows' cosines.
        error: sum of squared differences; energy: sum of squares of the first.
    """

    classes: bool = False
    rows: int = 0
    same: int = 0
    divergence: float = 0.0
    cosine_sum: float = 0.0
    error: float = 0.0
    energy: float = 0.0

    def add(self, dense: NDArray[Any], pruned: NDArray[Any], counts: NDArray[np.bool_] | None = None) -> None:
        """Add a batch, (..., channels) of each; of rows that do not count (...) nothing is added."""
        a, b = (np.asarray(x, np.float64).reshape(-1, x.shape[-1] if x.ndim else 1) for x in (dense, pruned))
        if counts is not None:
            a, b = a[counts.reshape(-1)], b[counts.reshape(-1)]
        self.rows += len(a)
        self.cosine_sum += float(cosines(a, b).sum())
        self.error += float(np.square(a - b).sum())
        self.energy += float(np.square(a).sum())
        if self.classes:
            self.same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
            self.divergence += float(divergences(a, b).sum())

    def to_json(self) -> dict[str, float | int]:
        """Averages; `relative_error` is the root of error over energy."""
        found: dict[str, float | int] = {}
        rows = max(self.rows, 1)  # none, where all are padding
        if self.classes:
            found |= {"top1_agreement": self.same / rows, "kl": self.divergence / rows}
        return found | {
            "cosine": self.cosine_sum / rows,
            "relative_error": float(np.sqrt(self.error / max(self.energy, np.finfo(np.float64).tiny))),
        }


def cosines(a: Array, b: Array) -> Array:
    """Cosine of every row of `a` and `b` (rows, channels); 1 where both are zero, 0 where one is."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    cosine = (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
    return np.asarray(np.where(both_zero, 1.0, cosine), np.float64)


def divergences(a: Array, b: Array) -> Array:
    """KL(softmax(a) || softmax(b)) of every row (rows, classes), in nats; probabilities are taken as they are."""
    p, q = (log_probabilities(x) for x in (a, b))
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1), np.float64)


def log_probabilities(scores: Array) -> Array:
    """Logarithms of softmax(scores), or of the scores where they are probabilities already."""
    if (scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(scores, np.finfo(np.float32).tiny)), np.float64)
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float64)
