"""Factors by halves against LAPACK, and elimination against inverses taken anew in float64."""

from __future__ import annotations

import numpy as np
import pytest

from toast_onnx.importance.blocked import LEAF, TILE, Cholesky, inverse, mirror
from toast_onnx.importance.loss_curves import elimination_order, readout_losses
from toast_onnx.importance.regular import regular
from toast_onnx.importance.second_order import POOL, Elimination, keep_second_order, regular_inverse

SIZES = [1, 7, LEAF, LEAF + 1, 3 * LEAF + 5]


def covariance(n: int, seed: int = 0, count: int | None = None) -> np.ndarray:
    """Covariance (n, n) of channels with a falling spectrum, from 3 n samples or `count`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count or 3 * n + 2, n)) * np.geomspace(1, 0.03, n) @ rng.standard_normal((n, n))
    return np.asarray(x.T @ x / len(x))


@pytest.mark.parametrize("n", SIZES)
def test_inverse_factor_and_solutions_are_those_of_lapack(n: int) -> None:
    s = regular(covariance(n))
    b = np.random.default_rng(1).standard_normal((n, 11))
    known = Cholesky(s)
    scale = np.abs(s).max()
    np.testing.assert_allclose(known.factor, np.linalg.cholesky(s), atol=1e-9 * scale**0.5)
    np.testing.assert_array_equal(np.triu(known.factor, 1), 0)
    reference = np.linalg.solve(s, b)
    np.testing.assert_allclose(known.solve(b), reference, atol=1e-8 * np.abs(reference).max())
    found, reference = inverse(s), np.linalg.inv(s)
    np.testing.assert_allclose(found, reference, atol=1e-8 * np.abs(reference).max())


def test_a_factor_has_the_precision_and_the_shift_that_are_asked_for() -> None:
    s = covariance(2 * LEAF + 3)
    shift = 0.1 * float(np.trace(s)) / len(s)
    known = Cholesky(s, shift, np.float32).factor
    assert known.dtype == np.float32
    expected = np.linalg.cholesky(s + shift * np.eye(len(s)))
    np.testing.assert_allclose(known, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(1, 5), (TILE, TILE), (TILE + 3, 2 * TILE + 1)])
def test_a_mirror_image_is_the_transpose(shape: tuple[int, int]) -> None:
    source, target = np.random.default_rng(0).standard_normal(shape), np.zeros(shape[::-1])
    mirror(source, target)
    np.testing.assert_array_equal(target, source.T)


@pytest.mark.parametrize("n", [5, 2 * LEAF + 3])
def test_what_is_not_positive_definite_is_refused(n: int) -> None:
    s = covariance(n)
    s[-1, -1] = -1.0
    for factor in (inverse, Cholesky):
        with pytest.raises(np.linalg.LinAlgError):
            factor(s)


def eliminated(s: np.ndarray, w: np.ndarray, kept: int, batch: int, labels: np.ndarray) -> np.ndarray:
    """The same choice with an inverse and a solution taken anew after every batch, and no product put off."""
    damped, alive = regular(s), np.arange(len(s))
    while len(alive) > kept * (labels.max() + 1):
        spare = np.bincount(labels[alive]) - kept
        known = np.linalg.inv(damped[np.ix_(alive, alive)])
        rows = known @ damped[alive] @ w
        costs = np.where(spare[labels[alive]] > 0, np.square(rows).sum(axis=1) / np.diagonal(known), np.inf)
        order = np.argsort(costs, kind="stable")
        limit = costs[order[POOL * batch :]].min(initial=np.inf)
        pool, gone = order[: POOL * batch], list[int]()
        while len(gone) < batch:
            stay = np.setdiff1d(np.arange(len(alive)), gone)
            now = np.linalg.inv(damped[np.ix_(alive[stay], alive[stay])])
            rows = now @ damped[alive[stay]] @ w
            cost = np.full(len(alive), np.inf)
            cost[stay] = np.square(rows).sum(axis=1) / np.diagonal(now)
            allowed = [j for j in pool if j in stay and spare[labels[alive[j]]] > 0]
            if not allowed:
                break
            j = min(allowed, key=lambda k: cost[k])
            if len(gone) >= max(1, batch // 4) and cost[j] > limit:
                break
            gone.append(j)
            spare[labels[alive[j]]] -= 1
        alive = np.delete(alive, gone)
    return alive


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (3, 1), (9, 1), (4, 4)])
def test_elimination_is_that_of_inverses_taken_anew(batch: int, groups: int) -> None:
    n = 72
    s, w = covariance(n, 2), np.random.default_rng(3).standard_normal((n, 5))
    labels = np.arange(n) // (n // groups)
    found = keep_second_order(s, w, n // groups // 3, batch, labels)
    np.testing.assert_array_equal(found.reshape(-1), eliminated(s, w, n // groups // 3, batch, labels))


def test_what_waits_to_be_taken_off_counts_at_once() -> None:
    """Costs between two updates of the inverse and of the solution, and behind one, are those of refits."""
    n = 80
    s, w = covariance(n, 11), np.random.default_rng(12).standard_normal((n, 5))
    damped, elimination = regular(s), Elimination(s, w)
    for kept in (77, 66, 59, 31):  # a quarter of 80 may wait
        elimination.run(kept, 3)
        alive = elimination.alive
        known = np.linalg.inv(damped[np.ix_(alive, alive)])
        rows = known @ damped[alive] @ w
        np.testing.assert_allclose(elimination.costs(), np.square(rows).sum(axis=1) / np.diagonal(known), rtol=1e-6)


def test_an_order_ends_with_what_elimination_keeps() -> None:
    n = 96
    s, w = covariance(n, 4), np.random.default_rng(5).standard_normal((n, 6))
    order = elimination_order(s, w, batch=1)
    for kept in (24, 48, 72):
        one = np.zeros(n, np.int64)
        np.testing.assert_array_equal(np.sort(order[:kept]), eliminated(s, w, kept, 1, one))


def test_a_curve_over_several_strips_is_the_error_of_refits() -> None:
    n = 520
    s, w = covariance(n, 6) + np.eye(n), np.random.default_rng(7).standard_normal((n, 3))
    order = np.random.default_rng(8).permutation(n)
    losses = readout_losses(s, w, order)
    for kept in (100, 300, 515):
        at = order[:kept]
        fit = np.zeros_like(w)
        fit[at] = np.linalg.solve(s[np.ix_(at, at)], s[at] @ w)
        assert losses[kept] == pytest.approx(float(np.sum((w - fit) * (s @ (w - fit)))), rel=1e-3)


def test_rounding_beyond_the_diagonal_term_is_made_up_for() -> None:
    """With fewer samples than channels noise leaves eigenvalues below zero; the inverse is positive all the same."""
    rng = np.random.default_rng(9)
    noise = 1e-4 * rng.standard_normal((60, 60))
    s = covariance(60, 10, count=30) + noise + noise.T
    assert np.linalg.eigvalsh(regular(s)).min() < 0
    assert np.linalg.eigvalsh(regular_inverse(s)).min() > 0
    s[5, 6] = s[6, 5] = np.nan
    with pytest.raises(np.linalg.LinAlgError, match="NaN or infinity"):
        regular_inverse(s)


def test_noise_of_both_signs_is_inverted_all_the_same() -> None:
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((16, 16)) * 1e-6
    covariance = noise + noise.T  # what is left where sums cancelled: no covariance at all
    inverse = regular_inverse(covariance)
    assert np.isfinite(inverse).all()
    assert np.linalg.eigvalsh(inverse)[0] > 0
