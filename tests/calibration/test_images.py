"""Image folders: which files, in what order, and what happens to corrupt ones."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.calibration.tiny import noise
from toast_onnx.errors import DataError
from toast_onnx_calibration.images import ReadReport, choose, find_images, read_images
from toast_onnx_calibration.recipes import NAMED, Recipe, adapt

RECIPE = adapt(NAMED["none"], (1, 3, 8, 8))


def folder_of(root: Path, count: int) -> Path:
    root.mkdir(exist_ok=True)
    for i in range(count):
        noise(10 + i % 7, 12, i).save(root / f"{i:03}.png")
    return root


def test_any_depth_any_format_sorted_without_hidden_files(tmp_path: Path) -> None:
    wanted = ["B.PNG", "a/b/c.jpeg", "a/z.webp", "b.bmp", "c/ü ä.JPG"]
    for name in [*wanted, ".hidden.png", ".git/x.png", "a/notes.txt", "a/._c.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            noise(4, 4).save(path)
    assert find_images(tmp_path) == sorted(wanted)
    assert find_images(tmp_path / "b.bmp") == ["b.bmp"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    folder_of(tmp_path / "real", 1)
    folder_of(tmp_path / "elsewhere", 2)
    (tmp_path / "real" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    assert find_images(tmp_path / "real") == ["000.png", "linked/000.png", "linked/001.png"]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is empty"):
        find_images(tmp_path)
    (tmp_path / "a.tif").touch()
    with pytest.raises(DataError, match=r"no JPEG, PNG, WebP or BMP image at any depth; it holds \.tif"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="not an image"):
        find_images(tmp_path / "a.tif")
    with pytest.raises(DataError, match="no such file or folder"):
        find_images(tmp_path / "absent")


def test_choice_depends_on_the_seed_alone() -> None:
    assert choose(5, None, 0) == choose(5, 9, 0) == [0, 1, 2, 3, 4]
    drawn = choose(1000, 40, 7)
    assert drawn == choose(1000, 40, 7) == sorted(set(drawn))
    assert len(drawn) == 40
    assert drawn != choose(1000, 40, 8)
    with pytest.raises(DataError, match="at least 1"):
        choose(5, 0, 0)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_order_and_values_do_not_depend_on_threads(threads: int, tmp_path: Path) -> None:
    root = folder_of(tmp_path / "images", 40)
    names = find_images(root)
    report = ReadReport()
    read = list(read_images(root, names, RECIPE, report, threads))
    assert [name for name, _ in read] == names
    for name, tensor in read:
        with Image.open(root / name) as image:
            np.testing.assert_array_equal(tensor, RECIPE.apply(image))
    assert (report.total, report.read, report.notes()) == (40, 40, ())


def test_reading_ahead_is_bounded_and_stops_with_the_reader(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "images", 60)
    opened = []

    class Counting(Recipe):
        def apply(self, image: Image.Image) -> np.ndarray:
            opened.append(image.size)
            return super().apply(image)

    reader = read_images(root, find_images(root), Counting(), ReadReport(), 2)
    next(reader)
    time.sleep(0.5)  # long enough for the threads to read all 60, were they let
    reader.close()
    assert len(opened) <= 1 + 4 * 2
    assert not [t for t in threading.enumerate() if t.name.startswith("read-images")]


def corrupt(root: Path, *names: str) -> None:
    for name in names:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])


def test_few_corrupt_images_are_named_and_skipped(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "images", 40)
    corrupt(root, "007.png")
    (root / "021.png").write_text("not an image")
    report = ReadReport()
    read = [name for name, _ in read_images(root, find_images(root), RECIPE, report)]
    assert len(read) == 38
    assert [name for name, _ in report.corrupt] == ["007.png", "021.png"]
    assert report.notes() == ("2 of 40 images cannot be read and were skipped: 007.png, 021.png",)


def test_more_than_five_percent_corrupt_is_an_error(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "images", 40)
    corrupt(root, "003.png", "004.png", "039.png")
    with pytest.raises(DataError, match=r"more than 5% of 40 images cannot be read, the first is 003\.png \("):
        list(read_images(root, find_images(root), RECIPE, ReadReport()))


def test_one_corrupt_image_alone_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "only.jpg"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"only\.jpg"):
        list(read_images(path, find_images(path), RECIPE, ReadReport()))
