"""Ranks and intervals against scipy and sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from toast_onnx_calibration.accuracy import Accuracy, label_ranks, wilson


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None)
def test_wilson_equals_scipy(counts: tuple[int, int]) -> None:
    expected = binomtest(*counts).proportion_ci(0.95, "wilson")
    assert wilson(*counts) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="correct"):
        wilson(correct, total)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 4))
@settings(deadline=None)
def test_ranks_equal_a_stable_sort(seed: int, classes: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (20, classes)).astype(np.float32)  # many ties
    labels = rng.integers(0, classes, 20)
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [int(np.flatnonzero(row == label)[0]) for row, label in zip(order, labels, strict=True)]
    assert label_ranks(scores, labels).tolist() == expected
    if classes > 1:
        assert ((label_ranks(scores, labels) == 0) == (scores.argmax(1) == labels)).all()


def test_scores_that_are_not_finite_are_never_right() -> None:
    scores = np.array([[np.nan, np.nan], [np.inf, 0.0], [1.0, 0.0]])
    assert label_ranks(scores, np.zeros(3, np.int64)).tolist() == [2, 2, 0]


def test_json_leaves_out_what_means_nothing() -> None:
    document = Accuracy(10, 9, None, "scores", 3).to_json()
    assert document["top1"]["accuracy"] == 0.9
    assert "top5" not in document
