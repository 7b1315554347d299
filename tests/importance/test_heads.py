"""Which heads a read-out can lose, against least squares on the contexts themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toast_onnx.importance.head_ranking import rank_heads, removal_cost
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.second_order import without

TOKENS, H, D, OUT = 200, 4, 3, 5


class Case:
    """Correlated contexts of a few heads with means of their own, and a read-out."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.contexts = rng.standard_normal((TOKENS, H * D)) @ rng.standard_normal(
            (H * D, H * D)
        ) + rng.standard_normal(H * D)
        self.wo = rng.standard_normal((H, D, OUT)) * rng.uniform(0.2, 2, (H, 1, 1))
        self.moments = Moments.of(self.contexts)
        self.outputs = self.contexts @ self.wo.reshape(H * D, OUT)

    def channels(self, heads: list[int]) -> np.ndarray:
        return (np.array(sorted(heads), int)[:, None] * D + np.arange(D)).reshape(-1)

    def refitted_error(self, kept: list[int]) -> float:
        """Mean squared error of the outputs after least squares with an intercept on the kept heads' contexts."""
        x = np.column_stack([self.contexts[:, self.channels(kept)], np.ones(TOKENS)])
        residual = self.outputs - x @ np.linalg.lstsq(x, self.outputs, rcond=None)[0]
        return float((residual**2).sum() / TOKENS)

    def plain_error(self, kept: list[int], centred: bool) -> float:
        """The same with the kept rows as they are; centred with the mean restored."""
        lost = [h for h in range(H) if h not in kept]
        missing = self.contexts[:, self.channels(lost)] @ self.wo[sorted(lost)].reshape(-1, OUT)
        return float(((missing - (missing.mean(axis=0) if centred else 0)) ** 2).sum() / TOKENS)


def greedy(error: object, heads: int = H) -> list[int]:
    """Heads by brute force, the one that stays longest first."""
    alive, gone = list(range(heads)), []
    while alive:
        cheapest = min(alive, key=lambda h: error([k for k in alive if k != h]))  # type: ignore[operator]
        alive.remove(cheapest)
        gone.append(cheapest)
    return gone[::-1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16))
def test_elimination_with_refit_is_that_of_least_squares(seed: int) -> None:
    case = Case(seed)
    assert rank_heads(case.moments.covariance, case.wo, refitted=True).tolist() == greedy(case.refitted_error)


@pytest.mark.parametrize("centred", [True, False])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_elimination_without_refit_is_that_of_the_missing_energy(centred: bool, seed: int) -> None:
    case = Case(seed)
    second = case.moments.covariance if centred else case.moments.second
    found = rank_heads(second, case.wo, refitted=False).tolist()
    assert found == greedy(lambda kept: case.plain_error(kept, centred))


def test_the_costs_of_removals_add_up_to_the_error_of_the_last_refit() -> None:
    case = Case(3)
    inverse, rows = np.linalg.inv(case.moments.covariance), case.wo.reshape(H * D, OUT)
    first = removal_cost(inverse, rows, case.channels([2]))
    assert first == pytest.approx(case.refitted_error([0, 1, 3]))
    inverse, rows, stay = without(inverse, rows, case.channels([2]))
    assert stay.tolist() == case.channels([0, 1, 3]).tolist()
    second = removal_cost(inverse, rows, case.channels([2]))  # head 3, moved one place down
    assert first + second == pytest.approx(case.refitted_error([0, 1]))


def test_one_of_two_alike_heads_goes_first() -> None:
    case = Case(5)
    case.wo *= np.array([1, 30, 1, 30])[:, None, None]  # by weight the dearest two
    case.contexts[:, case.channels([3])] = case.contexts[:, case.channels([1])]
    second = Moments.of(case.contexts).covariance
    refitted, plain = (rank_heads(second, case.wo, refitted=r).tolist() for r in (True, False))
    assert refitted[-1] in (1, 3)
    assert refitted[0] in (1, 3)  # and the other one is then worth both
    assert plain[-1] not in (1, 3)


def test_a_head_that_is_never_read_goes_first() -> None:
    case = Case(7)
    case.wo[0] = 0
    for refitted in (True, False):
        assert rank_heads(case.moments.covariance, case.wo, refitted=refitted)[-1] == 0
