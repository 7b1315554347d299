"""Image folders: which files, in which order, and reading them ahead on threads."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from toast_onnx.errors import DataError
from toast_onnx.files import check_text, regular_file
from toast_onnx_calibration.recipes import Recipe, check_pixels

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
# What may hide behind these names: data sets contain PNG and GIF files called .jpeg. Never EPS, which starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_CORRUPT = 0.05


@dataclass
class ReadReport:
    """What one pass over a folder met.

    Attributes:
        total: Number of images asked for.
        read: Number decoded so far.
        corrupt: (file, reason) of each that could not be decoded.
        whole: number of images of which these are a part; 0 where they are all.
    """

    total: int = 0
    read: int = 0
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    whole: int = 0

    def notes(self) -> tuple[str, ...]:
        """One sentence where files were skipped, nothing otherwise."""
        if not self.corrupt:
            return ()
        names = ", ".join(name for name, _ in self.corrupt[:5]) + (", ..." if len(self.corrupt) > 5 else "")
        return (f"{len(self.corrupt)} of {self.total} images cannot be read and were skipped: {names}",)


class CorruptImage(Exception):
    """One file cannot be decoded; the reader counts it and goes on."""


def find_images(root: str | Path) -> list[str]:
    """The images under a folder at any depth, as sorted relative paths with forward slashes; a file is itself.

    Hidden files and folders are left out; linked folders are followed once.

    Raises:
        DataError: Nothing there, not an image, a folder without images, or a name that is not text.
    """
    root = Path(root)
    if root.is_file():
        if root.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{root}: not an image; give a folder of images, a .npy or .npz file, or module:function")
        return [root.name]
    if not root.is_dir():
        raise DataError(f"{root}: no such file or folder")
    names, others = [], Counter[str]()
    for path in _walk(root):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            names.append(path.relative_to(root).as_posix())
            check_text(names[-1], DataError)
        else:
            others[path.suffix.lower() or "(no suffix)"] += 1
    if not names:
        found = f"; it holds {', '.join(name for name, _ in others.most_common(5))}" if others else "; it is empty"
        raise DataError(f"{root}: no JPEG, PNG, WebP or BMP image at any depth{found}")
    return sorted(names)


def choose(count: int, samples: int | None, seed: int, hold: int = 0, *, held: bool = False) -> list[int]:
    """Which of `count` to take: all in order, or `samples` drawn without replacement by seed, in ascending order.

    Args:
        count: how many there are.
        samples: how many to draw; None takes all.
        seed: of the draw.
        hold: from 2 on, one sample is held back for every so many: drawn from those that are left where there are
            enough, else every so many-th of the drawn ones, which are then taken out.
        held: take the samples that are held back, not the others.
    """
    if hold > 1:
        drawn_all = choose(count, samples, seed)
        left, wanted = sorted({*range(count)} - {*drawn_all}), max(1, len(drawn_all) // hold)
        enough = len(left) >= wanted
        back = [left[i] for i in choose(len(left), wanted, seed)] if enough else drawn_all[hold - 1 :: hold]
        return back if held else sorted({*drawn_all} - {*back})
    if samples is not None and samples < 1:
        raise DataError(f"samples must be at least 1, not {samples}")
    if samples is None or samples >= count:
        return list(range(count))
    drawn = np.random.default_rng(seed).choice(count, samples, replace=False)
    return [int(i) for i in np.sort(drawn)]


def decode(path: Path) -> Image.Image:
    """Reads one image whole, turned upright by its EXIF orientation; the first frame of an animation.

    Raises:
        CorruptImage: With the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF blocks and odd metadata, which change no pixel
            regular_file(path, DataError, "it is no image", remember=False)
            with Image.open(path, formats=_FORMATS) as image:
                check_pixels(image.height, image.width, "of")
                image.load()
                return _upright(image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = str(error).replace(str(path), path.name) or type(error).__name__
        raise CorruptImage(reason) from error


def read_images(
    root: str | Path, names: Sequence[str], recipe: Recipe, report: ReadReport, threads: int | None = None
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields (name, tensor) in the order of `names`, whatever the number of threads, a few images ahead.

    Args:
        root: The folder (or the one file).
        names: As `find_images` gives them.
        recipe: Makes the tensors, (C, H, W) or (H, W, C).
        report: Filled as the reading goes on.
        threads: Decoding threads; None takes one a core, at most 8. Pillow decodes and resizes without Python's lock.

    Raises:
        DataError: More than 5 % of the images are corrupt; raised as soon as that is certain.
    """
    root = Path(root)
    folder = root if root.is_dir() else root.parent
    threads = threads or min(8, os.cpu_count() or 1)
    report.total, report.read, report.corrupt = len(names), 0, []

    def work(name: str) -> NDArray[Any] | CorruptImage:
        try:
            return recipe.apply(decode(folder / name))
        except CorruptImage as error:
            return error
        except DataError as error:  # it would become too large
            return CorruptImage(str(error))

    waiting: deque[tuple[str, Future[NDArray[Any] | CorruptImage]]] = deque()
    upcoming = iter(names)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-images")
    try:
        waiting.extend((name, pool.submit(work, name)) for name in islice(upcoming, 4 * threads))
        while waiting:
            name, future = waiting.popleft()
            result = future.result()
            waiting.extend((following, pool.submit(work, following)) for following in islice(upcoming, 1))
            if isinstance(result, CorruptImage):
                _count_corrupt(report, root, name, result)
            else:
                report.read += 1
                yield name, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _count_corrupt(report: ReadReport, root: Path, name: str, error: CorruptImage) -> None:
    report.corrupt.append((name, str(error)))
    total = report.whole or report.total
    if len(report.corrupt) > MAX_CORRUPT * total:
        first_name, reason = report.corrupt[0]
        raise DataError(
            f"{root}: more than {MAX_CORRUPT:.0%} of {total} images cannot be read, "
            f"the first is {first_name} ({reason}): repair or remove them"
        ) from error


def _walk(root: Path) -> Iterator[Path]:
    seen = {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image.copy()
