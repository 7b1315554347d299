"""Statistics of one block, read once however often they are asked for."""

from __future__ import annotations

from toast_onnx.importance.moments import Moments
from toast_onnx.importance.statistics import Array, Statistics
from toast_onnx.importance.synthetic import AttentionStatistics


class Remembered:
    """Another source's statistics, each kept until this object goes (implements `Statistics`)."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._attention: dict[int, AttentionStatistics] = {}
        self._moments: dict[tuple[str, int], Moments] = {}
        self._metrics: dict[int, Array] = {}

    @property
    def source(self) -> str:
        """Where the statistics come from."""
        return self._statistics.source

    def attention(self, block: int) -> AttentionStatistics:
        """As the source says."""
        if block not in self._attention:
            self._attention[block] = self._statistics.attention(block)
        return self._attention[block]

    def hidden(self, block: int) -> Moments:
        """As the source says."""
        if ("hidden", block) not in self._moments:
            self._moments["hidden", block] = self._statistics.hidden(block)
        return self._moments["hidden", block]

    def inputs(self, block: int) -> Moments:
        """As the source says."""
        if ("inputs", block) not in self._moments:
            self._moments["inputs", block] = self._statistics.inputs(block)
        return self._moments["inputs", block]

    def metric(self, block: int) -> Array:
        """As the source says."""
        if block not in self._metrics:
            self._metrics[block] = self._statistics.metric(block)
        return self._metrics[block]

    def activation_scores(self, block: int, part: str) -> object:
        """As the source says."""
        return self._statistics.activation_scores(block, part)
