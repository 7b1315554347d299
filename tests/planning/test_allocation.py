"""The knapsack against trying every allocation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toast_onnx.planning.allocation import allocate

Groups = list[tuple[list[float], list[float]]]
whole = st.lists(st.tuples(st.integers(-20, 50), st.integers(0, 30)), min_size=1, max_size=5)


def brute(groups: Groups, budget: float) -> float | None:
    """Least damage over all allocations within the budget, None where there is none."""
    best = None
    for chosen in product(*(range(len(c)) for c, _ in groups)):
        if sum(groups[g][0][i] for g, i in enumerate(chosen)) <= budget:
            damage = sum(groups[g][1][i] for g, i in enumerate(chosen))
            best = damage if best is None else min(best, damage)
    return best


@given(st.lists(whole, min_size=1, max_size=5), st.integers(-60, 160))
def test_whole_costs_are_allocated_exactly(groups: list[list[tuple[int, int]]], budget: int) -> None:
    split: Groups = [([float(c) for c, _ in g], [float(d) for _, d in g]) for g in groups]
    expected, found = brute(split, budget), allocate([c for c, _ in split], [d for _, d in split], budget)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.damage == pytest.approx(expected)
    assert found.cost == pytest.approx(sum(c[i] for (c, _), i in zip(split, found.chosen, strict=True)))
    assert found.damage == pytest.approx(sum(d[i] for (_, d), i in zip(split, found.chosen, strict=True)))
    assert found.cost <= budget


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1.0))
def test_real_costs_are_close_to_the_best_and_never_over(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    split: Groups = [
        (sorted(rng.uniform(0, 100, 4).tolist()), sorted(rng.uniform(0, 1, 4).tolist(), reverse=True)) for _ in range(4)
    ]
    low, high = (sum(pick(c) for c, _ in split) for pick in (min, max))
    budget = low + share * (high - low)
    found = allocate([c for c, _ in split], [d for _, d in split], budget)
    assert found is not None
    assert found.cost <= budget + 1e-6
    tighter = brute(split, budget - len(split) * (budget - low) / 10_000)
    assert tighter is not None
    assert found.damage <= tighter + 1e-12


def test_a_width_that_saves_nothing_is_not_bought() -> None:
    # keeping 56 is no faster than 64, keeping 48 is slower than both
    found = allocate([[-3.0, 0.5, 0.0, 0.0]], [[0.9, 0.5, 0.2, 0.0]], 0.0)
    assert found is not None
    assert found.chosen == (3,)


def test_the_rest_of_a_rounded_budget_is_spent() -> None:
    rng = np.random.default_rng(0)
    costs = [np.sort(rng.uniform(0, 1, 50)) for _ in range(40)]
    damages = [np.sort(rng.uniform(0, 1, 50))[::-1] for _ in range(40)]
    budget = sum(float(c.mean()) for c in costs)
    found = allocate(costs, damages, budget)
    assert found is not None
    assert budget - 0.05 < found.cost <= budget


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="1 costs and 2 damages"):
        allocate([[1.0]], [[1.0, 2.0]], 1.0)
