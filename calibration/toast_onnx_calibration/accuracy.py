"""Top-1, top-5 and how far they can be trusted: counts, ranks and Wilson's interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""The normal distribution's 97.5 % point."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 counts over `samples` labelled samples.

    Attributes:
        samples: Number of samples evaluated.
        top1: How many had their label first.
        top5: How many had it among the first five; None for a model with five classes or fewer.
        output: The output that was read.
        classes: Its width.
        not_finite: Samples whose scores held NaN or infinity; they count as wrong.
    """

    samples: int
    top1: int
    top5: int | None
    output: str
    classes: int
    not_finite: int = 0

    def to_json(self) -> dict[str, Any]:
        """Counts, shares and 95 % intervals."""
        result: dict[str, Any] = {"samples": self.samples, "output": self.output, "classes": self.classes}
        for name, correct in (("top1", self.top1), ("top5", self.top5)):
            if correct is not None:
                low, high = wilson(correct, self.samples)
                result[name] = {"correct": correct, "accuracy": correct / self.samples, "interval95": [low, high]}
        return result | {"not_finite": self.not_finite}


def added(parts: Sequence[Accuracy]) -> Accuracy:
    """Accuracy over all samples from that over parts of them, at least one."""
    top5 = [part.top5 for part in parts]
    return replace(
        parts[0],
        samples=sum(part.samples for part in parts),
        top1=sum(part.top1 for part in parts),
        top5=None if None in top5 else sum(count or 0 for count in top5),
        not_finite=sum(part.not_finite for part in parts),
    )


def label_ranks(scores: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each row's label among its scores, 0 for the highest; (N, K), (N,) -> (N,).

    Of equal scores the lower class ranks first. A row with NaN or infinity is given the last place, K: such a model is
    broken, and comparisons with NaN would otherwise put every label first.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)  # (N, 1)
    earlier = np.arange(scores.shape[1])[None, :] < labels[:, None]
    ahead = (scores > own) | ((scores == own) & earlier)
    ranks: NDArray[np.int64] = np.where(np.isfinite(scores).all(axis=1), ahead.sum(axis=1), scores.shape[1])
    return ranks


def wilson(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, JASA 22, 1927), at 95 % by default.

    Unlike the plain normal interval it stays within 0..1 and is sound for few samples and shares near the ends.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError("needs 0 <= correct <= total and total >= 1")
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)
