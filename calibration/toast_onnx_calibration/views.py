"""Samples, each followed by views in which the model sees other classes (`toast_onnx.finetune.views`).

Views are made in the first pass over the samples and kept in a file for further ones, as long as the process lives.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from toast_onnx.errors import ConfigError
from toast_onnx.finetune.views import Views
from toast_onnx.matching.study import Study
from toast_onnx.model import file_hash
from toast_onnx_calibration.comparing import is_classifier
from toast_onnx_calibration.images import ReadReport
from toast_onnx_calibration.recipes import Recipe
from toast_onnx_calibration.room import check_room
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import Arrays, Chunk, Source

#: Fingerprint of samples and how their views are made -> the file of the views. The latest alone: they are large.
_KEPT: dict[str, Path] = {}


class ViewedSource:
    """Every sample of a source, and behind it some views of it.

    Attributes:
        description: one line for people.
        count: samples and views; None where the source does not know its own.
    """

    def __init__(
        self, source: Source, study: Study, inputs: Sequence[ModelInput], views: int, seed: int, first: int = 0
    ) -> None:
        """See whether views can be made.

        Args:
            source: the samples.
            study: the model.
            inputs: of the model, with the batch that it holds.
            views: of each sample.
            seed: of the order in which classes have their turn.
            first: number of the first sample among all.

        Raises:
            ConfigError: the model has no classes, or takes no floating-point input.
        """
        outputs = [output.name for output in study.view.model.proto.graph.output]
        self._classifiers = [name for name in outputs if is_classifier(study, name)]
        if not self._classifiers:
            raise ConfigError(
                f"views show samples as other classes, and {study.source.path.name} has no output that holds classes "
                f"(it gives {', '.join(outputs)}): leave --views out"
            )
        if not any(each.dtype.kind == "f" for each in inputs):
            raise ConfigError(
                f"views change pixels, and {study.source.path.name} reads whole numbers: leave --views out"
            )
        self._source, self._study, self._inputs = source, study, list(inputs)
        self._views, self._seed, self._first = views, seed, first
        self.description = f"{source.description}, {views} views of each"
        self.count = None if source.count is None else source.count * (1 + views)

    @property
    def recipe(self) -> Recipe | None:
        """What images were put through."""
        return self._source.recipe

    @property
    def report(self) -> ReadReport | None:
        """What the latest pass over the samples met."""
        return self._source.report

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the samples' own, of the model, and of how views are made."""
        made = (self._source.fingerprint, file_hash(self._study.source.path), self._views, self._seed, self._first)
        return hashlib.sha256(repr(made).encode()).hexdigest()

    def part(self, start: int, stop: int) -> ViewedSource:
        """Samples and views from `start` up to `stop`.

        Raises:
            ConfigError: a sample and its views would lie in two parts.
        """
        each = 1 + self._views
        if start % each or stop % each:
            raise ConfigError(
                f"a sample and its {self._views} views cannot be divided: take a --batch that is a multiple of {each}"
            )
        inner = self._source.part(start // each, stop // each)
        return ViewedSource(inner, self._study, self._inputs, self._views, self._seed, self._first + start // each)

    def __iter__(self) -> Iterator[Chunk]:
        key = None if self.count is None else self.fingerprint
        if key in _KEPT:
            with open(_KEPT[key], "rb") as file:
                for sample, row in self._samples():
                    yield from self._chunks(sample, row, {n: np.load(file, allow_pickle=False) for n in sample})
            return
        folder = Path(tempfile.mkdtemp(prefix="toast-views-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path = folder / "views"
        with open(path, "wb") as file:
            yield from self._made(file)
        if key is not None:
            for old in _KEPT.values():
                shutil.rmtree(old.parent, ignore_errors=True)
            _KEPT.clear()
            _KEPT[key] = path

    def _made(self, file: BinaryIO) -> Iterator[Chunk]:
        """Make all views, and write them to a file."""
        held = [each.shape[0] for each in self._inputs if each.shape and isinstance(each.shape[0], int)]
        maker = Views(self._study.view.model, self._classifiers, self._views, held[0] if held else None, self._seed)
        for number, (sample, row) in enumerate(self._samples(), self._first):
            if number == self._first and self.count is not None:
                check_room(sum(array.nbytes for array in sample.values()) * self.count)
            made = maker.of(sample, number)
            for name in sample:
                np.save(file, made[name])
            yield from self._chunks(sample, row, made)

    def _samples(self) -> Iterator[tuple[Arrays, str]]:
        """The samples one by one, in the types that the model takes."""
        types = {each.name: each.dtype for each in self._inputs}
        for chunk in self._source:
            for k, row in enumerate(chunk.rows):
                yield {n: np.asarray(a[k : k + 1], types[n]) for n, a in chunk.arrays.items()}, row

    def _chunks(self, sample: Arrays, row: str, views: Arrays) -> Iterator[Chunk]:
        """A sample, and its views behind it."""
        yield Chunk(sample, (row,))
        yield Chunk(views, tuple(f"{row} (view {k + 1})" for k in range(self._views)))
