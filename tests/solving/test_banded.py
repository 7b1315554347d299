"""A banded covariance against inverses of the dense one, and the strength it leads to against all scores."""

from __future__ import annotations

import numpy as np
import pytest

from toast_onnx.importance.arithmetic import Processor
from toast_onnx.importance.regular import damping
from toast_onnx.solving import banded
from toast_onnx.solving.banded import BLOCK, Banded
from toast_onnx.solving.linear_algebra import ALIKE, STRENGTHS, Spectrum, best_strength, ridge_solve


def problem(n: int, m: int, count: int, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariance (n, n) of `count` tokens, that with m targets (n, m), and the targets' variances (m,)."""
    rng = np.random.default_rng(n + count)
    x = rng.standard_normal((count, n)) * np.geomspace(3, 0.03, n) @ rng.standard_normal((n, n))
    y = x @ rng.standard_normal((n, m)) + noise * rng.standard_normal((count, m)) * np.sqrt(n)
    return x.T @ x / count, x.T @ y / count, np.square(y).mean(axis=0)


@pytest.mark.parametrize("n", [3, BLOCK, BLOCK + 1, 2 * BLOCK + 7, 6 * BLOCK + 5, 10 * BLOCK])
@pytest.mark.parametrize("share", [0.5, 3])
def test_it_gives_what_the_inverse_gives(n: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "STRIP", 4)
    monkeypatch.setattr(banded, "SOLVED", 4)
    s, c, energy = problem(n, 10, int(share * n) + 1)
    least = damping(s, STRENGTHS[0])
    found = Banded(s, c, energy, least)
    assert found.mean == pytest.approx(np.trace(s) / n)
    for shift in (least, 0.1 * found.mean):
        inverse = np.linalg.inv(s + shift * np.eye(n))
        hat = inverse + shift * inverse @ inverse
        a = hat @ c
        left = energy.sum() - 2 * np.sum(a * c) + np.sum(a * (s @ a))
        assert found.used(shift) == pytest.approx(np.trace(hat @ s), rel=1e-6)
        assert found.left(shift, np.inf) == pytest.approx(left, rel=1e-6, abs=1e-9 * energy.sum())
        assert found.left(shift, 0.0) <= left * (1 + 1e-6) + 1e-9 * energy.sum()
        np.testing.assert_allclose(found.solve(c, shift), a, rtol=1e-6, atol=1e-7 * np.abs(a).max())


@pytest.mark.parametrize("first", [BLOCK, 0])
def test_where_nothing_is_to_be_eliminated_nothing_is(first: int) -> None:
    s, c, energy = problem(2 * BLOCK + 9, 3, 400)
    s[first:] = s[:, first:] = c[first:] = 0.0  # channels without variance
    if first == 0:
        s += 2 * np.eye(len(s)) + 0.5 * (np.eye(len(s), k=1) + np.eye(len(s), k=-1))  # banded already
        c[:] = problem(len(s), 3, 400)[1]
    known, wide = Spectrum(s, c @ c.T, float(energy.sum())), Banded(s, c, energy, damping(s, STRENGTHS[0]))
    shift = 1e-3 * wide.mean
    assert wide.used(shift) == pytest.approx(known.used(shift))
    np.testing.assert_allclose(wide.solve(c, shift), known.solve(c, shift), atol=1e-9)


def test_what_is_not_positive_definite_is_left_to_the_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processor, "banded", 8)
    s, c, energy = problem(70, 4, 300)
    s -= 2 * damping(s, STRENGTHS[0]) * np.eye(70) + np.linalg.eigvalsh(s)[0] * np.eye(70)
    with pytest.raises(np.linalg.LinAlgError):
        Banded(s, c, energy, damping(s, STRENGTHS[0]))
    expected = ridge_solve(s, c, tokens=300, energy=float(energy.sum()))
    np.testing.assert_allclose(ridge_solve(s, c, tokens=300, energy=energy), expected, rtol=1e-9)


@pytest.mark.parametrize("count", [60, 150, 600, 2000, 6000])
@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_scores_that_are_not_needed_change_no_choice(count: int, noise: float) -> None:
    s, c, energy = problem(100, 30, count, noise)
    values, vectors = np.linalg.eigh(s)
    values, seen, scores = np.clip(values, 0, None), np.square(vectors.T @ c).sum(axis=1), []
    least, exact = damping(s, 0.0), 1e-6 * energy.sum()
    shifts = [max(strength * values.mean(), least) for strength in STRENGTHS]
    for shift in shifts:
        fraction = 1 - (shift / (values + shift)) ** 2
        gain = (1 + shift / (values + shift)) / (values + shift)
        left, used = energy.sum() - float(seen @ (gain * (2 - fraction))), 1 + fraction.sum()
        freedom = 1 - ALIKE * used / count
        holds = used < count and left <= exact
        scores.append(0.0 if holds else max(left, exact) / freedom**2 if freedom > 0 else np.inf)
    good = [shift for shift, score in zip(shifts, scores, strict=True) if score <= 1.01 * min(scores)]
    expected = shifts[-1] if np.isinf(min(scores)) else good[0]
    for spectrum in (Spectrum(s, c @ c.T, float(energy.sum())), Banded(s, c, energy, shifts[0])):
        assert best_strength(spectrum, count, float(energy.sum()), least) == pytest.approx(expected)
