"""Arrays in files: what a header claims is checked against what is there before anything is read for it."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import DataError
from toast_onnx.files import regular_file

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000  # bytes; numpy's own limit, which it checks after reading
#: What a file may unpack to: so many times its size, or so many bytes.
_MAX_RATIO, _FREE_BYTES = 64, 1 << 28


@dataclass(frozen=True)
class Claim:
    """What the header of an array says.

    Attributes:
        shape: its shape.
        dtype: its type, plain numbers.
        fortran: whether the first axis runs fastest.
        header: bytes of the header.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    header: int

    @property
    def end(self) -> int:
        """Bytes of header and values."""
        return self.header + math.prod(self.shape) * self.dtype.itemsize


def read_claim(stream: IO[bytes]) -> Claim:
    """The header of a .npy file.

    Raises:
        ValueError: it is none, too long, or no header of plain numbers.
    """
    start = stream.read(len(_MAGIC) + 2)
    if len(start) < len(_MAGIC) + 2 or not start.startswith(_MAGIC):
        raise ValueError("no numpy header")
    version = (start[-2], start[-1])
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"numpy format {version[0]}.{version[1]}")
    size = stream.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(size, "little")
    if length > _MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    text = stream.read(length)
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = parse(io.BytesIO(size + text))
    except Exception as e:  # numpy hands on what its tokenizer and evaluator raise
        raise ValueError(f"a damaged numpy header: {' '.join(str(e).split())[:100]}") from e
    if dtype.hasobject:
        raise ValueError("Python objects, see allow_pickle")
    if dtype.kind not in "biufc" or any(extent < 0 for extent in shape):
        raise ValueError(f"an array of {dtype} and shape {shape}, not of plain numbers")
    return Claim(tuple(shape), dtype, fortran, len(start) + len(size) + length)


def check_npy(path: Path) -> None:
    """Make sure that a .npy file holds what its header claims.

    Raises:
        DataError: it does not.
    """
    size = regular_file(path, DataError, "give the path of a .npy file").st_size
    with refused(path), path.open("rb") as stream:
        claim = read_claim(stream)
        if size < claim.end:
            raise ValueError(f"{size} bytes of the {claim.end} that its header claims")


def read_npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of a .npz file.

    Raises:
        DataError: damaged, of Python objects, or it would unpack to far more than its size.
    """
    size = regular_file(path, DataError, "give the path of a .npz file").st_size
    with path.open("rb") as stream:
        if stream.read(len(_MAGIC)) == _MAGIC:
            raise DataError(f"{path}: named .npz but holds a single array: rename it to .npy")
    with refused(path), zipfile.ZipFile(path) as archive:
        members = members_of(archive, size)
        return {member.filename.removesuffix(".npy"): read_member(archive, member) for member in members}


def members_of(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """What lies in an archive of `size` bytes.

    Raises:
        ValueError: it would unpack to far more than its size, or holds one name twice.
    """
    members = archive.infolist()
    claimed = sum(member.file_size for member in members)
    if claimed > max(_MAX_RATIO * size, _FREE_BYTES):
        raise ValueError(f"{size} bytes that would unpack to {claimed}")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("an entry stands there twice")
    return members


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """One array of a .npz file.

    Raises:
        ValueError: its header does not fit its size.
        OSError, zipfile.BadZipFile, zlib.error, EOFError: it cannot be read.
    """
    with archive.open(member) as stream:
        claim = read_claim(stream)
        if claim.end != member.file_size:
            raise ValueError(f"'{member.filename}' has {member.file_size} bytes, but its header claims {claim.end}")
        data = stream.read()  # to the end: that is what checks its CRC
    values = np.frombuffer(data, claim.dtype)
    return values.reshape(claim.shape, order="F" if claim.fortran else "C")


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Turn what reading an array file can raise into an error that names it.

    Raises:
        DataError: something was raised inside.
    """
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        # zipfile raises the last of these for encrypted members and for compressions that it does not know
        raise DataError(f"{path}: {_failure(error)}") from error


def _failure(error: Exception) -> str:
    if "allow_pickle" in str(error):
        return "holds Python objects (pickle), which may run code: save plain numeric arrays"
    return f"cannot be read, it is damaged or no numpy file ({' '.join(str(error).split())[:300]})"
