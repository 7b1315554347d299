"""Where samples come from: image folders, .npy and .npz files, Python callables, behind one interface."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toast_onnx.errors import ConfigError, DataError, one_line
from toast_onnx.planning.settings import names_code
from toast_onnx_calibration.executing import divided
from toast_onnx_calibration.images import ReadReport, choose, find_images, read_images
from toast_onnx_calibration.npy import check_npy, read_npz_arrays, refused
from toast_onnx_calibration.recipes import Recipe, adapt
from toast_onnx_calibration.sessions import ModelInput

Arrays = dict[str, NDArray[Any]]
LABELS_KEY = "labels"
IMAGES_KEY = "images"
_TENSOR_ROWS = 16  # rows handed on at a time where they need no work


@dataclass(frozen=True)
class Chunk:
    """A few samples: arrays by input name, all with n rows, and the n samples' names (a file, or a row's number)."""

    arrays: Arrays
    rows: tuple[str, ...]


class Source(Protocol):
    """Samples that can be gone through more than once, each time in the same order.

    Attributes:
        description: One line for people.
        count: Number of samples, corrupt ones included; None where it is not known beforehand.
        fingerprint: SHA-256 of what the samples are made from: file names and sizes, or the arrays' bytes.
        recipe: What images were put through, None where no image was.
        report: What the latest pass met, None where nothing can be skipped.
    """

    @property
    def description(self) -> str: ...
    @property
    def count(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def recipe(self) -> Recipe | None: ...
    @property
    def report(self) -> ReadReport | None: ...
    def part(self, start: int, stop: int) -> Source:
        """The samples from `start` up to `stop`; a ConfigError where they cannot be counted."""

    def __iter__(self) -> Iterator[Chunk]: ...


class ImageSource:
    """Images of a folder, or one image file."""

    def __init__(self, root: Path, names: Sequence[str], input_name: str, recipe: Recipe, threads: int | None) -> None:
        self.recipe: Recipe = recipe
        self.report: ReadReport = ReadReport(total=len(names))
        self.count: int = len(names)
        self.description = f"{len(names)} images of {root}" if root.is_dir() else str(root)
        self._root, self._names, self._input, self._threads = root, list(names), input_name, threads

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the relative names and sizes of the chosen files."""
        folder = self._root if self._root.is_dir() else self._root.parent
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(f"{name}\0{(folder / name).stat().st_size}\n".encode())
        return digest.hexdigest()

    def part(self, start: int, stop: int) -> ImageSource:
        """The images from `start` up to `stop`; as many of them may be corrupt as of all."""
        part = ImageSource(self._root, self._names[start:stop], self._input, self.recipe, self._threads)
        part.report.whole = self.report.whole or self.count
        return part

    def __iter__(self) -> Iterator[Chunk]:
        for name, tensor in read_images(self._root, self._names, self.recipe, self.report, self._threads):
            yield Chunk({self._input: tensor[None]}, (name,))


class ArraySource:
    """Arrays held in memory or mapped from a file, one per input, samples along the first axis."""

    report: ReadReport | None = None

    def __init__(
        self, description: str, arrays: Arrays, rows: Sequence[int], inputs: Sequence[ModelInput], recipe: Recipe | None
    ) -> None:
        self.description = f"{len(rows)} samples of {description}"
        self.count: int = len(rows)
        self._name, self._inputs, self._recipe = description, inputs, recipe
        self._arrays, self._rows = arrays, list(rows)
        self._prepare = _Preparation(inputs, recipe)
        self.recipe: Recipe | None = self._prepare.recipe_for(arrays)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the chosen rows: their numbers, and each array's name, type, shape and bytes."""
        digest = hashlib.sha256(np.asarray(self._rows, "<i8").tobytes())
        for row in self._rows:
            _update(digest, {name: array[row] for name, array in self._arrays.items()})
        return digest.hexdigest()

    def part(self, start: int, stop: int) -> ArraySource:
        """The rows from `start` up to `stop`."""
        return ArraySource(self._name, self._arrays, self._rows[start:stop], self._inputs, self._recipe)

    def __iter__(self) -> Iterator[Chunk]:
        step = 1 if self.recipe else _TENSOR_ROWS
        for start in range(0, len(self._rows), step):
            rows = self._rows[start : start + step]
            picked = {name: array[rows] for name, array in self._arrays.items()}
            yield Chunk(self._prepare(picked), tuple(map(str, rows)))


