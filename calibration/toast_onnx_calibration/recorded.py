"""Outputs of the dense model's blocks, kept while statistics are measured for those who need them afterwards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.matching.span import span_of
from toast_onnx.matching.study import Study
from toast_onnx_calibration.room import spare

Array = NDArray[Any]


class Recording:
    """What blocks give for every sample, in files; nothing where that is too much, or samples differ in size.

    Attributes:
        tensors: what is to be given to `add`.
    """

    def __init__(self, study: Study, blocks: Collection[int], folder: Path) -> None:
        """Nothing is kept yet.

        Args:
            study: the dense model.
            blocks: whose outputs will be asked for.
            folder: for files.
        """
        self._folder, self._ends = folder, _ends(study, blocks)
        self.tensors: tuple[str, ...] = ()
        self._rows: list[str] = []
        self._kept: dict[str, Array] = {}
        self._count, self._fingerprint = 0, ""

    def begin(self, count: int | None) -> tuple[str, ...]:
        """Start to keep what `add` will be given of so many samples at most.

        Args:
            count: None where nobody knows, and nothing is kept.

        Returns:
            `tensors`.
        """
        self.forget()
        if count is not None:
            self.tensors, self._count = self._ends, count
        return self.tensors

    def add(self, rows: tuple[str, ...], found: Mapping[str, Array]) -> None:
        """Keep what a run gave.

        Args:
            rows: names of the samples.
            found: tensor -> (samples, ...).
        """
        arrays = {name: found[name] for name in self.tensors}
        if not self._kept:
            needed = sum(array.nbytes // max(len(array), 1) for array in arrays.values()) * self._count
            if not arrays or not spare(needed, self._folder):
                self.forget()
                return
            for number, (name, array) in enumerate(arrays.items()):
                path, shape = self._folder / f"block-{number}.npy", (self._count, *array.shape[1:])
                self._kept[name] = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        if any(a.shape != (len(rows), *self._kept[n].shape[1:]) or a.dtype != np.float32 for n, a in arrays.items()):
            self.forget()
            return
        start, self._rows = len(self._rows), [*self._rows, *rows]
        for name, array in arrays.items():
            self._kept[name][start : len(self._rows)] = array

    def end(self, fingerprint: str) -> None:
        """Say of which samples it was, by their source's fingerprint: a function may give others the next time."""
        self._fingerprint = fingerprint

    def of(self, rows: tuple[str, ...], batch: int, fingerprint: str) -> dict[str, Array]:
        """What was kept of just these samples: tensor -> (batches, *shape of one batch); nothing where others ran.

        Args:
            rows: names of the samples, whole batches of them.
            batch: samples a batch.
            fingerprint: of their source.
        """
        if not rows or tuple(self._rows[: len(rows)]) != rows or fingerprint != self._fingerprint:
            return {}
        return {name: array[: len(rows)].reshape(-1, batch, *array.shape[1:]) for name, array in self._kept.items()}

    def forget(self) -> None:
        """Keep nothing any more; arrays that `of` gave stay readable as long as somebody holds them."""
        self._rows, self._kept = [], {}
        self.tensors, self._count, self._fingerprint = (), 0, ""
        for path in self._folder.glob("block-*.npy"):
            path.unlink()


def _ends(study: Study, blocks: Collection[int]) -> tuple[str, ...]:
    """Outputs of some blocks with the batch in front."""
    if not study.dynamic_batch:
        return ()
    spans = (span_of(study.view, study.facts, study.match.blocks[index]) for index in sorted(blocks))
    ends = dict.fromkeys(span.end for span in spans if span is not None)
    # an axis of tokens may be as long as one batch, but not as each of two
    sizes = ((study.facts, 2), (study.other, 3))
    return tuple(n for n in ends if all((facts.shape(n) or ())[:1] == (size,) for facts, size in sizes))
