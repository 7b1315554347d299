"""How the tokens (and the items of the batch) of one sequence lie in a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Along:
    """One axis of a tensor that an index runs along: position p holds the index (p // inner) % count + first.

    Attributes:
        axis: the axis, not negative.
        inner: extent of what lies inside the index on that axis (heads, folded into it).
        count: how many indices there are.
        first: the first of them.
    """

    axis: int
    inner: int
    count: int
    first: int = 0

    def labels(self, shape: tuple[int, ...]) -> np.ndarray:
        """1 + index for every element of a tensor of that shape."""
        extent = shape[self.axis]
        line = (np.arange(extent) // self.inner) % self.count + self.first + 1
        return np.broadcast_to(line.reshape([extent if a == self.axis else 1 for a in range(len(shape))]), shape)

    @property
    def stop(self) -> int:
        """One more than the last index."""
        return self.first + self.count


def read_along(labels: np.ndarray) -> Along | None:
    """The description that labels (1 + index, 0 for anything else) follow; None where they follow none.

    The indices must be a range that runs along one axis only, in order.
    """
    if labels.size == 0 or labels.min() < 1:
        return None
    for axis in range(labels.ndim):
        line = labels[tuple(slice(None) if a == axis else 0 for a in range(labels.ndim))]
        changes = np.flatnonzero(np.diff(line))
        if changes.size == 0:
            continue
        inner = int(changes[0]) + 1
        first, count = int(line.min()) - 1, int(line.max() - line.min()) + 1
        found = Along(axis, inner, count, first)
        return found if np.array_equal(found.labels(labels.shape), labels) else None
    return None


def single_index(labels: np.ndarray) -> int | None:
    """The index that all of a tensor belongs to, None when there are several."""
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    return low - 1 if low == high and low > 0 else None