class CallableSource:
    """What a Python function yields: arrays for a model with one input, or mappings of input name to array."""

    report: ReadReport | None = None

    def __init__(
        self, name: str, function: Callable[[], Iterable[Any]], samples: int | None, inputs: Sequence[ModelInput],
        recipe: Recipe | None,
    ) -> None:  # fmt: skip
        self.description = f"the function {name}"
        self.count: int | None = samples  # at most; the function may yield fewer
        self.recipe: Recipe | None = None
        self._name, self._function, self._samples, self._inputs = name, function, samples, inputs
        self._prepare = _Preparation(inputs, recipe)
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the arrays it yields: of the latest whole pass, or of one made now."""
        if self._fingerprint is None:
            for _ in self:
                pass
        return self._fingerprint or ""

    def part(self, start: int, stop: int) -> Source:
        """Nothing: what a function yields is not known before it ran.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self._name}: the samples of a function cannot be divided; give a folder or a .npz file")

    def __iter__(self) -> Iterator[Chunk]:
        digest = hashlib.sha256()
        done = 0
        for item in self._items():
            arrays = _by_input(item, self._inputs, f"{self._name} yielded")
            rows = _common_length(arrays, f"{self._name} yielded")
            if self._samples is not None:
                rows = min(rows, self._samples - done)
                arrays = {name: array[:rows] for name, array in arrays.items()}
            if rows:
                _update(digest, arrays)
                self.recipe = self._prepare.recipe_for(arrays)
                yield Chunk(self._prepare(arrays), tuple(str(done + i) for i in range(rows)))
            done += rows
            if done == self._samples:
                break
        if not done:
            raise DataError(f"{self._name} yielded no samples")
        self._fingerprint = digest.hexdigest()

    def _items(self) -> Iterator[Any]:
        try:
            yield from self._function()
        except Exception as error:  # somebody else's code
            raise DataError(f"{self._name} failed with {type(error).__name__}: {one_line(error)}") from error


class Drawn(TypedDict, total=False):
    """Which samples are taken, and how they are read: options of `open_source`, for those who pass them on."""

    samples: int | None
    seed: int
    threads: int | None
    only: Collection[str] | None
    hold: int
    held: bool


