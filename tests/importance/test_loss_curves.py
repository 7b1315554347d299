"""Loss curves against regressions done one count at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from toast_onnx.importance.loss_curves import by_head, elimination_order, readout_losses, tail_energies
from toast_onnx.importance.second_order import keep_second_order

Array = NDArray[np.float64]


def problem(seed: int, n: int = 9, m: int = 4, samples: int = 60) -> tuple[Array, Array]:
    """Samples (samples, n) of correlated channels, and a read-out (n, m)."""
    rng = np.random.default_rng(seed)
    mixing = rng.uniform(0.5, 2, n)[:, None] * np.linalg.qr(rng.standard_normal((n, n)))[0]  # well conditioned
    return rng.standard_normal((samples, n)) @ mixing + 1.0, rng.standard_normal((n, m))


@given(st.integers(0, 999))
def test_ridge_curve_is_the_residual_of_least_squares(seed: int) -> None:
    x, w = problem(seed)
    order = np.random.default_rng(seed).permutation(9)
    found = readout_losses(np.cov(x.T, bias=True), w, order)
    y = x @ w
    for kept in range(10):
        design = np.column_stack([np.ones(len(x)), x[:, order[:kept]]])
        residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        assert found[kept] == pytest.approx(np.square(residual).sum() / len(x), rel=1e-3, abs=1e-4 * found[0])


@given(st.integers(0, 999))
def test_plain_curves_are_the_energy_of_what_is_dropped(seed: int) -> None:
    x, w = problem(seed)
    order = np.random.default_rng(seed).permutation(9)
    centred = x - x.mean(axis=0)
    none = readout_losses(x.T @ x / len(x), w, order, "none")
    bias = readout_losses(centred.T @ centred / len(x), w, order, "bias")
    for kept in range(10):
        gone = order[kept:]
        scale = max(none[0], 1.0)
        assert none[kept] == pytest.approx(np.square(x[:, gone] @ w[gone]).sum() / len(x), abs=1e-9 * scale)
        assert bias[kept] == pytest.approx(np.square(centred[:, gone] @ w[gone]).sum() / len(x), abs=1e-9 * scale)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_elimination_keeps_what_second_order_keeps(n: int) -> None:
    x, w = problem(3, n, 6, 400)
    s = np.cov(x.T, bias=True).reshape(n, n)
    order = elimination_order(s, w, batch=1)
    assert sorted(order) == list(range(n))
    for kept in {max(1, round(n * share)) for share in (1 / 16, 0.25, 0.5, 0.75)}:  # stops of the elimination
        np.testing.assert_array_equal(np.sort(order[:kept]), keep_second_order(s, w, kept))


def test_tail_energies() -> None:
    np.testing.assert_allclose(tail_energies([[3.0, 2.0, 1.0], [2.0, 1.0, 0.0]]), [19, 6, 1, 0])


def test_heads_take_turns() -> None:
    np.testing.assert_array_equal(by_head([[0.1, 0.9], [0.7, 0.2]]), [1, 2, 0, 3])


def test_dead_and_duplicated_channels_are_free() -> None:
    x, w = problem(1, 4, 3, 50)
    x = np.column_stack([x, x[:, 0], np.zeros(len(x))])
    w = np.vstack([w, np.ones((2, 3))])
    found = readout_losses(np.cov(x.T, bias=True), w, [0, 1, 2, 3, 4, 5])
    assert found[4] == pytest.approx(0, abs=1e-4 * found[0])
