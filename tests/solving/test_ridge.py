"""The ridge's strength: next to nothing with plenty of tokens, with few what serves tokens that were not measured."""

from __future__ import annotations

import numpy as np
import pytest

from toast_onnx.importance.ffn import select_ffn_second_order
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.regular import damping
from toast_onnx.solving.ffn import solve_ffn
from toast_onnx.solving.linear_algebra import (
    ALIKE,
    STRENGTHS,
    Ridge,
    Spectrum,
    best_strength,
    ridge_operator,
    ridge_solve,
    ridge_strength,
)
from toast_onnx.solving.vo import solve_vo_subspace


def values_mean(s: np.ndarray) -> float:
    return float(np.trace(s)) / len(s)


def tokens_of(count: int, channels: int, seed: int) -> np.ndarray:
    """Tokens whose channels share directions, and each have something of their own."""
    mix = np.random.default_rng(7).standard_normal((channels, channels)) * np.geomspace(3, 0.03, channels)
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, channels)) @ mix.T + rng.standard_normal((count, channels))


def reference(s: np.ndarray, c: np.ndarray, tokens: float, energy: float) -> list[float]:
    """Generalized cross-validation by its definition, with the hat matrix of the refined solution."""
    n = len(s)
    found = []
    for strength in STRENGTHS:
        shift = strength * np.trace(s) / n * np.eye(n)
        inverse = np.linalg.inv(s + shift)
        hat = inverse + inverse @ shift @ inverse  # of one refinement
        a = hat @ c
        left = energy - 2 * np.sum(a * c) + np.sum(a * (s @ a))
        found.append(left / (1 - ALIKE * (1 + np.trace(hat @ s)) / tokens) ** 2)
    return found


def chosen(s: np.ndarray, c: np.ndarray, tokens: float, energy: float) -> float:
    """The strength that is chosen, as a fraction of the mean eigenvalue."""
    return best_strength(Spectrum(s, c @ c.T, energy), tokens, energy, 0.0) / values_mean(s)


@pytest.mark.parametrize("count", [500, 1000, 1500])
def test_it_is_generalized_cross_validation(count: int) -> None:
    x, y = tokens_of(count, 20, 1), tokens_of(count, 30, 1)[:, :6]
    y = y + 0.5 * np.random.default_rng(2).standard_normal(y.shape)
    s, c, energy = x.T @ x / count, x.T @ y / count, float(np.square(y).sum() / count)
    scores = reference(s, c, count, energy)
    good = [strength for strength, score in zip(STRENGTHS, scores, strict=True) if score <= 1.01 * min(scores)]
    assert chosen(s, c, count, energy) == pytest.approx(good[0])
    solved = ridge_solve(s, c, tokens=count, energy=energy)
    once = np.linalg.solve(s + good[0] * values_mean(s) * np.eye(20), c)
    twice = once + np.linalg.solve(s + good[0] * values_mean(s) * np.eye(20), c - s @ once)
    np.testing.assert_allclose(solved, twice, rtol=1e-6, atol=1e-9)


def test_exact_targets_take_the_least_and_too_few_tokens_the_greatest() -> None:
    x = tokens_of(200, 20, 3)
    s = x.T @ x / 200
    w = np.random.default_rng(4).standard_normal((20, 5))
    energy = float(np.trace(w.T @ s @ w))
    assert chosen(s, s @ w, 200, energy) == pytest.approx(STRENGTHS[0])
    assert chosen(s, s @ w, 22, energy) == pytest.approx(STRENGTHS[0])
    assert chosen(s, s @ w, 20, energy) == pytest.approx(STRENGTHS[-1])
    plenty = ridge_solve(s, s @ w, tokens=1e9)
    np.testing.assert_allclose(plenty, w, rtol=1e-4, atol=1e-4)


