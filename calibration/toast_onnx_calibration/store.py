"""statistics.npz: sums of a calibration run, without pickle, named after the model and the data they come from.

Every entry can be merged with the same entry of another shard. Moments are kept as count, mean (float64) and covariance
(float32): the raw second moments would lose a small variance beside a large mean.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from toast_onnx.errors import DataError
from toast_onnx.files import drafts, place, regular_file
from toast_onnx.importance.moments import Moments
from toast_onnx.model import file_hash
from toast_onnx.planning.strict_json import parse_json
from toast_onnx.providers import one_line
from toast_onnx_calibration.npy import Claim, members_of, read_claim, read_member
from toast_onnx_calibration.store_checks import form_problem, value_problem

VERSION = 1
_HEADER = "header.json"
_AGAIN = "calibrate again"
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # same run, same bytes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Header:
    """What statistics come from.

    Attributes:
        model: file name of the model.
        model_sha256: its hash (`toast_onnx.model.file_hash`).
        data: one line on the samples.
        fingerprints: hash of the samples of every shard.
        preprocessing: the recipe, None for ready tensors.
        samples: how many were measured.
        seed: of the draw of samples and tokens.
        tokens: fraction of the tokens that was sampled.
        class_weight: weight of the class token, 1 where it was not weighted.
        parts: block number (as text) -> what was measured.
        notes: what the user was told.
        version: of the format.
    """

    model: str
    model_sha256: str
    data: str
    fingerprints: tuple[str, ...]
    preprocessing: dict[str, Any] | None
    samples: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    tokens: Annotated[float, Field(gt=0, le=1)]
    class_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    parts: dict[str, list[str]]
    notes: tuple[str, ...] = ()
    version: int = VERSION

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


_HEADER_READER = TypeAdapter(Header)


class StatisticsFile:
    """An opened statistics file; arrays are read when asked for."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header

    def array(self, name: str) -> NDArray[Any]:
        """One entry.

        Raises:
            DataError: the file lacks it or is damaged.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                return read_member(archive, archive.getinfo(f"{name}.npy"))
        except KeyError as e:
            raise DataError(f"{self.path}: has no '{name}'; run `toast-onnx calibrate` with the same --ratios") from e
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise DataError(f"{self.path}: '{name}' is damaged; {_AGAIN}") from e

    def names(self) -> list[str]:
        """Names of all entries."""
        with zipfile.ZipFile(self.path) as archive:
            return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all entries by name."""
        with zipfile.ZipFile(self.path) as archive:
            return {name: _claim(archive, archive.getinfo(f"{name}.npy")).shape for name in self.names()}

    def moments(self, key: str) -> Moments:
        """Moments stored under a key such as `3.hidden`."""
        count = self.count(key)
        mean = self.array(f"{key}.mean").astype(np.float64)
        covariance = self.array(f"{key}.covariance").astype(np.float64)
        second = covariance + np.outer(mean, mean)
        return Moments(count, count * mean, count * second, self.tokens(key, self.header.tokens))

    def count(self, key: str) -> float:
        """Sum of the token weights behind an entry."""
        return float(self.array(f"{key}.count").reshape(()))

    def tokens(self, key: str, sampled: float = 1.0) -> float:
        """How many tokens stand behind an entry, up to the rounding of each layer's sample.

        Args:
            key: such as `3.hidden`.
            sampled: the fraction of the tokens that it was measured on.
        """
        count, samples, weight = self.count(key), self.header.samples, self.header.class_weight
        if weight == 1 or count < samples * weight:  # no class token, or none in this layer
            return count
        # beside a weighted class token, sampled patches carry the weight of those left out
        return samples + (count - samples * weight) * sampled


def open_statistics(path: str | Path) -> StatisticsFile:
    """Open a statistics file and check everything in it.

    Raises:
        DataError: it is missing, truncated, of another format or of a later version, or holds what cannot have been
            measured.
    """
    path = Path(path)
    size = regular_file(path, DataError, "`toast-onnx calibrate` writes statistics").st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = members_of(archive, size)
            text = archive.read(_HEADER)
            claims = {m.filename: _claim(archive, m) for m in members if m.filename != _HEADER}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as e:
        raise DataError(f"{path}: truncated, damaged or no statistics file ({one_line(e)}); {_AGAIN}") from e
    file = StatisticsFile(path, _read_header(text, path))
    _check_entries(file, claims)
    return file


