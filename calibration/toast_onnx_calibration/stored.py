"""Samples and activations kept in files, for work that goes through a model block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.matching.study import Study
from toast_onnx.model import Model, write_draft
from toast_onnx.proof.precision import to_float32
from toast_onnx_calibration.calibrating import CalibrationOptions, open_samples
from toast_onnx_calibration.chain import Link, cut
from toast_onnx_calibration.feeds import batch_size, batches
from toast_onnx_calibration.sessions import held_inputs, make_session, model_inputs
from toast_onnx_calibration.sources import Source

if TYPE_CHECKING:
    import onnxruntime as ort

Array = NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """Full batches of samples of one shape, prepared once.

    Attributes:
        feeds: input name -> (batches, *shape of one batch).
        size: samples a batch.
        rows: names of the samples, in order.
        source: where they come from.
        notes: what the user should know.
    """

    feeds: dict[str, Array]
    size: int
    rows: tuple[str, ...]
    source: Source
    notes: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of batches."""
        return len(next(iter(self.feeds.values()), ()))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one batch by input name."""
        return {name: tuple(array.shape[1:]) for name, array in self.feeds.items()}

    def first(self, count: int) -> Samples:
        """The batches of the first so many samples, one batch at least; all where there are no more."""
        batches = min(self.count, max(1, count // self.size))
        feeds = {name: array[:batches] for name, array in self.feeds.items()}
        return replace(self, feeds=feeds, rows=self.rows[: batches * self.size])

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for k in range(self.count):
            yield {name: np.asarray(array[k]) for name, array in self.feeds.items()}


def store_samples(
    study: Study,
    data: str | Path,
    options: CalibrationOptions,
    folder: Path,
    batch: Callable[[int | None], int],
) -> Samples:
    """Prepare samples in batches that a graph cut at fixed shapes can take; where they fill no batch, there is none.

    Args:
        study: the model.
        data: as for `sources.open_source`.
        options: how samples are read.
        folder: for working files.
        batch: number of samples, None where the source does not know it -> batch where the model leaves it free.

    Raises:
        DataError: the data cannot be read.
    """
    inputs = held_inputs(study, model_inputs(whole_session(study.view.model, [], options, folder)))
    source, notes = open_samples(study, data, inputs, options)
    size = batch_size(inputs, batch(source.count))
    feeds: dict[str, Array] = {}
    rows: list[str] = []
    left_out = count = 0
    for each in batches(source, inputs, size):
        if each.valid < size or any(a.shape != feeds[n].shape[1:] for n, a in each.feeds.items() if n in feeds):
            left_out += each.valid  # an incomplete batch, or one of another image size
            continue
        if not feeds:
            most = (source.count or sum(1 for _ in batches(source, inputs, 1))) // size
            for number, (name, array) in enumerate(each.feeds.items()):
                path = folder / f"input-{number}.npy"
                feeds[name] = np.lib.format.open_memmap(path, "w+", array.dtype, (most, *array.shape))
        for name, array in each.feeds.items():
            feeds[name][count] = array
        count += 1
        rows.extend(each.rows)
    notes += source.report.notes() if source.report else ()
    if left_out:
        notes.append(f"{left_out} samples are left out: they fill no batch of {size}, or differ in size")
    return Samples({name: array[:count] for name, array in feeds.items()}, size, tuple(rows), source, tuple(notes))


def store_values(path: Path, values: Iterator[Array], count: int) -> Array:
    """Keep activations in a file; maps of a file that lay there before stay valid.

    Args:
        path: the file, .npy.
        values: one batch after another, all of one shape; they may be read off the old file.
        count: how many batches.

    Returns:
        (count, *shape of one batch), float32.
    """
    first = next(values)
    draft = path.with_name(f"{path.stem}.draft.npy")
    out = np.lib.format.open_memmap(draft, "w+", np.float32, (count, *first.shape))
    for k, batch in enumerate(chain([first], values)):
        out[k] = batch
    draft.replace(path)
    return out


def scratch_rows(path: Path, shape: tuple[int, ...]) -> Array:
    """An array in a file for whatever comes, float32: the one that lies there where its shape fits, which is faster."""
    if 0 in shape:  # no file maps to nothing
        return np.zeros(shape, np.float32)
    if path.exists():
        old: Array = np.load(path, mmap_mode="r+")
        if old.shape == shape:
            return old
    return np.lib.format.open_memmap(path, "w+", np.float32, shape)


def whole_session(
    model: Model, tensors: Sequence[str], options: CalibrationOptions, folder: Path
) -> ort.InferenceSession:
    """A session in float32 of what makes some tensors from the samples; of the whole model where none are named."""
    path = write_draft(to_float32(model), folder, "model.onnx")
    if tensors:  # ONNX Runtime runs every node it is given, whatever is asked for
        proto = onnx.load(path, load_external_data=False)
        cut(proto, Link((), ()), tensors, {})
        onnx.save(proto, path)
    return make_session(path, options.provider, threads=options.threads)


def piece_session(
    piece: onnx.ModelProto, whole: Path, options: CalibrationOptions, draft: Path
) -> ort.InferenceSession:
    """A session in float32 of a piece that `matching.piece.cut_piece` cut out.

    Args:
        piece: its graph.
        whole: the model it was cut from, where its external weights lie.
        options: provider and threads.
        draft: working file.
    """
    path = write_draft(to_float32(Model(piece, whole)), draft.parent, draft.name)
    return make_session(path, options.provider, threads=options.threads)
