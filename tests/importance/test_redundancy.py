"""The measures against NumPy on the samples themselves, and on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toast_onnx.importance.moments import Moments
from toast_onnx.importance.redundancy import dead_share, effective_rank, reconstruction_r2, redundancy


def samples(seed: int, rows: int = 400, columns: int = 7) -> np.ndarray:
    """Correlated columns of very different size, off zero."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns)) @ rng.standard_normal((columns, columns)) * 10.0 ** rng.integers(
        -2, 3, columns
    ) + rng.standard_normal(columns)


def r2_by_regression(x: np.ndarray) -> np.ndarray:
    found = []
    for j in range(x.shape[1]):
        others = np.column_stack([np.delete(x, j, axis=1), np.ones(len(x))])
        residual = x[:, j] - others @ np.linalg.lstsq(others, x[:, j], rcond=None)[0]
        found.append(1 - residual.var() / x[:, j].var())
    return np.array(found)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_r2_is_that_of_a_regression_on_all_others(seed: int) -> None:
    x = samples(seed)
    assert reconstruction_r2(Moments.of(x).covariance) == pytest.approx(r2_by_regression(x), abs=1e-2)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_rank_is_that_of_the_centred_samples(seed: int) -> None:
    x = samples(seed)
    s = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    p = s / s.sum()
    assert effective_rank(Moments.of(x).covariance) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_independent_channels() -> None:
    assert reconstruction_r2(np.diag([1.0, 4.0, 1e-6])) == pytest.approx([0, 0, 0], abs=1e-5)
    assert effective_rank(np.eye(5)) == pytest.approx(5)
    assert effective_rank(np.diag([2.0, 0, 0, 0])) == pytest.approx(1)


def test_copies_and_sums_are_predicted_and_others_are_not() -> None:
    x = np.random.default_rng(0).standard_normal((1000, 4))
    x = np.column_stack([x, x[:, 0] * 3, x[:, 1] - x[:, 2]])
    assert reconstruction_r2(np.cov(x.T)) == pytest.approx([1, 1, 1, 0, 1, 1], abs=0.02)


def test_what_a_layer_norm_ties_together_is_no_redundancy() -> None:
    """Independent channels behind a LayerNorm: each is a function of the others, and none is redundant."""
    rng = np.random.default_rng(0)
    x, gain = rng.standard_normal((20_000, 12)), rng.uniform(0.5, 2, 12)
    x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True) * gain + 1
    assert reconstruction_r2(Moments.of(x).covariance) == pytest.approx(np.ones(12), abs=1e-4)
    assert reconstruction_r2(Moments.of(x).covariance, 1 / gain) == pytest.approx(np.zeros(12), abs=0.01)


def test_a_tie_that_the_data_do_not_show_changes_nothing() -> None:
    cov = Moments.of(samples(1)).covariance
    assert reconstruction_r2(cov, np.ones(7)) == pytest.approx(reconstruction_r2(cov))


def test_dead_channels() -> None:
    x = np.random.default_rng(0).standard_normal((500, 10))
    x[:, :3] *= 1e-3
    x[:, 3] = 0
    found = redundancy(Moments.of(x))
    assert found.dead == pytest.approx(0.4)
    assert redundancy(Moments.of(x), dead=1e-9).dead == pytest.approx(0.1)
    assert np.isnan(reconstruction_r2(Moments.of(x).covariance)[3])
    assert np.isfinite([found.r2_mean, found.r2_median]).all()
    assert 6 < found.effective_rank < 7


def test_a_layer_that_is_dead_altogether() -> None:
    found = redundancy(Moments.of(np.zeros((5, 3))))
    assert (found.width, found.dead, found.effective_rank) == (3, 1.0, 0.0)
    assert np.isnan(found.r2_mean)


def test_a_constant_channel_is_alive_but_explains_nothing() -> None:
    """Dead is about size: a bias that never moves is seen by R^2 and rank, not here."""
    x = np.column_stack([np.ones(50), np.linspace(-1, 1, 50)])
    assert dead_share(Moments.of(x).second) == 0
    assert effective_rank(Moments.of(x).covariance) == pytest.approx(1)
