"""Batches that a model accepts: its batch size, its types, its shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import DataError
from toast_onnx_calibration.recipes import Dim, show
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import Chunk, Source


@dataclass(frozen=True)
class Batch:
    """What one call of the model is fed.

    Attributes:
        feeds: Arrays by input name, (valid + padding, ...).
        rows: Names of the valid samples, in order; they come first.
        padding: How many rows at the end repeat the last sample, only to fill a fixed batch: ignore their results.
    """

    feeds: dict[str, NDArray[Any]]
    rows: tuple[str, ...]
    padding: int = 0

    @property
    def valid(self) -> int:
        """Number of samples that count."""
        return len(self.rows)

    def trim(self, array: NDArray[Any]) -> NDArray[Any]:
        """An output without the padding's rows; one that has no batch axis is returned as it is."""
        if not self.padding or array.ndim == 0 or array.shape[0] != self.valid + self.padding:
            return array
        return array[: self.valid]


def batch_size(inputs: Sequence[ModelInput], wanted: int) -> int:
    """The model's fixed batch size, or `wanted` where it is free.

    Raises:
        DataError: An input has no batch axis, or the inputs' fixed ones differ.
    """
    if wanted < 1:
        raise DataError(f"a batch needs at least one sample, not {wanted}")
    fixed: dict[str, int] = {}
    for each in inputs:
        if not each.shape:
            raise DataError(f"the model's input '{each.name}' is a single number, without a batch axis to feed")
        if isinstance(each.shape[0], int):
            fixed[each.name] = each.shape[0]
    if len(set(fixed.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in fixed.items())
        raise DataError(f"the model's inputs differ in their first dimension ({listed}): it must be the batch in all")
    return next(iter(fixed.values()), wanted)


def batches(source: Source, inputs: Sequence[ModelInput], batch: int = 16) -> Iterator[Batch]:
    """Regroups a source's samples into batches the model accepts, in the source's order.

    With a free batch dimension the last batch may be smaller; with a fixed one it is filled up and says by how many
    rows. `batch` only counts where the dimension is free.

    Raises:
        DataError: Samples whose shape or type does not fit an input (both are named), or that hold NaN or infinity.
    """
    size = batch_size(inputs, batch)
    fixed = any(isinstance(each.shape[0], int) for each in inputs)
    for chunk in _regroup((fit(c, inputs, source.description) for c in source), size, source.description):
        missing = size - len(chunk.rows) if fixed else 0
        feeds = {name: _fill(array, missing) for name, array in chunk.arrays.items()}
        yield Batch(feeds, chunk.rows, missing)


def _regroup(chunks: Iterable[Chunk], size: int, where: str) -> Iterator[Chunk]:
    parts: list[Chunk] = []
    held = 0
    for chunk in chunks:
        parts.append(chunk)
        held += len(chunk.rows)
        while held >= size:
            whole, rest = _split(_join(parts, where), size)
            yield whole
            parts, held = ([rest] if rest.rows else []), len(rest.rows)
    if parts:
        yield _join(parts, where)


def _join(parts: Sequence[Chunk], where: str) -> Chunk:
    if len(parts) == 1:
        return parts[0]
    for name, first in parts[0].arrays.items():
        for part in parts[1:]:
            if part.arrays[name].shape[1:] != first.shape[1:]:
                raise DataError(
                    f"{where}: samples of different sizes, {show(first.shape[1:])} ({parts[0].rows[0]}) and "
                    f"{show(part.arrays[name].shape[1:])} ({part.rows[0]}): give a recipe with a fixed size, or batch 1"
                )
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    return Chunk(arrays, tuple(row for part in parts for row in part.rows))


def _split(chunk: Chunk, size: int) -> tuple[Chunk, Chunk]:
    head = {name: array[:size] for name, array in chunk.arrays.items()}
    tail = {name: array[size:] for name, array in chunk.arrays.items()}
    return Chunk(head, chunk.rows[:size]), Chunk(tail, chunk.rows[size:])


def fit(chunk: Chunk, inputs: Sequence[ModelInput], where: str) -> Chunk:
    """Samples in the types that a model takes.

    Args:
        chunk: the samples.
        inputs: of the model.
        where: what they come from, for messages.

    Raises:
        DataError: their shape or type does not fit an input, or they hold NaN or infinity.
    """
    arrays = {}
    for each in inputs:
        array = chunk.arrays[each.name]
        if not _shape_fits(array.shape[1:], each.shape[1:]):
            raise DataError(
                f"{where}: samples for '{each.name}' have shape {show(array.shape[1:])}, but the model takes "
                f"{show(each.shape[1:])} behind the batch"
            )
        arrays[each.name] = _convert(array, each, chunk.rows, where)
    return Chunk(arrays, chunk.rows)


def _shape_fits(have: Sequence[int], want: Sequence[Dim]) -> bool:
    if len(have) != len(want):
        return False
    return all(not isinstance(w, int) or w == h for h, w in zip(have, want, strict=True))


def _convert(array: NDArray[Any], wanted: ModelInput, rows: tuple[str, ...], where: str) -> NDArray[Any]:
    kinds = "biuf" if wanted.dtype.kind == "f" else "biu"
    if array.dtype.kind not in kinds:
        raw = "; for raw pixels give a recipe with dtype uint8, scale 1 and std 1" if wanted.dtype == np.uint8 else ""
        raise DataError(f"{where}: '{wanted.name}' takes {wanted.dtype}, but the samples are {array.dtype}{raw}")
    with np.errstate(over="ignore"):  # an overflow becomes infinite and is reported below
        converted: NDArray[Any] = array.astype(wanted.dtype, copy=False)
    if wanted.dtype.kind == "f":
        finite = np.isfinite(converted).reshape(len(converted), -1).all(axis=1)
        if not finite.all():
            raise DataError(f"{where}: sample {rows[int(np.argmin(finite))]} has NaN or infinite {wanted.dtype} values")
    elif wanted.dtype != np.bool_ and not np.array_equal(converted, array):
        raise DataError(f"{where}: '{wanted.name}' holds values that {wanted.dtype} cannot represent")
    return converted


def _fill(array: NDArray[Any], missing: int) -> NDArray[Any]:
    """Repeats the last row `missing` times."""
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array
