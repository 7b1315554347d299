"""Batches: sizes, padding, types, shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calibration.tiny import noise
from toast_onnx.errors import DataError
from toast_onnx_calibration.feeds import batch_size, batches
from toast_onnx_calibration.recipes import NAMED
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import Chunk, open_source

F32 = np.dtype(np.float32)


class Listed:
    """A source of prepared chunks, of the sizes given."""

    description, count, fingerprint, recipe, report = "a list", None, "", None, None

    def __init__(self, values: np.ndarray, sizes: list[int]) -> None:
        self.values, self.sizes = values, sizes

    def __iter__(self):  # type: ignore[no-untyped-def]
        start = 0
        for size in self.sizes:
            rows = range(start, start + size)
            yield Chunk({"x": self.values[rows.start : rows.stop]}, tuple(map(str, rows)))
            start += size


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), batch=st.integers(1, 12), fixed=st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_sample_once_in_order(sizes: list[int], batch: int, fixed: bool) -> None:
    total = sum(sizes)
    values = np.arange(total * 2, dtype=np.float32).reshape(total, 2)
    inputs = [ModelInput("x", (batch if fixed else "n", 2), F32)]
    got = list(batches(Listed(values, sizes), inputs, 5 if fixed else batch))
    np.testing.assert_array_equal(np.concatenate([b.feeds["x"][: b.valid] for b in got]), values)
    assert [row for b in got for row in b.rows] == [str(i) for i in range(total)]
    assert all(b.valid == batch and not b.padding for b in got[:-1])
    last = got[-1]
    if fixed:
        assert len(last.feeds["x"]) == batch == last.valid + last.padding
        np.testing.assert_array_equal(last.feeds["x"][last.valid :], np.repeat(values[-1:], last.padding, 0))
        np.testing.assert_array_equal(last.trim(last.feeds["x"]), last.feeds["x"][: last.valid])
    else:
        assert last.padding == 0
        assert len(last.feeds["x"]) == last.valid


def test_outputs_without_a_batch_axis_are_not_trimmed() -> None:
    values = np.zeros((3, 2), np.float32)
    (only,) = batches(Listed(values, [3]), [ModelInput("x", (4, 2), F32)])
    assert only.padding == 1
    assert only.trim(np.zeros((7, 5))).shape == (7, 5)
    assert only.trim(np.float32(1)).shape == ()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.float32])
@pytest.mark.parametrize("given_type", [np.float64, np.float16, np.uint8, np.int64, np.bool_])
def test_numbers_become_the_models_float_type(dtype: type, given_type: type) -> None:
    values = np.array([[0, 1], [1, 1]], given_type)
    (only,) = batches(Listed(values, [2]), [ModelInput("x", ("n", 2), np.dtype(dtype))])
    assert only.feeds["x"].dtype == dtype
    np.testing.assert_array_equal(only.feeds["x"], values.astype(dtype))


@pytest.mark.parametrize(
    ("values", "wanted", "words"),
    [
        (np.ones((2, 2), np.float32), np.int64, "'x' takes int64, but the samples are float32"),
        (np.ones((2, 2), np.float32), np.uint8, "recipe with dtype uint8"),
        (np.full((2, 2), 300), np.uint8, "values that uint8 cannot represent"),
        (np.array([[0.0, 1.0], [np.nan, 1.0]]), np.float32, "sample 1 has NaN or infinite float32 values"),
        (np.array([[1e5, 1.0], [0.0, 1.0]]), np.float16, "sample 0 has NaN or infinite float16 values"),
        (np.array([["a", "b"]]), np.float32, "the samples are <U1"),
    ],
)
def test_types_that_do_not_fit(values: np.ndarray, wanted: type, words: str) -> None:
    with pytest.raises(DataError) as caught:
        list(batches(Listed(values, [len(values)]), [ModelInput("x", ("n", 2), np.dtype(wanted))]))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "wanted"), [((2, 3), ("n", 2)), ((2, 2, 1), ("n", 2)), ((2,), ("n", 2)), ((2, 3, 9, 8), ("n", 3, "h", 9))]
)
def test_shapes_that_do_not_fit_are_both_named(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        list(batches(Listed(np.zeros(shape, np.float32), [2]), [ModelInput("x", wanted, F32)]))
    for side in (shape[1:], wanted[1:]):
        assert "(" + ", ".join(map(str, side)) + ")" in str(caught.value)


def test_images_of_their_own_sizes_need_batch_one(tmp_path: Path) -> None:
    noise(8, 9).save(tmp_path / "a.png")
    noise(10, 9).save(tmp_path / "b.png")
    free = [ModelInput("x", ("n", 3, "h", "w"), F32)]
    source = open_source(tmp_path, free, NAMED["none"])
    assert [b.feeds["x"].shape for b in batches(source, free, 1)] == [(1, 3, 8, 9), (1, 3, 10, 9)]
    with pytest.raises(DataError, match=r"\(3, 8, 9\) \(a\.png\) and \(3, 10, 9\) \(b\.png\).*batch 1"):
        list(batches(source, free, 2))


def test_the_models_fixed_batch_wins() -> None:
    assert batch_size([ModelInput("x", (4, 2), F32), ModelInput("y", ("n", 2), F32)], 16) == 4
    assert batch_size([ModelInput("x", (None, 2), F32)], 16) == 16
    with pytest.raises(DataError, match="differ in their first dimension"):
        batch_size([ModelInput("x", (4, 2), F32), ModelInput("y", (1, 2), F32)], 16)
    with pytest.raises(DataError, match="single number"):
        batch_size([ModelInput("x", (), F32)], 16)
    with pytest.raises(DataError, match="at least one"):
        batch_size([ModelInput("x", ("n",), F32)], 0)