def open_source(
    spec: str | Path,
    inputs: Sequence[ModelInput],
    recipe: Recipe | None,
    *,
    samples: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    only: Collection[str] | None = None,
    hold: int = 0,
    held: bool = False,
) -> Source:
    """Opens calibration or evaluation data for a model.

    Args:
        spec: A folder of images or one image; a `.npy` file (the model's only input); a `.npz` file with an array per
            input, or a single `images`; or `module:function`, called without arguments, that returns an iterable of
            arrays or of mappings, samples along the first axis. An array of uint8 images ((N, H, W, C), (N, H, W) or
            (N, C, H, W)) for a float input goes through the recipe; every other array is taken as a ready tensor.
        inputs: What the model needs (`sessions.model_inputs`).
        recipe: For images; adapted to the model's input here.
        samples: How many samples to take: drawn by `seed` from a folder or file, the first ones from a callable.
        seed: For that draw.
        threads: For decoding images.
        only: Take only the samples of these names (relative file paths, or row numbers as strings).
        hold: From 2 on, one of so many samples is held back, as `images.choose` does it.
        held: Take those that are held back, not the others.

    Raises:
        DataError: Missing, unreadable or unfitting data.
        ConfigError: Images without a recipe, a `module:function` that cannot be imported, or one of whose samples some
            are to be held back.
    """
    if not inputs:
        raise DataError("the model has no inputs to feed data to")
    if is_callable(spec):
        if hold > 1:
            raise ConfigError(f"{spec}: no samples of a function can be held back; give a folder or a .npz file")
        return CallableSource(str(spec), load_callable(str(spec)), samples, inputs, recipe)
    path = Path(spec)
    suffix = path.suffix.lower()
    if _exists(path) and path.is_file() and suffix in (".npy", ".npz"):
        arrays = load_npy(path, inputs) if suffix == ".npy" else load_npz(path, inputs)
        total = _common_length(arrays, f"{path}:")
        allowed = [i for i in range(total) if only is None or str(i) in only]
        if not allowed:
            raise DataError(f"{path}: no samples in it" + (" that have a label" if total else ""))
        rows = [allowed[i] for i in choose(len(allowed), samples, seed, hold, held=held)]
        return ArraySource(str(path), arrays, rows, inputs, recipe)
    names = [name for name in find_images(path) if only is None or name in only]
    if not names:
        raise DataError(f"{path}: none of its images has a label")
    if len(inputs) > 1:
        raise DataError(
            f"{path}: images feed one input, but the model has {_listed([i.name for i in inputs])}: "
            "give a .npz file with an array for each"
        )
    if recipe is None:
        raise ConfigError(f"{path}: images need preprocessing: give a recipe's name or file")
    picked = [names[i] for i in choose(len(names), samples, seed, hold, held=held)]
    return ImageSource(path, picked, inputs[0].name, adapt(recipe, inputs[0].shape), threads)


def count_samples(spec: str | Path) -> int | None:
    """How many samples data hold; None where that is not known beforehand.

    Raises:
        DataError: Missing or unreadable data.
    """
    if is_callable(spec):
        return None
    path = Path(spec)
    if _exists(path) and path.is_file() and path.suffix.lower() in (".npy", ".npz"):
        if path.suffix.lower() == ".npz":
            arrays = read_npz_arrays(path)
            return max((len(a) for a in arrays.values() if a.ndim), default=0)
        check_npy(path)
        with refused(path):
            return int(np.load(path, mmap_mode="r", allow_pickle=False).shape[0])
    return len(find_images(path))


