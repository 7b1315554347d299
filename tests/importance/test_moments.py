"""Moments add up in any order and agree with numpy's own statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toast_onnx.importance.moments import Moments, merge
from toast_onnx.importance.synthetic import context_moments, layer_norm_moments, synthetic_tokens


def test_moments_are_numpys_weighted_statistics() -> None:
    rng = np.random.default_rng(0)
    x, repeats = rng.standard_normal((50, 4)) + 3, rng.integers(1, 5, 50)
    got = Moments.of(x, repeats)
    repeated = np.repeat(x, repeats, axis=0)
    np.testing.assert_allclose(got.mean, repeated.mean(axis=0))
    np.testing.assert_allclose(got.covariance, np.cov(repeated.T, bias=True), atol=1e-12)
    assert got.count == repeats.sum()


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 99), max_size=6, unique=True),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**16),
)
def test_shards_merge_in_any_order(cuts: list[int], order: object, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((100, 5)) * 10 + 1
    shards = [Moments.of(part) for part in np.split(x, sorted(cuts))]
    order.shuffle(shards)  # type: ignore[attr-defined]
    whole, got = Moments.of(x), merge(shards)
    assert got.count == whole.count
    for a, b in ((got.total, whole.total), (got.gram, whole.gram)):
        assert np.linalg.norm(a - b) <= 1e-12 * max(np.linalg.norm(b), 1.0)


def test_a_covariance_that_is_given_stays_as_it_is_beside_a_large_mean() -> None:
    """Taken off the sum of products again, it would have lost its digits to the mean."""
    rng = np.random.default_rng(4)
    mean, covariance = rng.standard_normal(5) * 1e6, np.cov(rng.standard_normal((5, 40)))
    got = Moments.known(mean, covariance, 30.0, 25.0)
    np.testing.assert_array_equal(got.covariance, covariance)
    assert not got.covariance.flags.writeable
    assert covariance.flags.writeable
    np.testing.assert_allclose(got.gram, 30 * (covariance + np.outer(mean, mean)))
    both = got.merge(Moments.known(-mean, covariance, 30.0, 5.0))
    np.testing.assert_allclose(both.gram, 60 * (covariance + np.outer(mean, mean)))
    assert (both.count, both.tokens) == (60.0, 30.0)
    np.testing.assert_allclose(both.mean, 0, atol=1e-9)


def test_moments_reject_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Moments(1.0, np.zeros(3), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="count"):
        Moments(0.0, np.zeros(2), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="does not fit"):
        Moments.known(np.zeros(3), np.zeros((2, 2)))


def test_linear_maps_carry_moments_exactly() -> None:
    rng = np.random.default_rng(1)
    x, w, b = rng.standard_normal((200, 6)), rng.standard_normal((6, 2, 3)), rng.standard_normal((2, 3))
    got = Moments.of(x).through(w, b)
    y = np.einsum("nc,chd->hnd", x, w) + b[:, None]
    for h in range(2):
        np.testing.assert_allclose(got.mean[h], y[h].mean(axis=0))
        np.testing.assert_allclose(got.second[h], y[h].T @ y[h] / 200)


def test_synthetic_tokens_have_the_moments_in_closed_form() -> None:
    gain, bias = np.array([0.5, 2.0, 1.0]), np.array([1.0, -1.0, 0.0])
    expected, got = layer_norm_moments(gain, bias), Moments.of(synthetic_tokens(gain, bias, 200_000, seed=3))
    np.testing.assert_allclose(got.mean, expected.mean, atol=0.02)
    np.testing.assert_allclose(got.covariance, expected.covariance, atol=0.05)
    np.testing.assert_array_equal(synthetic_tokens(gain, bias, 5, 3), synthetic_tokens(gain, bias, 5, 3))


def test_moments_of_synthetic_tokens_behind_layers() -> None:
    rng = np.random.default_rng(2)
    c, heads, d = 8, 2, 3
    wq, wv = (rng.standard_normal((c, heads, d)) for _ in range(2))
    bq, bv = (rng.standard_normal((heads, d)) for _ in range(2))
    gain, bias = rng.random(c) + 0.5, rng.standard_normal(c)
    tokens = layer_norm_moments(gain, bias)
    queries, context = tokens.through(wq, bq), context_moments(tokens, wv, bv)
    for h in range(heads):
        mean_q = bias @ wq[:, h] + bq[h]
        covariance = (wq[:, h] * gain[:, None] ** 2).T @ wq[:, h]
        np.testing.assert_allclose(queries.covariance[h], covariance)
        np.testing.assert_allclose(queries.second[h], covariance + np.outer(mean_q, mean_q))
        block = context.covariance[h * d : h * d + d, h * d : h * d + d]
        np.testing.assert_allclose(block, (wv[:, h] * gain[:, None] ** 2).T @ wv[:, h])
    np.testing.assert_allclose(context.mean, bv.reshape(-1))
