"""A layer's second fit against plain least squares in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from toast_onnx.solving.refit import STRENGTHS, Lack, before_scale, refit


def tokens(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(1, 2, (count, 5)), rng.normal(size=(count, 3)), rng.integers(1, 20, count).astype(float)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_changes_are_those_of_a_penalised_regression(strength: float) -> None:
    x, y, w = tokens(40, 0)
    halves = Lack.of(x[:10], y[:10], w[:10]).merge(Lack.of(x[10:], y[10:], w[10:]))
    weight, bias = halves.change(strength)
    mean = (w[:, None] * x).sum(0) / w.sum()
    if math.isinf(strength):
        expected = np.zeros((5, 3))
    else:
        # stacked rows: the tokens by the root of their weight, and the penalty on every weight
        spread = (w[:, None] * (x - mean) ** 2).sum() / 5
        rows = np.vstack([np.sqrt(w)[:, None] * (x - mean), np.sqrt(strength * spread) * np.eye(5)])
        wanted = np.vstack([np.sqrt(w)[:, None] * (y - (w[:, None] * y).sum(0) / w.sum()), np.zeros((5, 3))])
        expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(weight, expected, atol=1e-10)
    np.testing.assert_allclose(bias, (w[:, None] * (y - x @ expected)).sum(0) / w.sum(), atol=1e-10)


def test_single_precision_keeps_to_double() -> None:
    """Products are taken in the precision of x: close to those in double, and not the same."""
    x, y, w = tokens(4000, 4)
    x = x.astype(np.float32)
    single, double = Lack.of(x, y, w), Lack.of(x.astype(np.float64), y, w)
    assert not np.array_equal(single.inputs.gram, double.inputs.gram)
    for found, expected in zip(single.change(0.1), double.change(0.1), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))
    assert single.total.dtype == single.cross.dtype == np.float64


def test_error_that_is_left_is_that_of_the_tokens() -> None:
    x, y, w = tokens(30, 1)
    weight, bias = np.arange(15.0).reshape(5, 3), np.array([1.0, -2.0, 0.5])
    expected = (w[:, None] * (y - x @ weight - bias) ** 2).sum() / w.sum()
    assert Lack.of(x, y, w).left(weight, bias) == pytest.approx(expected)


def test_other_samples_decide_how_much_is_taken() -> None:
    x, noise, w = tokens(200, 2)
    truth = np.ones((5, 3))
    known = Lack.of(x[:100], x[:100] @ truth + 0.01 * noise[:100], w[:100])
    assert refit(known, Lack.of(x[100:], x[100:] @ truth, w[100:]))[2] == min(STRENGTHS)
    few = Lack.of(x[:6], noise[:6], w[:6])  # nothing but noise
    assert refit(few, Lack.of(x[100:], noise[100:], w[100:]))[2] >= 1


def test_a_bias_alone_restores_the_mean_through_layer_scale() -> None:
    rng = np.random.default_rng(3)
    stream, branch, gamma = rng.standard_normal((50, 4)), rng.standard_normal((50, 4)), rng.random(4) + 0.1
    gamma[2] = 0
    wanted, w = rng.standard_normal((50, 4)), np.ones(50)
    found = Lack.of(np.zeros((50, 0)), before_scale(wanted - stream - branch * gamma, gamma), w)
    weight, bias, strength = refit(found, found)
    assert weight.shape == (0, 4)
    assert math.isinf(strength)
    assert bias[2] == 0
    made = stream + (branch + bias) * gamma
    live = gamma != 0
    np.testing.assert_allclose(made.mean(axis=0)[live], wanted.mean(axis=0)[live])
