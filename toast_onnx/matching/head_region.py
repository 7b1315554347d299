"""Where heads lie in the tensors between Q, K and V and the output projection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class HeadAxis:
    """The axis of a tensor that holds the heads, alone or inside a larger number (batch x heads, heads x dimensions).

    Attributes:
        axis: the axis, not negative.
        inner: positions from one head to the next.
    """

    axis: int
    inner: int

    def stays(self, extent: int, heads: int, kept: np.ndarray) -> np.ndarray:
        """For every position of the axis (extent,) whether its head is among the `kept` of `heads`."""
        return np.isin(np.arange(extent) // self.inner % heads, kept)


@dataclass(frozen=True)
class HeadRegion:
    """Everything that handles all heads between the layers.

    Attributes:
        nodes: positions of the nodes, in graph order.
        axes: tensor name -> where its heads lie, from the operands that Q, K and V are moved into to the weighted sum.
        operands: (node, position among its inputs) -> where heads lie in what enters there from elsewhere with a value
            for each head: position bias, a scale of each head.
    """

    nodes: tuple[int, ...]
    axes: dict[str, HeadAxis]
    operands: dict[tuple[int, int], HeadAxis]
