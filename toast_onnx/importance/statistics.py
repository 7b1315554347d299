"""What the solvers ask of activation statistics, wherever they come from."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toast_onnx.importance.moments import Moments
from toast_onnx.importance.synthetic import AttentionStatistics

Array = NDArray[np.float64]


class Statistics(Protocol):
    """Second-order statistics of a model's activations, asked for one block at a time.

    Implemented from weights and synthetic tokens (`toast_onnx.choosing.synthetic`) and from images
    (`toast_onnx_calibration`).
    """

    @property
    def source(self) -> str:
        """Where the statistics come from, for the report."""
        ...

    def attention(self, block: int) -> AttentionStatistics:
        """Statistics of queries, keys and concatenated contexts of a block.

        For cosine attention (`Attention.cosine`) the keys' moments are not centred: their lengths count.
        """
        ...

    def hidden(self, block: int) -> Moments:
        """Moments of fc2's input, n = width."""
        ...

    def inputs(self, block: int) -> Moments:
        """Moments of fc1's input (gain and bias of the norm included), n = in_features."""
        ...

    def metric(self, block: int) -> Array:
        """What an error of fc2's output costs: mean of g g^T, (C_out, C_out), g being a gradient of the answers there.

        Raises:
            ConfigError: it needs samples, and there are none.
        """
        ...

    def activation_scores(self, block: int, part: str) -> object:
        """Scores (channels,) of the paper's token channel selection for `part` fc1 or fc2.

        Raises:
            ConfigError: they need images, and there are none.
        """
        ...
