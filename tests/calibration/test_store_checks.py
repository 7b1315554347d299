"""Statistics files whose content cannot have been measured are refused when they are opened, each with its reason."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from tests.end_to_end.command import DIGITS
from tests.matching.tiny import TOKENS, WIDTH, block
from tests.pruning import look
from toast_onnx.errors import DataError
from toast_onnx.importance.blocked import Cholesky
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_calibration.store import open_statistics
from toast_onnx_calibration.store_checks import nearest_moments, value_problem

EVERY_PART = ("qk", "context", "hidden", "inputs", "fc1", "fc2")
Entries = dict[str, np.ndarray]


@cache
def measured() -> tuple[Path, dict[str, Any], Entries]:
    """A model, and header and entries as they were measured on it."""
    folder = Path(mkdtemp(prefix="store-checks-"))
    graph, y = block()
    model = graph.save(folder / "model.onnx", y)
    data = np.random.default_rng(0).standard_normal((64, TOKENS, WIDTH)).astype(np.float32)
    np.save(folder / "data.npy", data)
    study = look(model)
    calibrate(study, folder / "data.npy", folder / "s.npz", everything(study, EVERY_PART))
    with zipfile.ZipFile(folder / "s.npz") as archive:
        names = [n for n in archive.namelist() if n.endswith(".npy")]
        arrays = {n.removesuffix(".npy"): np.load(io.BytesIO(archive.read(n))) for n in names}
        return model, json.loads(archive.read("header.json")), arrays


def whole() -> tuple[dict[str, Any], Entries]:
    """Header and entries, for a test to spoil."""
    return dict(measured()[1]), dict(measured()[2])


def written(path: Path, header: object, arrays: Entries, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.save(stream, array)
            archive.writestr(f"{name}.npy", stream.getvalue())
        archive.writestr("header.json", header if isinstance(header, str) else json.dumps(header))
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_was_measured_opens_and_prunes(compression: int, tmp_path: Path) -> None:
    """What the rest of these tests spoils is right before."""
    path = written(tmp_path / "s.npz", *whole(), compression)
    study = look(measured()[0])
    ratios = {"version": 1, "align": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc1": 0.1, "fc2": 0.5}}
    assert len(prune(study, parse_ratios(ratios), CalibratedStatistics(study, path)).weights) == 1


def _indefinite(a: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(a)
    values[..., 0] = -values[..., -1] / 50
    return np.asarray((vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2))


def _asymmetric(a: np.ndarray) -> np.ndarray:
    spoilt = a.copy()
    spoilt[..., 0, 1] += a.max()
    return spoilt


def _set(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(a: np.ndarray) -> np.ndarray:
        spoilt = a.copy()
        spoilt.flat[-1] = value
        return spoilt

    return spoil


MATRICES = ["0.qq.gram", "0.kk.gram", "0.context.covariance", "0.hidden.covariance", "0.inputs.covariance"]
COUNTS = ["0.qq.count", "0.kk.count", "0.context.count", "0.hidden.count", "0.inputs.count"]
SPOILT: dict[str, tuple[list[str], Callable[[np.ndarray], np.ndarray], str]] = {
    "all zero": (MATRICES, np.zeros_like, "zero everywhere"),
    "negated": (MATRICES, np.negative, "not positive semi-definite"),
    "indefinite": (MATRICES, _indefinite, "not positive semi-definite"),
    "asymmetric": (MATRICES, _asymmetric, "not symmetric"),
    "NaN": ([*MATRICES, *COUNTS, "0.hidden.mean"], _set(np.nan), "NaN"),
    "infinite": ([*MATRICES, *COUNTS, "0.hidden.mean"], _set(np.inf), "infinity"),
    "huge": ([*MATRICES, *COUNTS, "0.hidden.mean"], _set(1e30), "beyond any measurement"),
    "one axis": (MATRICES, lambda a: a.reshape(-1), "has shape"),
    "not square": (MATRICES, lambda a: a[..., :-1], "has shape"),
    "empty": (MATRICES, lambda a: a[..., :0, :0], "has shape"),
    "one short": (["0.hidden.mean", "0.inputs.mean"], lambda a: a[:-1], "has shape"),
    "whole numbers": ([*MATRICES, *COUNTS], lambda a: a.astype(np.int64), "type int64"),
    "complex": (MATRICES, lambda a: a.astype(complex), "type complex128"),
    "half": (MATRICES, lambda a: a.astype(np.float16), "type float16"),
    "other byte order": (MATRICES, lambda a: a.astype(">f8"), "type >f8"),
    "text": (["0.hidden.mean"], lambda a: a.astype("U8"), "not of plain numbers"),
    "dates": (["0.hidden.mean"], lambda a: a.astype("M8[s]"), "not of plain numbers"),
    "negative magnitude": (["0.fc2.magnitude", "0.fc1.magnitude"], np.negative, "magnitudes have no sign"),
    "no images": (["0.fc2.images"], np.zeros_like, "counts samples or tokens"),
    "count of zero": (COUNTS, np.zeros_like, "counts samples or tokens"),
    "negative count": (COUNTS, np.negative, "counts samples or tokens"),
    "list of counts": (COUNTS, lambda a: np.repeat(a, 3), "is one number"),
}


@pytest.mark.parametrize(("name", "kind"), [(n, kind) for kind, (names, _, _) in SPOILT.items() for n in names])
def test_entries_that_cannot_have_been_measured(name: str, kind: str, tmp_path: Path) -> None:
    header, arrays = whole()
    _, spoil, reason = SPOILT[kind]
    arrays[name] = spoil(arrays[name])
    with pytest.raises(DataError, match=reason) as caught:
        open_statistics(written(tmp_path / "s.npz", header, arrays))
    assert "\n" not in str(caught.value)
    if kind not in ("text", "dates"):
        assert name.rpartition(".")[0] in str(caught.value)


@pytest.mark.parametrize(
    "name", ["0.qq.gram", "0.kk.gram", "0.context", "0.hidden", "0.inputs"], ids=lambda n: n.replace(".", "-")
)
def test_entries_of_another_width_than_the_models(name: str, tmp_path: Path) -> None:
    header, arrays = whole()
    for key in [k for k in arrays if k.startswith(name)]:
        if arrays[key].ndim:
            arrays[key] = arrays[key][(..., *[slice(0, -1)] * min(arrays[key].ndim, 2))]
    path = written(tmp_path / "s.npz", header, arrays)
    with pytest.raises(DataError, match=f"'{name}.*which no such part has"):
        CalibratedStatistics(look(measured()[0]), path)


@pytest.mark.parametrize("name", ["7.hidden.mean", "999999.hidden.mean"])
def test_entries_of_a_block_that_is_not_there(name: str, tmp_path: Path) -> None:
    header, arrays = whole()
    path = written(tmp_path / "s.npz", header, arrays | {name: arrays["0.hidden.mean"]})
    with pytest.raises(DataError, match=name):
        CalibratedStatistics(look(measured()[0]), path)


@pytest.mark.parametrize("name", ["hidden.mean", "x.hidden.mean", "0.hidden.variance", "0.other.mean", "../0.qq.gram"])
def test_names_of_no_entry(name: str, tmp_path: Path) -> None:
    header, arrays = whole()
    with pytest.raises(DataError, match="no entry of a statistics file"):
        open_statistics(written(tmp_path / "s.npz", header, arrays | {name: arrays["0.hidden.mean"]}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", 0),
        ("samples", -64),
        ("samples", 6.5),
        ("samples", "64"),
        ("samples", True),
        ("samples", None),
        ("tokens", 0),
        ("tokens", 1.5),
        ("class_weight", -1),
        ("seed", -1),
        ("parts", []),
        ("parts", {"0": "qk"}),
        ("notes", [1]),
        ("fingerprints", {}),
        ("preprocessing", 5),
        ("model", None),
        ("surprise", 1),
    ],
)
def test_headers_with_wrong_values(key: str, value: object, tmp_path: Path) -> None:
    header, arrays = whole()
    with pytest.raises(DataError, match=f"its header is wrong at '{key}"):
        open_statistics(written(tmp_path / "s.npz", header | {key: value}, arrays))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"version": 1}', '{"version": ' + "1" * 5000 + "}", '{"version": NaN}', "\xff"],
    ids=["empty", "list", "cut", "deep", "bare", "long", "NaN", "other"],
)
def test_headers_that_are_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s\.npz"):
        open_statistics(written(tmp_path / "s.npz", text, whole()[1]))


def test_a_file_that_would_unpack_to_far_more_than_its_size(tmp_path: Path) -> None:
    header, arrays = whole()
    arrays["0.hidden.mean"] = np.zeros(1 << 26)
    path = written(tmp_path / "s.npz", header, arrays, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="would unpack to"):
        open_statistics(path)


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    header, arrays = whole()
    stream = io.BytesIO()
    np.save(stream, arrays["0.hidden.mean"])
    claims = stream.getvalue().replace(b"(16,)", b"(1600000000,)")
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        for name, array in arrays.items():
            each = io.BytesIO()
            np.save(each, array)
            archive.writestr(f"{name}.npy", claims if name == "0.hidden.mean" else each.getvalue())
        archive.writestr("header.json", json.dumps(header))
    with pytest.raises(DataError, match=r"s\.npz"):
        open_statistics(tmp_path / "s.npz")


@pytest.mark.parametrize("part", ["qk", "context"])
def test_a_part_that_the_header_does_not_name(part: str, tmp_path: Path) -> None:
    """What was not measured is no number, which no solver takes."""
    header, arrays = whole()
    header["parts"] = {"0": [p for p in header["parts"]["0"] if p != part]}
    found = CalibratedStatistics(look(measured()[0]), written(tmp_path / "s.npz", header, arrays))
    ratios = {"version": 1, "align": 1, "attention": {"qk": 0.5, "vo": 0.5}}
    with pytest.raises(DataError, match="cannot be solved with these statistics"):
        prune(look(measured()[0]), parse_ratios(ratios), found)


@pytest.mark.parametrize("factor", [10, 30])
def test_attention_that_sees_one_key_a_query_is_measured_and_opens(factor: float, tmp_path: Path) -> None:
    """Keys around what each query sees are then a difference of nearly equal sums, and mostly rounding."""
    model = onnx.load(DIGITS)
    for tensor in model.graph.initializer:
        weight = onnx.numpy_helper.to_array(tensor)
        if weight.ndim == 2 and weight.shape[1] == 3 * len(weight):  # queries, keys, values
            sharp = weight * np.repeat(np.asarray([factor, factor, 1], np.float32), len(weight))
            tensor.CopyFrom(onnx.numpy_helper.from_array(sharp, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    study, options = look(tmp_path / "model.onnx"), CalibrationOptions(samples=16, preprocess="none", threads=1)
    data = DIGITS.with_name("digits_calibration.npz")
    calibrate(study, data, tmp_path / "s.npz", everything(study), options)
    file = open_statistics(tmp_path / "s.npz")
    for name in file.names():
        file.array(name)


def tolerance(matrix: np.ndarray) -> float:
    """What eigenvalues may lie below zero."""
    return float((len(matrix) + 1000) * np.finfo(np.float32).eps * np.diagonal(matrix).max())


@pytest.mark.parametrize("tokens", [60, 2000])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_rounding_of_a_factor_in_float32_is_a_tenth_of_the_tolerance_at_most(tokens: int, decay: float) -> None:
    n = 700
    rng = np.random.default_rng(tokens)
    x = (rng.standard_normal((tokens, n)) * np.arange(1, n + 1) ** -decay) @ rng.standard_normal((n, n))
    s = (x.T @ x / tokens).astype(np.float32)
    shift = tolerance(s) / 2
    factor = Cholesky(s, shift, np.float32).factor.astype(np.float64)
    error = factor @ factor.T - s - shift * np.eye(n)
    assert np.abs(np.linalg.eigvalsh(error)).max() < tolerance(s) / 10


@pytest.mark.parametrize(("below", "fits"), [(0.3, True), (0.8, True), (1.2, False), (3.0, False)])
def test_eigenvalues_may_lie_below_zero_by_the_tolerance(below: float, fits: bool) -> None:
    n = 300
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    values = np.linspace(1, 2, n)
    s = (turn * values) @ turn.T
    values[0] = -below * tolerance(s)
    s = (turn * values) @ turn.T
    problem = value_problem("0.context.covariance", (s + s.T) / 2, np.zeros(n))
    assert problem == (None if fits else "is not positive semi-definite")


@pytest.mark.parametrize("place", [(0, 299), (299, 0), (260, 250), (10, 3)])
def test_one_number_that_differs_from_its_mirror_image_is_found(place: tuple[int, int]) -> None:
    s = np.eye(300)
    s[place] = 0.5
    assert value_problem("0.context.covariance", s, np.zeros(300)) == "is not symmetric"


def test_moments_are_kept_as_they_are_and_others_are_the_nearest() -> None:
    """The nearest in the Frobenius norm: no eigenvalue below zero, the others where they were."""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((3, 4, 4))
    right = root @ np.swapaxes(root, -1, -2)
    assert np.array_equal(nearest_moments(right), (right + np.swapaxes(right, -1, -2)) / 2)
    values, vectors = np.linalg.eigh(right)
    values[:, 0] = -1
    spoiled = (vectors * values[:, None]) @ np.swapaxes(vectors, -1, -2)
    values[:, 0] = 0
    expected = (vectors * values[:, None]) @ np.swapaxes(vectors, -1, -2)
    skew = np.triu(np.ones((4, 4)), 1)
    assert nearest_moments(spoiled + skew - skew.T) == pytest.approx(expected, abs=1e-12)
