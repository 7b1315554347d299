"""Data that would block, or take all memory, is refused or skipped before it is read."""

from __future__ import annotations

import io
import os
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toast_onnx.errors import ConfigError, DataError, ModelError, ToastError
from toast_onnx.files import regular_file
from toast_onnx.model import file_hash, load_model
from toast_onnx.planning.presets import read_ratios
from toast_onnx_calibration.images import ReadReport, read_images
from toast_onnx_calibration.labels import open_labels
from toast_onnx_calibration.recipes import MAX_PIXELS, NAMED, Recipe, set_max_pixels
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import open_source, to_image
from toast_onnx_calibration.store import open_statistics

INPUTS = [ModelInput("x", ("batch", 3, 8, 8), np.dtype(np.float32))]
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are made on POSIX systems")


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """1 GB more than is in use: what reads first and checks later fails here."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _ratios(path: Path) -> object:
    return read_ratios(str(path))


def _data(path: Path) -> object:
    return list(open_source(str(path), INPUTS, NAMED["none"]))


READERS: list[tuple[str, Callable[[Path], object], type[ToastError]]] = [
    ("m.onnx", load_model, ModelError),
    ("m.onnx", file_hash, ModelError),
    ("r.yaml", _ratios, ConfigError),
    ("s.npz", open_statistics, DataError),
    ("d.npz", _data, DataError),
    ("d.npy", _data, DataError),
    ("d.png", _data, DataError),
]


@needs_pipes
@pytest.mark.parametrize(("name", "read", "error"), READERS)
def test_pipes_do_not_block(name: str, read: Callable[[Path], object], error: type[ToastError], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(error, match=name):
        read(tmp_path / name)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
@pytest.mark.parametrize(("name", "read", "error"), READERS)
def test_devices_are_not_read(
    name: str, read: Callable[[Path], object], error: type[ToastError], tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(error, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        regular_file(name, DataError, "")


def test_a_ratios_file_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "r.yaml").open("wb") as stream:
        stream.truncate(1 << 31)
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        read_ratios(str(tmp_path / "r.yaml"))


def test_a_model_beyond_what_protobuf_takes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "m.onnx").open("wb") as stream:
        stream.truncate((1 << 31) + 5)
    with pytest.raises(ModelError, match="larger than 2 GiB"):
        load_model(tmp_path / "m.onnx")


def folder(path: Path, spoil: Callable[[Path], object]) -> ReadReport:
    """Read 25 good images and another one; the report on them."""
    for k in range(25):
        Image.new("RGB", (16, 16), (k, k, k)).save(path / f"{k:02}.png")
    spoil(path / "bad.png")
    names = sorted(p.name for p in path.iterdir())
    report = ReadReport()
    recipe = Recipe(resize=256, crop=8)
    assert sum(1 for _ in read_images(path, names, recipe, report, threads=1)) == 26 - len(report.corrupt)
    return report


def _thin(path: Path) -> None:
    Image.new("L", (60000, 1)).save(path)


def _wide(path: Path) -> None:
    """A PNG of a few bytes that says it has 2 thousand million pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 45_000, 45_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"\0" * 1000)) + part(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_thin, "resized to 15360000 x 256 pixels"),
        (_wide, "2025000000 pixels"),
        pytest.param(lambda path: os.mkfifo(path), "a pipe", marks=needs_pipes),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
    ids=["thin", "wide", "pipe", "device"],
)
def test_hostile_images_count_as_unreadable(spoil: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    report = folder(tmp_path, spoil)
    ((name, found),) = report.corrupt
    assert name == "bad.png"
    assert reason in found


def test_the_limit_of_pixels_can_be_set(tmp_path: Path) -> None:
    try:
        set_max_pixels(70_000)
        (tmp_path / "small").mkdir()
        ((_, reason),) = folder(tmp_path / "small", lambda path: Image.new("L", (20, 16)).save(path)).corrupt
        assert "320 x 256 pixels has more than 70000" in reason
        set_max_pixels(MAX_PIXELS * 4)
        (tmp_path / "large").mkdir()
        assert not folder(tmp_path / "large", lambda path: Image.new("L", (1500, 1)).save(path)).corrupt
    finally:
        set_max_pixels(MAX_PIXELS)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3)])
def test_images_without_a_pixel(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has none"):
        NAMED["imagenet"].apply(to_image(np.zeros(shape, np.uint8)))


def _npy(shape: str, dtype: str = "<f4", data: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def _long_header() -> bytes:
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", (1 << 32) - 1) + b" " * 20_000


CLAIMS = {
    "12 GB": (_npy("(3000000000,)"), "claims"),
    "negative": (_npy("(-1, 3)"), "not of plain numbers"),
    "beyond any": (_npy("(99999999999, 99999999999)"), "claims"),
    "text": (_npy("'all'"), "damaged numpy header"),
    "nested": (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000, "damaged numpy header"),
    "pickle": (_npy("(1,)", "|O", b"cos\nsystem\n"), "pickle"),
    "long header": (_long_header(), "a header of 4294967295 bytes"),
    "later format": (b"\x93NUMPY\x09\x00" + b" " * 100, "numpy format 9.0"),
    "nothing": (b"", "no numpy header"),
}


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize(("data", "reason"), CLAIMS.values(), ids=list(CLAIMS))
def test_arrays_that_are_not_what_they_claim(data: bytes, reason: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"d.{kind}"
    if kind == "npy":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("labels.npy", data)
    for read in (_data, lambda p: open_labels(p, "images")):
        with pytest.raises(DataError, match=reason):
            read(path)


def test_an_archive_that_unpacks_to_far_more_than_its_size(tmp_path: Path) -> None:
    """1 MB of zeros, packed: 1 GB."""
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as stream:
        stream.write(_npy("(268435456,)"))
        for _ in range(1024):
            stream.write(bytes(1 << 20))
    with pytest.raises(DataError, match="would unpack to"):
        _data(path)


def test_arrays_of_both_orders_come_out_as_they_went_in(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    for k, order in enumerate((values, np.asfortranarray(values))):
        np.savez_compressed(tmp_path / f"{k}.npz", x=order)
        (found,) = (chunk.arrays["x"] for chunk in open_source(str(tmp_path / f"{k}.npz"), INPUTS, None))
        assert np.array_equal(found, values)
        stream = io.BytesIO()
        np.save(stream, order)
        (tmp_path / f"{k}.npy").write_bytes(stream.getvalue())
        (found,) = (chunk.arrays["x"] for chunk in open_source(str(tmp_path / f"{k}.npy"), INPUTS, None))
        assert np.array_equal(found, values)


def test_class_numbers_of_thousands_of_digits(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "l.csv").write_text("a.png," + "9" * 5000 + "\n")
    with pytest.raises(DataError, match="not a file and a class number"):
        open_labels(tmp_path / "l.csv", tmp_path / "images")
