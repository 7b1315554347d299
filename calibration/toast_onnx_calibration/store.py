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
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from toast_onnx.errors import DataError, one_line
from toast_onnx.files import drafts, place, regular_file
from toast_onnx.importance.moments import Moments, merge
from toast_onnx.planning.settings import first_problem
from toast_onnx.planning.strict_json import parse_json
from toast_onnx_calibration.needs import GRADIENT
from toast_onnx_calibration.npy import Claim, members_of, read_claim, read_member
from toast_onnx_calibration.store_checks import form_problem, value_problem

VERSION = 1
_HEADER = "header.json"
_AGAIN = "calibrate again"
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # same run, same bytes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """Which part of some samples statistics come from.

    Attributes:
        of: number of shards that the samples were divided into.
        numbers: the shards at hand, from 1 on, in ascending order.
        data: one line on all samples.
        fingerprint: hash of all samples.
    """

    of: Annotated[int, Field(ge=1)]
    numbers: tuple[int, ...]
    data: str
    fingerprint: str

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def text(self) -> str:
        """Such as `shard 1 of 2`."""
        return f"shard {', '.join(map(str, self.numbers))} of {self.of}"

    @property
    def missing(self) -> list[int]:
        """The shards that are not at hand."""
        return [number for number in range(1, self.of + 1) if number not in self.numbers]


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
        share: which shards of some samples these are; None where they are all.
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
    share: Share | None = None
    version: int = VERSION

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


_HEADER_READER = TypeAdapter(Header)


class StatisticsFile:
    """An opened statistics file; arrays are read when asked for."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header

    def array(self, name: str, archive: zipfile.ZipFile | None = None) -> NDArray[Any]:
        """One entry.

        Args:
            name: such as `3.hidden.mean`.
            archive: the file where it is open already.

        Raises:
            DataError: the file lacks it or is damaged.
        """
        try:
            with zipfile.ZipFile(self.path) if archive is None else nullcontext(archive) as opened:
                return read_member(opened, opened.getinfo(f"{name}.npy"))
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
        return Moments.known(mean, covariance, count, self.tokens(key, self.header.tokens))

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
        where, what = first_problem(e)
        raise DataError(f"{path}: its header is wrong at '{where}': {what}; {_AGAIN}") from e


def _check_entries(file: StatisticsFile, claims: dict[str, Claim]) -> None:
    """Make sure that every entry can have been measured.

    Raises:
        DataError: one cannot.
    """
    names = {member.removesuffix(".npy"): claim for member, claim in claims.items()}
    shapes = {name: claim.shape for name, claim in names.items()}
    problems = {name: form_problem(name, claim.dtype, shapes) for name, claim in names.items()}
    with zipfile.ZipFile(file.path) as archive:
        for name, problem in problems.items():
            if problem is None:
                key, _, quantity = name.rpartition(".")
                mean = file.array(f"{key}.mean", archive) if quantity == "covariance" else None
                problem = value_problem(name, file.array(name, archive), mean)
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

    def __init__(self, archive: zipfile.ZipFile, exact: bool = False) -> None:
        """Write to an archive.

        Args:
            archive: the file.
            exact: keep covariances in float64, for sums that go on.
        """
        self._archive, self._type = archive, np.float64 if exact else np.float32

    def array(self, name: str, value: NDArray[Any]) -> None:
        """Add one array."""
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.asarray(value, order="C"), allow_pickle=False)
        self._archive.writestr(zipfile.ZipInfo(f"{name}.npy", _FIXED_TIME), stream.getbuffer())

    def moments(self, key: str, moments: Moments) -> None:
        """Add moments under a key such as `3.hidden`."""
        self.array(f"{key}.count", np.asarray(moments.count))
        self.array(f"{key}.mean", moments.mean)
        self.array(f"{key}.covariance", moments.covariance.astype(self._type))

    def header(self, header: Header) -> None:
        """Add the header, last: without it the file does not open."""
        document = {name: value for name, value in asdict(header).items() if name != "share" or value is not None}
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
        self._archive.writestr(zipfile.ZipInfo(_HEADER, _FIXED_TIME), text)


@contextmanager
def write_statistics(path: Path, exact: bool = False) -> Iterator[StatisticsWriter]:
    """Write a statistics file whole or not at all.

    Args:
        path: the file.
        exact: as for `StatisticsWriter`.

    Raises:
        ModelError: it cannot be written.
    """
    with drafts(path) as folder:
        draft = folder / path.name
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            yield StatisticsWriter(archive, exact)
        place(draft, path)


