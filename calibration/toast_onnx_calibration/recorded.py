"""Outputs of the dense model's blocks, kept while statistics are measured for those who need them afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.matching.span import span_of
from toast_onnx.matching.study import Study
from toast_onnx_calibration.room import sample_bytes

Array = NDArray[Any]

#: Bytes of outputs above which none are kept: they may lie in memory, where that is what temporary files are.
LIMIT = 1 << 30


class Recording:
    """What blocks give for every sample, in files.

    Attributes:
        tensors: what is to be given to `add`.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        """Nothing is kept yet.

        Args:
            study: the dense model.
            folder: for files.
        """
        self._study, self._folder = study, folder
        self.tensors: tuple[str, ...] = ()
        self._count = 0
        self._rows: list[str] = []
        self._kept: dict[str, Array] = {}

    def begin(self, count: int | None) -> tuple[str, ...]:
        """Choose what is kept of so many samples at most; nothing where that is too much.

        Args:
            count: None where nobody knows.
        """
        self._rows, self._kept, self.tensors = [], {}, ()
        if count is not None:
            ends = self._ends()
            if count * sample_bytes(self._study, ends) <= LIMIT:
                self.tensors, self._count = tuple(ends), count
        return self.tensors

    def add(self, rows: tuple[str, ...], found: Mapping[str, Array]) -> None:
        """Keep what a run gave; it may have repeated the last sample to fill a batch.

        Args:
            rows: names of the samples.
            found: tensor -> (samples, ...).
        """
        start, self._rows = len(self._rows), [*self._rows, *rows]
        for number, name in enumerate(self.tensors):
            array = found[name]
            if name not in self._kept:
                path, shape = self._folder / f"block-{number}.npy", (self._count, *array.shape[1:])
                self._kept[name] = np.lib.format.open_memmap(path, "w+", array.dtype, shape)
            self._kept[name][start : len(self._rows)] = array[: len(rows)]

    def of(self, rows: tuple[str, ...], batch: int) -> dict[str, Array]:
        """What was kept of just these samples: tensor -> (batches, *shape of one batch); nothing where others ran.

        Args:
            rows: names of the samples, whole batches of them.
            batch: samples a batch.
        """
        if not rows or tuple(self._rows[: len(rows)]) != rows:
            return {}
        return {name: array[: len(rows)].reshape(-1, batch, *array.shape[1:]) for name, array in self._kept.items()}

    def _ends(self) -> list[str]:
        """Outputs of blocks with the batch in front, in single precision as what goes from block to block is."""
        study = self._study
        if not study.dynamic_batch:
            return []
        spans = (span_of(study.view, study.facts, block) for block in study.match.blocks)
        ends = dict.fromkeys(span.end for span in spans if span is not None)
        return [
            name
            for name in ends
            if study.facts.elem_type(name) == onnx.TensorProto.FLOAT
            # of two sizes of the batch one at most is an axis of tokens' own
            and all((facts.shape(name) or ())[:1] == (size,) for facts, size in ((study.facts, 2), (study.other, 3)))
        ]