def _claim(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Claim:
    with archive.open(member) as stream:
        return read_claim(stream)


def _read_header(text: bytes, path: Path) -> Header:
    """The header of a statistics file.

    Raises:
        DataError: it is none, or of another version.
    """
    document = parse_json(text, f"{path}: its header", DataError, _AGAIN)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        found = document.get("version") if isinstance(document, dict) else None
        raise DataError(f"{path}: statistics format {found!r:.40}, but this release reads {VERSION}; {_AGAIN}")
    try:
        return _HEADER_READER.validate_json(text, strict=True)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: its header is wrong at '{where}': {first['msg']}; {_AGAIN}") from e


def _check_entries(file: StatisticsFile, claims: dict[str, Claim]) -> None:
    """Make sure that every entry can have been measured.

    Raises:
        DataError: one cannot.
    """
    names = {member.removesuffix(".npy"): claim for member, claim in claims.items()}
    shapes = {name: claim.shape for name, claim in names.items()}
    problems = {name: form_problem(name, claim.dtype, shapes) for name, claim in names.items()}
    for name, problem in problems.items():
        if problem is None:
            key, _, quantity = name.rpartition(".")
            mean = file.array(f"{key}.mean").astype(np.float64) if quantity == "covariance" else None
            problem = value_problem(name, file.array(name).astype(np.float64), mean)
        if problem is not None:
            raise DataError(f"{file.path}: '{name}' {problem}; {_AGAIN}")


def check_model(file: StatisticsFile, sha256: str, model: Path) -> None:
    """Make sure that statistics belong to a model.

    Raises:
        DataError: they were taken from another one; names both hashes.
    """
    if file.header.model_sha256 != sha256:
        raise DataError(
            f"{file.path} was taken from {file.header.model} (sha256 {file.header.model_sha256}), but {model} has "
            f"sha256 {sha256}: calibrate that model"
        )


class StatisticsWriter:
    """Adds entries to a statistics file under construction."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def array(self, name: str, value: NDArray[Any]) -> None:
        """Add one array."""
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.asarray(value, order="C"), allow_pickle=False)
        self._archive.writestr(zipfile.ZipInfo(f"{name}.npy", _FIXED_TIME), stream.getbuffer())

    def moments(self, key: str, moments: Moments) -> None:
        """Add moments under a key such as `3.hidden`."""
        self.array(f"{key}.count", np.asarray(moments.count))
        self.array(f"{key}.mean", moments.mean)
        self.array(f"{key}.covariance", moments.covariance.astype(np.float32))

    def header(self, header: Header) -> None:
        """Add the header, last: without it the file does not open."""
        text = json.dumps(asdict(header), indent=1, sort_keys=True, allow_nan=False)
        self._archive.writestr(zipfile.ZipInfo(_HEADER, _FIXED_TIME), text)


@contextmanager
def write_statistics(path: Path) -> Iterator[StatisticsWriter]:
    """Write a statistics file whole or not at all.

    Raises:
        ModelError: it cannot be written.
    """
    with drafts(path) as folder:
        draft = folder / path.name
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            yield StatisticsWriter(archive)
        place(draft, path)


def merge_statistics(paths: Sequence[Path], out: Path, model: Path) -> Header:
    """Add up the statistics of several shards; their order does not matter beyond rounding.

    Args:
        paths: the shards, at least one.
        out: the merged file.
        model: the model they were taken from.

    Raises:
        DataError: they come from different models, preprocessing or settings.
    """
    files = [open_statistics(p) for p in paths]
    first, sha256 = files[0], file_hash(model)
    for file in files:
        check_model(file, sha256, model)
    for other in files[1:]:
        for name in ("preprocessing", "tokens", "class_weight", "parts"):
            mine, theirs = getattr(first.header, name), getattr(other.header, name)
            if mine != theirs:
                raise DataError(f"{other.path}: {name} is {theirs}, but {first.path} has {mine}; shards must agree")
        twice = set(first.header.fingerprints) & set(other.header.fingerprints)
        if twice:
            raise DataError(f"{other.path} and {first.path} were measured on the same samples; merge each shard once")
    with write_statistics(out) as writer:
        for name in first.names():
            key, _, quantity = name.rpartition(".")
            if quantity == "covariance":
                total = files[0].moments(key)
                for file in files[1:]:
                    total = total.merge(file.moments(key))
                writer.moments(key, total)
            elif f"{key}.covariance" not in first.names():
                writer.array(name, np.sum([f.array(name).astype(np.float64) for f in files], axis=0))
        header = replace(
            first.header,
            data=" + ".join(f.header.data for f in files),
            fingerprints=tuple(p for f in files for p in f.header.fingerprints),
            samples=sum(f.header.samples for f in files),
            notes=tuple(dict.fromkeys(n for f in files for n in f.header.notes)),
        )
        writer.header(header)
    return header


def per_head(gram: Array, heads: int) -> Array:
    """The diagonal blocks (heads, d, d) of a Gram matrix, which may already be split by head."""
    if gram.ndim == 3:
        return gram
    d = gram.shape[0] // heads
    return np.stack([gram[h * d : (h + 1) * d, h * d : (h + 1) * d] for h in range(heads)])