def shares_of(source: Source, batch: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of parts of some samples in whole batches, as `executing.divided`.

    Raises:
        ConfigError: they cannot be counted.
    """
    counted = source.part(0, 0) if source.count is None else source  # which says why
    return divided(counted.count or 0, batch, parts)


def is_callable(spec: str | Path) -> bool:
    """Whether a data specification means `module:function`."""
    return isinstance(spec, str) and names_code(spec) and not _exists(Path(spec))


def _exists(path: Path) -> bool:
    """Whether there is such a file or folder.

    Raises:
        DataError: nothing can have this name, or it may not be looked for.
    """
    try:
        return path.exists()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give another name") from error


def load_callable(spec: str) -> Callable[..., Any]:
    """Imports `module:function`; the working directory is searched first, as `python -m` does.

    Raises:
        ConfigError: The module cannot be imported or has no such function.
    """
    module_name, _, function_name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ConfigError(f"the module '{module_name}' has no '{function_name}'") from error
    except Exception as error:  # a module runs code when imported
        raise ConfigError(f"cannot import '{module_name}': {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"{spec} is not a function")
    function: Callable[..., Any] = found
    return function


def load_npy(path: Path, inputs: Sequence[ModelInput]) -> Arrays:
    """The one array of a .npy file, for the one input of a model; mapped, not read.

    Raises:
        DataError: Truncated, pickled, or the model has more inputs.
    """
    check_npy(path)
    with refused(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    return _by_input(array, inputs, f"{path}: holds")


def load_npz(path: Path, inputs: Sequence[ModelInput]) -> Arrays:
    """The arrays of a .npz file by input name; `labels` is left out, a single other array may have any name.

    Raises:
        DataError: Truncated, pickled, or names that do not match the model's inputs.
    """
    arrays = read_npz_arrays(path)
    arrays.pop(LABELS_KEY, None) if LABELS_KEY not in {i.name for i in inputs} else None
    if len(inputs) == 1 and inputs[0].name not in arrays:
        if IMAGES_KEY in arrays:
            return {inputs[0].name: arrays[IMAGES_KEY]}
        if len(arrays) == 1:
            return {inputs[0].name: next(iter(arrays.values()))}
    return _by_input(arrays, inputs, f"{path}: holds")


class _Preparation:
    """Puts uint8 images for float inputs through the recipe and leaves every other array alone."""

    def __init__(self, inputs: Sequence[ModelInput], recipe: Recipe | None) -> None:
        self._inputs = {i.name: i for i in inputs}
        self._recipe = recipe

    def recipe_for(self, arrays: Mapping[str, NDArray[Any]]) -> Recipe | None:
        """The adapted recipe where one of the arrays needs it."""
        for name, array in arrays.items():
            wanted = self._inputs[name]
            if array.dtype == np.uint8 and wanted.dtype.kind == "f" and len(wanted.shape) == 4:
                if array.ndim not in (3, 4):
                    raise DataError(f"'{name}' holds uint8 values of shape {array.shape}: images are (N, H, W, 3)")
                if self._recipe is None:
                    raise ConfigError(f"'{name}' holds uint8 images: give a recipe's name or file")
                return adapt(self._recipe, wanted.shape)
        return None

    def __call__(self, arrays: Arrays) -> Arrays:
        done = {}
        for name, array in arrays.items():
            recipe = self.recipe_for({name: array})
            done[name] = np.stack([recipe.apply(to_image(row)) for row in array]) if recipe else array
        return done


def to_image(row: NDArray[np.uint8]) -> Image.Image:
    """One row of a uint8 array: (H, W), (H, W, C) or (C, H, W) with C 1 or 3."""
    if row.ndim == 3 and row.shape[2] not in (1, 3) and row.shape[0] in (1, 3):
        row = row.transpose(1, 2, 0)
    if row.ndim == 3 and row.shape[2] == 1:
        row = row[:, :, 0]
    if row.ndim == 3 and row.shape[2] != 3:
        raise DataError(f"a uint8 image of shape {row.shape} has neither 1 nor 3 channels")
    return Image.fromarray(np.ascontiguousarray(row))


def _update(digest: Any, arrays: Arrays) -> None:
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\n".encode())
        digest.update(array.tobytes())


def _by_input(item: Any, inputs: Sequence[ModelInput], where: str) -> Arrays:
    """Arrays by input name from a mapping or, for a model with one input, from one array."""
    names = [i.name for i in inputs]
    if not isinstance(item, Mapping):
        if len(names) > 1:
            raise DataError(f"{where} one array, but the model has {len(names)} inputs: {_listed(names)}")
        item = {names[0]: item}
    missing, extra = [n for n in names if n not in item], [n for n in item if n not in names]
    if missing:
        held = f" (it has {_listed(list(item))})" if item else ""
        raise DataError(f"{where} no array for the model's input {_listed(missing)}{held}")
    if extra:
        raise DataError(f"{where} {_listed(extra)}, but the model's inputs are {_listed(names)}")
    return {name: np.asanyarray(item[name]) for name in names}


def _common_length(arrays: Arrays, where: str) -> int:
    lengths = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
    if None in lengths.values():
        raise DataError(f"{where} a single number for {_listed([n for n, c in lengths.items() if c is None])}")
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise DataError(f"{where} arrays with different numbers of samples: {counts}")
    return next(iter(lengths.values())) or 0


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(f"'{name}'" for name in names)