def held_out_error(count: int, ridge: float | str) -> float:
    """Error of a pruned FFN on tokens that were not measured, against its error with the means alone."""
    w2, b2 = np.random.default_rng(5).standard_normal((60, 10)), np.zeros(10)
    seen, new = np.repeat(tokens_of(count // ALIKE, 60, 11), ALIKE, axis=0), tokens_of(4000, 60, 12)
    seen += 0.1 * tokens_of(len(seen), 60, 13)  # tokens of an image are alike
    known = Moments.of(seen)
    stored = Moments(1.0, known.mean, known.covariance.astype(np.float32) + np.outer(known.mean, known.mean), count)
    kept = select_ffn_second_order(stored, w2, 40)
    errors = []
    for compensation, strength in (("ridge", ridge), ("bias", "auto")):
        solved = solve_ffn(kept, w2, b2, stored, compensation, strength)  # type: ignore[arg-type]
        errors.append(np.square(new[:, kept] @ solved.w2 + solved.b2 - new @ w2).sum())
    return float(errors[0] / errors[1])


@pytest.mark.parametrize("count", [40, 200, 400, 800, 2000, 8000])
def test_however_few_the_tokens_the_ridge_is_better_than_none(count: int) -> None:
    assert held_out_error(count, "auto") < 0.7


@pytest.mark.parametrize("count", [800, 2000])
def test_with_few_tokens_the_ridge_is_better_than_next_to_nothing(count: int) -> None:
    assert held_out_error(count, "auto") < 0.95 * held_out_error(count, STRENGTHS[0])


def test_values_fall_back_to_the_plain_projection_not_to_zero() -> None:
    rng = np.random.default_rng(6)
    heads, d, channels = 3, 6, 9
    wv, bv = rng.standard_normal((channels, heads, d)), rng.standard_normal((heads, d))
    wo, bo = rng.standard_normal((heads, d, channels)), rng.standard_normal(channels)
    context = Moments.of(tokens_of(50, heads * d, 8))
    strong = solve_vo_subspace(wv, bv, wo, bo, context, 4, ridge=1e9)
    # both are W A A^T W_o for every head, whatever basis A was found
    through = np.einsum("chr,hro->hco", strong.wv, strong.wo)
    for h in range(heads):
        basis, _ = np.linalg.qr(np.linalg.lstsq(wv[:, h], strong.wv[:, h], rcond=None)[0])
        np.testing.assert_allclose(through[h], wv[:, h] @ basis @ basis.T @ wo[h], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "ridge"), [(300.0, "auto"), (1e9, "auto"), (300.0, 1e-3)])
def test_the_operator_is_what_solutions_multiply_by(tokens: float, ridge: Ridge) -> None:
    x, y = tokens_of(300, 20, 1), tokens_of(300, 30, 1)[:, :6]
    s, c, energy = x.T @ x / 300, x.T @ y / 300, np.square(y).sum(axis=0) / 300
    strength = ridge_strength(s, c, ridge, tokens=tokens, energy=energy)
    operator = ridge_operator(s, strength, refined=ridge == "auto")
    solved = ridge_solve(s, c, ridge, tokens=tokens, energy=energy)
    np.testing.assert_allclose(operator @ c, solved, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(operator, operator.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("leading", [1.0, 30.0, 1000.0])
def test_what_targets_share_with_channels_may_be_read_off_its_products(leading: float) -> None:
    """The bound that `Spectrum` names, where one direction holds nearly everything."""
    n = 300
    x = tokens_of(1000, n, 1)
    x[:, 0] *= leading
    y = x @ np.random.default_rng(3).standard_normal((n, 40)) / n
    s, c, energy = x.T @ x / 1000, x.T @ y / 1000, float(np.square(y).sum() / 1000)
    values, vectors = np.linalg.eigh(s)
    least = damping(s, 0.0)
    gain = (1 + least / (values + least)) / (values + least)
    seen = np.square(vectors.T @ c).sum(axis=1)
    left = energy - float(seen @ (gain * (2 - values * gain)))
    assert abs(Spectrum(s, c @ c.T, energy).left(least, np.inf) - left) < 1e-9 * n * energy


@pytest.mark.parametrize("ridge", ["auto", 0.0, 1e-12])
def test_sums_that_rounding_left_indefinite_are_solved_all_the_same(ridge: Ridge) -> None:
    """With fewer tokens than channels, in float32 as statistics are stored: the inverse needs pivots."""
    x = tokens_of(12, 40, 1)
    s = (x.T @ x / 12).astype(np.float32).astype(np.float64)
    assert np.linalg.eigvalsh(s)[0] < 0
    c = s[:, :5]
    strength = ridge_strength(s, c, ridge, tokens=1e9, energy=np.diagonal(s)[:5])
    operator = ridge_operator(s, strength, refined=ridge == "auto")
    solved = ridge_solve(s, c, ridge, tokens=1e9, energy=1.0)
    assert np.isfinite(operator).all()
    np.testing.assert_allclose(s @ operator @ c, s @ solved, atol=1e-4 * np.abs(s).max())
    heads, d = 4, 10
    rng = np.random.default_rng(3)
    wv, wo = rng.standard_normal((20, heads, d)), rng.standard_normal((heads, d, 20))
    context = Moments(12.0, x.sum(axis=0), 12 * s, 12.0)
    new = solve_vo_subspace(wv, np.zeros((heads, d)), wo, np.zeros(20), context, 5, ridge=ridge)
    assert np.isfinite(new.wo).all()
