"""Samples by number for training: image folders, arrays and callables, read in any order, augmented on request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError, DataError
from toast_onnx_calibration.augment import Augmentation
from toast_onnx_calibration.images import CorruptImage, choose, decode, find_images
from toast_onnx_calibration.labels import Labels
from toast_onnx_calibration.recipes import Recipe, adapt
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import is_callable, load_npy, load_npz, open_source, to_image

Arrays = dict[str, NDArray[Any]]


class NumberedSamples(Protocol):
    """What `open_samples` gives; satisfies `toast_onnx.finetune.samples.Samples`.

    Attributes:
        description: one line for people.
        fingerprint: SHA-256 of what the samples are made from.
        recipe: what images go through, None for ready tensors.
    """

    description: str
    recipe: Recipe | None

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def read(self, index: int, rng: np.random.Generator | None) -> Arrays: ...
    def label(self, index: int) -> int | None: ...


class FolderSamples:
    """Images of a folder, decoded when they are read."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        wanted: ModelInput,
        recipe: Recipe,
        change: Augmentation,
        labels: Labels | None,
    ) -> None:
        self.recipe: Recipe | None = recipe
        self.description = f"{len(names)} images of {root}"
        self._root, self._names, self._input, self._fixed = root, list(names), wanted, recipe
        self._change, self._labels = change, labels

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names and sizes of the files."""
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(f"{name}\0{(self._root / name).stat().st_size}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int, rng: np.random.Generator | None) -> Arrays:
        """One image as the model's input, augmented by `rng`, plain where that is None.

        Raises:
            DataError: the file cannot be decoded.
        """
        try:
            image = decode(self._root / self._names[index])
        except CorruptImage as error:
            raise DataError(
                f"{self._root / self._names[index]} cannot be read ({error}): repair or remove it"
            ) from error
        tensor = self._fixed.apply(image) if rng is None else self._change.apply(image, self._fixed, rng)
        return {self._input.name: tensor.astype(self._input.dtype, copy=False)}

    def label(self, index: int) -> int | None:
        """Class number of an image."""
        return None if self._labels is None else self._labels.by_row[self._names[index]]


class ArraySamples:
    """Arrays in memory, samples along the first axis; uint8 images go through the recipe."""

    def __init__(
        self,
        description: str,
        arrays: Mapping[str, NDArray[Any]],
        rows: Sequence[int],
        inputs: Sequence[ModelInput],
        recipe: Recipe | None,
        change: Augmentation,
        labels: Labels | None,
    ) -> None:
        self.description = f"{len(rows)} samples of {description}"
        self._arrays, self._rows, self._inputs = dict(arrays), list(rows), {i.name: i for i in inputs}
        self._change, self._labels = change, labels
        self.recipe: Recipe | None = None
        for name, array in self._arrays.items():
            wanted = self._inputs[name]
            if array.dtype == np.uint8 and wanted.dtype.kind == "f" and len(wanted.shape) == 4:
                if recipe is None:
                    raise ConfigError(f"'{name}' holds uint8 images: give a recipe's name or file")
                self.recipe = adapt(recipe, wanted.shape)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the chosen rows."""
        digest = hashlib.sha256(np.asarray(self._rows, "<i8").tobytes())
        for name in sorted(self._arrays):
            for row in self._rows:
                digest.update(np.ascontiguousarray(self._arrays[name][row]).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int, rng: np.random.Generator | None) -> Arrays:
        """One sample by input name; images are augmented by `rng`, ready tensors never."""
        row, sample = self._rows[index], {}
        for name, array in self._arrays.items():
            wanted = self._inputs[name]
            value: NDArray[Any] = np.asarray(array[row])
            if self.recipe is not None and array.dtype == np.uint8 and len(wanted.shape) == 4:
                image = to_image(value)
                value = self.recipe.apply(image) if rng is None else self._change.apply(image, self.recipe, rng)
            sample[name] = value.astype(wanted.dtype, copy=False)
        return sample

    def label(self, index: int) -> int | None:
        """Class number of a row."""
        return None if self._labels is None else self._labels.by_row[str(self._rows[index])]


def open_samples(
    spec: str | Path,
    inputs: Sequence[ModelInput],
    recipe: Recipe | None,
    *,
    change: Augmentation,
    labels: Labels | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> NumberedSamples:
    """Opens training data for a model.

    Args:
        spec: As for `sources.open_source`; what a callable yields is kept in memory.
        inputs: What the model needs.
        recipe: For images; adapted to the model's input here.
        change: Augmentation of training images.
        labels: Class numbers; samples without one are left out.
        samples: How many to draw by `seed`; None takes all.
        seed: For that draw.

    Raises:
        DataError: Missing, unreadable or unfitting data, or fewer than two samples.
        ConfigError: Images without a recipe.
    """
    found = _open(spec, inputs, recipe, change, labels, samples, seed)
    if len(found) < 2:
        raise DataError(f"{spec}: training needs at least two samples, one of them to evaluate on")
    _check_fits(found.read(0, None), inputs, found.description)
    return found


def _open(
    spec: str | Path,
    inputs: Sequence[ModelInput],
    recipe: Recipe | None,
    change: Augmentation,
    labels: Labels | None,
    samples: int | None,
    seed: int,
) -> NumberedSamples:
    path = Path(spec)
    if is_callable(spec):
        chunks = [chunk.arrays for chunk in open_source(spec, inputs, recipe, samples=samples)]
        arrays = {i.name: np.concatenate([c[i.name] for c in chunks]) for i in inputs}
        rows = range(len(next(iter(arrays.values()))))
        return ArraySamples(f"the function {spec}", arrays, rows, inputs, recipe, change, labels)
    if path.is_file() and path.suffix.lower() in (".npy", ".npz"):
        arrays = load_npy(path, inputs) if path.suffix.lower() == ".npy" else load_npz(path, inputs)
        lengths = {len(a) for a in arrays.values()}
        if len(lengths) != 1:
            raise DataError(f"{path}: arrays with different numbers of samples: {', '.join(map(str, sorted(lengths)))}")
        allowed = [i for i in range(lengths.pop()) if labels is None or str(i) in labels.by_row]
        rows_ = [allowed[i] for i in choose(len(allowed), samples, seed)]
        return ArraySamples(str(path), arrays, rows_, inputs, recipe, change, labels)
    names = [n for n in find_images(path) if labels is None or n in labels.by_row]
    if len(inputs) > 1:
        raise DataError(
            f"{path}: images feed one input, the model has {len(inputs)}: give a .npz file with an array for each"
        )
    if recipe is None:
        raise ConfigError(f"{path}: images need preprocessing: give a recipe's name or file")
    picked = [names[i] for i in choose(len(names), samples, seed)]
    root = path if path.is_dir() else path.parent
    return FolderSamples(root, picked, inputs[0], adapt(recipe, inputs[0].shape), change, labels)


def _check_fits(sample: Arrays, inputs: Sequence[ModelInput], where: str) -> None:
    for wanted in inputs:
        have = sample[wanted.name].shape
        want = wanted.shape[1:]
        if len(have) != len(want) or any(isinstance(w, int) and w != h for h, w in zip(have, want, strict=True)):
            raise DataError(f"{where}: a sample for '{wanted.name}' has shape {have}, but the model takes {want}")