def merge_statistics(paths: Sequence[Path], out: Path) -> Header:
    """Add up statistics of the same model; shards of one run are added in their own order, others in the given one.

    Args:
        paths: the files, at least one.
        out: the merged file. As long as shards are missing it stays in float64, and can be merged again.

    Raises:
        DataError: they come from different models, preprocessing or settings, or from the same samples.
    """
    files = [open_statistics(p) for p in paths]
    for other in files[1:]:
        _check_same(files[0], other)
    share = _joined_share(files)
    if share is not None:
        files.sort(key=lambda f: f.header.share.numbers if f.header.share else ())
    moments = {name.rpartition(".")[0] for name in files[0].names() if name.endswith(".covariance")}
    with write_statistics(out, exact=share is not None and bool(share.missing)) as writer:
        for name in dict.fromkeys(name for file in files for name in file.names()):
            key, _, quantity = name.rpartition(".")
            # gradients are taken of a few samples, which are the first shard's
            having = [f for f in files if name in f.names()] if key.endswith(f".{GRADIENT}") and share else files
            if quantity == "covariance":
                writer.moments(key, merge(file.moments(key) for file in having))
            elif key not in moments:
                writer.array(name, np.sum([f.array(name).astype(np.float64) for f in having], axis=0))
        header = _joined_header(files, share)
        writer.header(header)
    return header


def _check_same(first: StatisticsFile, other: StatisticsFile) -> None:
    """Make sure that two files can be added up.

    Raises:
        DataError: they cannot; says in what they differ.
    """
    mine, theirs = first.header, other.header
    if theirs.model_sha256 != mine.model_sha256:
        raise DataError(
            f"{other.path} was taken from {theirs.model} (sha256 {theirs.model_sha256}), but {first.path} from "
            f"{mine.model} (sha256 {mine.model_sha256}): calibrate one model"
        )
    for name in ("preprocessing", "seed", "tokens", "class_weight", "parts"):
        if getattr(mine, name) != getattr(theirs, name):
            raise DataError(
                f"{other.path}: {name} is {getattr(theirs, name)}, but {first.path} has {getattr(mine, name)}; "
                "they must agree"
            )


def _joined_share(files: Sequence[StatisticsFile]) -> Share | None:
    """The shards that files hold together; None where none of them is one.

    Raises:
        DataError: samples stand in two files, or shards of different divisions are mixed.
    """
    seen: dict[Any, Path] = {}
    for file in files:
        share = file.header.share
        samples = (
            file.header.fingerprints if share is None else [(share.fingerprint, share.of, n) for n in share.numbers]
        )
        for each in samples:
            if each in seen:
                what = "the same samples" if share is None else f"the same shard, {each[2]} of {share.of}"
                raise DataError(f"{file.path} and {seen[each]} were measured on {what}; merge each shard once")
            seen[each] = file.path
    shares = [file.header.share for file in files]
    first = shares[0]
    for file, share in zip(files, shares, strict=True):
        if share is None and first is None:
            continue
        if share is None or first is None:
            raise DataError(f"{file.path}: shards add up with shards of the same run only; merge those first")
        if (share.of, share.fingerprint) != (first.of, first.fingerprint):
            raise DataError(
                f"{file.path} is one of {share.of} shards of {share.data}, but {files[0].path} one of {first.of} of "
                f"{first.data}; merge shards of one run"
            )
    if first is None:
        return None
    return replace(first, numbers=tuple(sorted(n for share in shares if share is not None for n in share.numbers)))


def _joined_header(files: Sequence[StatisticsFile], share: Share | None) -> Header:
    """What merged statistics come from: where all shards are there, what one run would have said."""
    complete = share is not None and not share.missing
    headers = [file.header for file in files]
    return replace(
        headers[0],
        data=share.data if share is not None else " + ".join(h.data for h in headers),
        fingerprints=(share.fingerprint,) if complete and share else tuple(p for h in headers for p in h.fingerprints),
        samples=sum(h.samples for h in headers),
        notes=tuple(dict.fromkeys(n for h in headers for n in h.notes)),
        share=None if complete else share,
    )


def per_head(gram: Array, heads: int) -> Array:
    """The diagonal blocks (heads, d, d) of a Gram matrix, which may already be split by head."""
    if gram.ndim == 3:
        return gram
    d = gram.shape[0] // heads
    return np.stack([gram[h * d : (h + 1) * d, h * d : (h + 1) * d] for h in range(heads)])
