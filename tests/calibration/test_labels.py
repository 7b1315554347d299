"""Labels from CSV files, folder names and arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.calibration.tiny import colour_folder, noise
from toast_onnx.errors import DataError
from toast_onnx_calibration.labels import labels_from_csv, labels_from_folders, open_labels


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "file,label\na.png,3\nsub/b.png,1\n",
        "\ufeffLabel , File\r\n3,a.png\r\n1,sub\\b.png\r\n\r\n",
        'a.png,3\n"sub/b.png",1',
        "file,label,note\na.png, 3,x\nb.png,1,y\n",
        "file,label\n./a.png,3\n./sub/b.png,1\n",
    ],
)
def test_spellings_of_csv(text: str, tmp_path: Path) -> None:
    labels = labels_from_csv(write(tmp_path / "l.csv", text), ["a.png", "sub/b.png"])
    assert dict(labels.by_row) == {"a.png": 3, "sub/b.png": 1}
    assert labels.notes == ()


def test_labels_and_files_that_do_not_meet_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", "file,label\na.png,3\ngone.png,1\nlost.png,1\n")
    labels = labels_from_csv(path, ["a.png", "new.png"])
    assert dict(labels.by_row) == {"a.png": 3}
    assert "labels 2 files that are not there, the first is gone.png" in labels.notes[0]
    assert "1 images have no label" in labels.notes[1]


def test_a_bare_name_shared_by_two_images_labels_neither(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", "file,label\nb.png,1\nc.png,2\n")
    labels = labels_from_csv(path, ["x/b.png", "y/b.png", "y/c.png"])
    assert dict(labels.by_row) == {"y/c.png": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no labels"),
        ("file,label\n", "holds no labels"),
        ("file,label\na.png,cat\n", "'a.png,cat' is not a file and a class number"),
        ("file,label\na.png,-1\n", "class number counted from 0"),
        ("file,label\na.png\n", "'a.png' is not"),
        ("file,label\na.png,1\na.png,2\n", "two labels, 1 and 2"),
        ("file,label\nz.png,1\n", "labels none of the images; it names z.png, a file here is a.png"),
    ],
)
def test_bad_csv(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        labels_from_csv(write(tmp_path / "l.csv", text), ["a.png"])
    assert words in str(caught.value)


def test_folders_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    labels = open_labels("folders", colour_folder(tmp_path / "c"))
    assert labels.classes == ("blue", "green", "red")
    assert (labels.by_row["blue/0.png"], labels.by_row["red/3.png"]) == (0, 2)
    assert dict(labels_from_folders(["a/x/1.png", "b/1.png"]).by_row) == {"a/x/1.png": 0, "b/1.png": 1}
    with pytest.raises(DataError, match=r"1\.png lies in no folder"):
        labels_from_folders(["a/1.png", "1.png"])


def test_arrays(tmp_path: Path) -> None:
    data = tmp_path / "d.npz"
    np.savez(data, images=np.zeros((3, 2, 2, 3), np.uint8), labels=np.array([[2], [0], [1]]))
    assert dict(open_labels(None, data).by_row) == {"0": 2, "1": 0, "2": 1}
    np.save(tmp_path / "l.npy", np.array([5, 6], np.uint8))
    assert dict(open_labels(tmp_path / "l.npy", data).by_row) == {"0": 5, "1": 6}
    for values, words in (
        (np.zeros((2, 3)), "vector of whole numbers"),
        (np.array([0.5]), "float64"),
        (np.array([-1, 2]), "count from 0"),
    ):
        np.save(tmp_path / "bad.npy", values)
        with pytest.raises(DataError, match=words):
            open_labels(tmp_path / "bad.npy", data)


def test_no_labels(tmp_path: Path) -> None:
    noise(4, 4).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="needs labels"):
        open_labels(None, tmp_path)
    with pytest.raises(DataError, match="no such labels file"):
        open_labels(tmp_path / "absent.csv", tmp_path)
    np.savez(tmp_path / "d.npz", images=np.zeros((3, 2, 2, 3)))
    with pytest.raises(DataError, match="no array 'labels'"):
        open_labels(None, tmp_path / "d.npz")
    (tmp_path / "l.csv").write_text("a,1")
    with pytest.raises(DataError, match="labels image files"):
        open_labels(tmp_path / "l.csv", tmp_path / "d.npz")
