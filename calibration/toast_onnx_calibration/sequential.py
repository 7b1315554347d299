"""Statistics taken from the compressed prefix: every block measured behind the blocks pruned before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.importance.statistics import Statistics
from toast_onnx.matching.study import Study
from toast_onnx.solving.weights import BlockWeights
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import Wanted
from toast_onnx_calibration.statistics import CalibratedStatistics

BEHIND = "each block behind the pruned ones before it"


class SequentialStatistics:
    """Measures one block at a time (implements `toast_onnx.pruning.Sequential`).

    Each measurement runs the samples from the model's start to the block, so that all of them take about half as many
    passes as there are blocks. The newest block's statistics file replaces the one before.

    Attributes:
        notes: what the user should know, once measured.
    """

    def __init__(
        self, study: Study, data: str | Path, wanted: Wanted, options: CalibrationOptions, folder: Path
    ) -> None:
        """Prepare to measure; nothing is read yet.

        Args:
            study: the dense model.
            data: as for `sources.open_source`.
            wanted: block number -> parts, as `needs.needed` says.
            options: how to calibrate; views would have to be made anew for every block, and are not.
            folder: where statistics lie while they are in use.
        """
        self._study, self._data, self._wanted, self._options = study, data, wanted, replace(options, views=0)
        self._path = folder / "sequential.npz"
        self._latest: CalibratedStatistics | None = None
        self.notes: tuple[str, ...] = ("sequential statistics are of the samples alone, not of views",) * bool(
            options.views
        )

    @property
    def source(self) -> str:
        """Where the statistics come from."""
        return f"{self._latest.source}, {BEHIND}" if self._latest else "none were needed"

    def to_document(self) -> dict[str, Any]:
        """Plain data for the report."""
        document = self._latest.to_document() if self._latest else {}
        return document | {"source": self.source, "sequential": True}

    def behind(self, block: int, weights: Mapping[int, BlockWeights]) -> Statistics:
        """Statistics of a block in the model with the new weights of the blocks before it.

        Raises:
            ToastError: its children say what is wrong with the data, an option, or the model.
        """
        if block not in self._wanted:  # its solvers read weights alone
            return SyntheticStatistics(self._study, self._options.seed)
        only = {block: self._wanted[block]}
        self.notes += calibrate(self._study, self._data, self._path, only, self._options, behind=weights).notes
        self._latest = CalibratedStatistics(self._study, self._path)
        return self._latest
