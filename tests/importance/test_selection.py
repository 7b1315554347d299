"""Which channels stay: top-k is deterministic, second-order removal is the exact greedy one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toast_onnx.importance.second_order import default_batch, keep_second_order
from toast_onnx.importance.selection import dropped, top_k


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=20), data=st.data())
def test_top_k_keeps_the_highest_and_breaks_ties_low(scores: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:kept])
    got = top_k(np.array([scores, scores]), kept)
    assert got.tolist() == [expected, expected]
    assert sorted([*expected, *dropped(got[0], len(scores))]) == list(range(len(scores)))


def test_top_k_keeps_pairs_together() -> None:
    pairs = [[0, 3], [1, 4], [2, 5]]
    assert top_k([5.0, 1, 0, -4, 2, 2], 4, pairs).tolist() == [1, 2, 4, 5]
    with pytest.raises(ValueError, match="twos"):
        top_k(np.zeros(6), 3, pairs)


@pytest.mark.parametrize("kept", [0, 4])
def test_top_k_refuses_impossible_counts(kept: int) -> None:
    with pytest.raises(ValueError, match="cannot keep"):
        top_k(np.zeros(3), kept)


def refit_error(s: np.ndarray, w: np.ndarray, kept: list[int]) -> float:
    """Squared error of y = x w when only `kept` are read, by least squares on the covariance."""
    fit = np.linalg.pinv(s[np.ix_(kept, kept)]) @ s[kept] @ w
    full = np.zeros_like(w)
    full[kept] = fit
    return float(np.trace((w - full).T @ s @ (w - full)))


def greedy(s: np.ndarray, w: np.ndarray, kept: int) -> list[int]:
    alive = list(range(len(s)))
    while len(alive) > kept:
        gone = min(alive, key=lambda j: refit_error(s, w, [i for i in alive if i != j]))
        alive.remove(gone)
    return alive


@pytest.mark.parametrize("seed", range(3))
def test_one_by_one_removal_is_greedy_with_exact_refits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((9, 9))
    s, w = mix @ mix.T, rng.standard_normal((9, 4))
    assert keep_second_order(s, w, 4).tolist() == greedy(s, w, 4)


def test_groups_keep_the_same_number() -> None:
    rng = np.random.default_rng(5)
    mix = rng.standard_normal((12, 12)) * np.repeat([0.01, 1, 5], 4)[:, None]
    kept = keep_second_order(mix @ mix.T, rng.standard_normal((12, 3)), 2, batch=5, groups=np.repeat(range(3), 4))
    assert kept.shape == (3, 2)
    assert (kept // 4 == np.arange(3)[:, None]).all()


def test_dead_and_duplicated_channels_go_first() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((300, 8))
    x[:, 2], x[:, 5] = 0, x[:, 1]
    kept = keep_second_order(np.cov(x.T), rng.standard_normal((8, 4)), 6, batch=1)
    assert 2 not in kept
    assert len({1, 5} & set(kept.tolist())) == 1


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_one_of_two_alike_channels_stays_however_many_go_at_once(batch: int) -> None:
    """Each of the two costs nothing to remove, both together cost much; sums are float32, as a session gives them."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((500, 10)).astype(np.float32)
    both = np.concatenate([x, x], axis=1)
    covariance = (both.T @ both / 500).astype(np.float64) + 1e-7 * rng.standard_normal((20, 20))
    kept = keep_second_order((covariance + covariance.T) / 2, rng.standard_normal((20, 3)), 10, batch)
    assert sorted(kept % 10) == list(range(10))


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot keep"):
        keep_second_order(np.eye(3), np.eye(3), 4)
    with pytest.raises(ValueError, match="batches"):
        keep_second_order(np.eye(3), np.eye(3), 2, batch=0)
    assert [default_batch(n) for n in (10, 768, 3072)] == [1, 12, 48]
