"""The way that few tokens take, against inverses of the dense covariance and cross-validation by its definition."""

from __future__ import annotations

import numpy as np
import pytest

from toast_onnx.importance.arithmetic import Processor
from toast_onnx.importance.regular import damping
from toast_onnx.solving import factored, linear_algebra
from toast_onnx.solving.factored import Factored, used_by
from toast_onnx.solving.linear_algebra import ALIKE, STRENGTHS, ridge_solve


def problem(n: int, m: int, count: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariance (n, n) of `count` tokens, that with m targets (n, m), and the targets' variances (m,)."""
    rng = np.random.default_rng(n + count)
    x = rng.standard_normal((count, n)) * np.geomspace(3, 0.1, n) @ rng.standard_normal((n, n))
    y = x @ rng.standard_normal((n, m)) + noise * rng.standard_normal((count, m)) * np.sqrt(n)
    return x.T @ x / count, x.T @ y / count, np.square(y).mean(axis=0)


def hat_of(s: np.ndarray, shift: float) -> np.ndarray:
    """What the refined solution multiplies targets by."""
    inverse = np.linalg.inv(s + shift * np.eye(len(s)))
    return np.asarray(inverse + shift * inverse @ inverse)


def cross_validated(s: np.ndarray, c: np.ndarray, energy: np.ndarray, tokens: float) -> np.ndarray:
    """The solution at the strength with the least score, all six scores being known."""
    scores, whole = {}, energy.sum()
    for strength in STRENGTHS:
        shift = max(strength * np.trace(s) / len(s), damping(s, 0.0))
        a = hat_of(s, shift) @ c
        left, used = whole - 2 * np.sum(a * c) + np.sum(a * (s @ a)), 1 + np.trace(hat_of(s, shift) @ s)
        if left <= 1e-6 * whole and used < tokens:
            return a
        scores[shift] = left / (1 - ALIKE * used / tokens) ** 2 if ALIKE * used < tokens else np.inf
    least = min(scores.values())
    return hat_of(s, max(scores) if np.isinf(least) else min(k for k, v in scores.items() if v <= 1.01 * least)) @ c


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_it_gives_what_the_inverse_gives(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factored, "STRIP", 4)
    s, c, energy = problem(150, 10, 400, noise)
    least = damping(s, STRENGTHS[0])
    found = Factored(s, c, energy, least, 12.0)
    assert (found.size, found.mean, found.used(least)) == (150, pytest.approx(np.trace(s) / 150), 12.0)
    for shift in (least, 0.1 * found.mean):
        a = hat_of(s, shift) @ c
        left = energy.sum() - 2 * np.sum(a * c) + np.sum(a * (s @ a))
        assert found.left(shift, np.inf) == pytest.approx(left, rel=1e-6, abs=1e-9 * energy.sum())
        assert found.left(shift, 0.0) <= left * (1 + 1e-6) + 1e-9 * energy.sum()
        np.testing.assert_allclose(found.solve(c, shift), a, rtol=1e-6, atol=1e-7 * np.abs(a).max())


def test_a_part_of_the_channels_uses_no_more_than_all() -> None:
    s, _, _ = problem(150, 1, 400, 0.0)
    for strength in STRENGTHS[2:]:
        shift = strength * np.trace(s) / 150
        part, whole = used_by(s[:60, :60], shift), used_by(s, shift)
        assert whole == pytest.approx(np.trace(hat_of(s, shift) @ s), rel=1e-6)
        assert part == pytest.approx(np.trace(hat_of(s[:60, :60], shift) @ s[:60, :60]), rel=1e-6)
        assert part <= min(60, whole)


@pytest.mark.parametrize(
    ("count", "few"), [(16, False), (150, False), (250, True), (600, True), (2600, False), (5000, False)]
)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_strength_is_that_of_all_scores(
    count: int, few: bool, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processor, "banded", 8)
    taken = []
    for name in ("Banded", "Factored"):
        kind = getattr(linear_algebra, name)
        monkeypatch.setattr(linear_algebra, name, lambda *given, kind=kind: (taken.append(kind), kind(*given))[1])
    s, c, energy = problem(200, 30, count, noise)
    expected = cross_validated(s, c, energy, count)
    found = ridge_solve(s, c, tokens=count, energy=energy)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert [kind is Factored for kind in taken] == [few]
