"""Class labels of samples: a CSV file, folder names, or an array beside the tensors."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import DataError
from toast_onnx.files import regular_file
from toast_onnx_calibration.images import find_images
from toast_onnx_calibration.npy import check_npy, read_npz_arrays
from toast_onnx_calibration.sources import LABELS_KEY, is_callable

FOLDERS = "folders"
_CLASS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Labels:
    """Class numbers by sample name (a relative file path, or a row's number), with a line on where they are from.

    Attributes:
        by_row: Class number from 0 for each labelled sample.
        description: Where they come from.
        classes: The folders' names in the order of their numbers, empty for other kinds of label.
        notes: What the user should know, such as labels whose file is missing.
    """

    by_row: Mapping[str, int]
    description: str
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_labels(spec: str | Path | None, data: str | Path) -> Labels:
    """Labels for the samples of `data`.

    Args:
        spec: A CSV file (columns file and label); `folders` (the first folder on the way to an image is its class,
            numbered in sorted order); a .npy file, or a .npz file with an array `labels`; None takes the `labels` of
            the .npz file that `data` is.
        data: As for `open_source`.

    Raises:
        DataError: No labels, or unreadable or unfitting ones.
    """
    if spec is None:
        if Path(data).suffix.lower() != ".npz":
            raise DataError("accuracy needs labels: give a CSV file or the word 'folders', or a metric of your own")
        spec = data
    if str(spec) == FOLDERS:
        return labels_from_folders(find_images(data))
    path = Path(spec)
    if not path.is_file():
        raise DataError(f"{path}: no such labels file (or give the word '{FOLDERS}')")
    if path.suffix.lower() in (".npy", ".npz"):
        return labels_from_array(_read_array(path), str(path))
    if is_callable(data) or Path(data).suffix.lower() in (".npy", ".npz"):
        raise DataError(f"{path}: a CSV file labels image files; tensors take their labels from a .npy or .npz file")
    return labels_from_csv(path, find_images(data))


def labels_from_csv(path: str | Path, names: Sequence[str]) -> Labels:
    """Labels of images from a CSV file with the columns `file` and `label`, or without a header in that order.

    A file is named by its path in the folder, or by its bare name where only one image has it.

    Raises:
        DataError: Unreadable, a label that is no class number, a file labelled twice, or no image labelled at all.
    """
    listed = _read_csv(Path(path))
    bare = Counter(PurePosixPath(name).name for name in names)
    by_row, used = {}, set()
    for name in names:
        short = PurePosixPath(name).name
        key = name if name in listed else short if bare[short] == 1 else None
        if key in listed:
            by_row[name] = listed[key]
            used.add(key)
    if not by_row:
        raise DataError(
            f"{path}: labels none of the images; it names {_short(next(iter(listed)))}, a file here is {names[0]}"
        )
    absent = [key for key in listed if key not in used]
    unlabelled = [name for name in names if name not in by_row]
    notes = []
    if absent:
        notes.append(f"{path} labels {len(absent)} files that are not there, the first is {_short(absent[0])}")
    if unlabelled:
        notes.append(f"{len(unlabelled)} images have no label in {path} and are left out, the first is {unlabelled[0]}")
    return Labels(by_row, str(path), notes=tuple(notes))


def labels_from_folders(names: Sequence[str]) -> Labels:
    """Labels from the first folder of each relative path; classes are numbered in sorted order, as torchvision does.

    Raises:
        DataError: An image that lies in no folder.
    """
    tops = {}
    for name in names:
        parts = PurePosixPath(name).parts
        if len(parts) < 2:
            raise DataError(f"{name} lies in no folder, so it has no class: sort the images into folders or give a CSV")
        tops[name] = parts[0]
    classes = tuple(sorted(set(tops.values())))
    number = {folder: i for i, folder in enumerate(classes)}
    return Labels({name: number[top] for name, top in tops.items()}, f"{len(classes)} folder names", classes)


def labels_from_array(array: NDArray[np.generic], where: str) -> Labels:
    """Labels of rows 0, 1, ... from a vector of class numbers, (N,) or (N, 1).

    Raises:
        DataError: Another shape, not whole numbers, or negative ones.
    """
    flat = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.ndim != 1 or flat.dtype.kind not in "iu":
        raise DataError(f"{where}: labels must be a vector of whole numbers, not {array.dtype} of shape {array.shape}")
    if flat.size and int(flat.min()) < 0:
        raise DataError(f"{where}: class numbers count from 0, found {int(flat.min())}")
    return Labels({str(i): int(value) for i, value in enumerate(flat)}, where)


def _read_array(path: Path) -> NDArray[np.generic]:
    if path.suffix.lower() == ".npz":
        arrays = read_npz_arrays(path)
        if LABELS_KEY not in arrays:
            raise DataError(f"{path}: holds no array '{LABELS_KEY}' (it has {', '.join(arrays)})")
        return arrays[LABELS_KEY]
    check_npy(path)
    try:
        array: NDArray[np.generic] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as an array of labels ({error})") from error
    return array


def _read_csv(path: Path) -> dict[str, int]:
    regular_file(path, DataError, "give a CSV file of labels")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from error
    file_column, label_column = 0, 1
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if {"file", "label"} <= set(header):
        file_column, label_column = header.index("file"), header.index("label")
        rows = rows[1:]
    listed: dict[str, int] = {}
    for row in rows:
        if len(row) <= max(file_column, label_column) or _CLASS.fullmatch(row[label_column].strip()) is None:
            raise DataError(f"{path}: '{_short(','.join(row))}' is not a file and a class number counted from 0")
        name = PurePosixPath(row[file_column].strip().replace("\\", "/")).as_posix()
        label = int(row[label_column])
        if listed.setdefault(name, label) != label:
            raise DataError(f"{path}: {_short(name)} has two labels, {listed[name]} and {label}")
    if not listed:
        raise DataError(f"{path}: holds no labels")
    return listed


def _short(text: str) -> str:
    """A part of a message, on one line."""
    return " ".join(text.split())[:80]
