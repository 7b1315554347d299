"""The surface through measured schedules against SciPy's least squares, and the schedule it finds against a grid."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import least_squares

from toast_onnx.planning import surface as module
from toast_onnx.planning.surface import Surface, fit_surface, least_damage, tokens_left, within

Array = NDArray[np.float64]


def schedules(rng: np.random.Generator, count: int, merges: int) -> Array:
    return rng.uniform(0, 0.4, (count, merges))


def test_tokens_left_are_counted_for_each_sequence_alone() -> None:
    left = tokens_left(np.array([0.5, 0.5, 0.1, 0.2]), (2, 2))
    np.testing.assert_allclose(left, [1, 0.5, 1, 0.9])


def test_a_surface_is_found_again_from_its_own_damages() -> None:
    rng = np.random.default_rng(0)
    true = Surface(np.exp(np.linspace(1, -3, 6)), 1.9, 1.2, (6,))  # smooth: what the fit pulls towards
    shares = schedules(rng, 60, 6)
    found = fit_surface(shares, np.array([true.damage(s) for s in shares]), (6,))
    fresh = schedules(rng, 20, 6)
    for s in fresh:
        assert found.damage(s) == pytest.approx(true.damage(s), rel=0.05)


def test_the_fit_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    shares = schedules(rng, 25, 5)
    damages = rng.uniform(0.01, 0.3, 25)  # no surface fits these: the residuals matter
    found = fit_surface(shares, damages, (3, 2))
    left = tokens_left(shares, (3, 2))

    def residuals(x: Array) -> Array:
        made = (shares ** x[5] / left ** x[6]) @ np.exp(x[:5])
        bends, slopes = x[0] - 2 * x[1] + x[2], [x[1] - x[0], x[2] - x[1], x[4] - x[3]]
        powers = [0.1 * (x[5] - 1.75), 0.1 * (x[6] - 1.0)]
        return np.r_[np.log(made + 0.003) - np.log(damages + 0.003), 0.3 * bends, 0.06 * np.array(slopes), powers]

    low, high = [-14.0] * 5 + [1.05, 0.0], [8.0] * 5 + [3.0, 3.0]
    theirs = least_squares(residuals, [0.0] * 5 + [1.75, 1.0], bounds=(low, high), xtol=1e-12, ftol=1e-12)
    ours = residuals(np.r_[np.log(found.weights), found.growth, found.compound])
    assert 0.5 * ours @ ours <= theirs.cost * (1 + 1e-4)


def test_least_damage_is_that_of_a_grid() -> None:
    surface = Surface(np.array([3.0, 1.0, 0.2]), 2.0, 1.0, (3,))

    def cost(shares: Array) -> float:
        return float(1 + np.cumprod(1 - shares).sum()) / 4

    budget = 0.7
    found = least_damage(surface, cost, budget, np.full(3, 0.05))
    assert found is not None
    assert cost(found) <= budget + 1e-9
    line = np.linspace(0, 0.5, 51)
    grid = (np.array(s) for s in product(line, line, line))
    best = min(surface.damage(s) for s in grid if cost(s) <= budget)
    assert surface.damage(found) <= best * 1.01


def test_what_cannot_be_reached_is_none() -> None:
    surface = Surface(np.ones(2), 2.0, 1.0, (2,))
    assert least_damage(surface, lambda s: 1 - 0.1 * float(s.sum()), 0.5, np.full(2, 0.05)) is None
    assert within(np.zeros(2), lambda s: 1 - float(s.sum()), 0.5) is None
    assert module.MOST == 0.5
