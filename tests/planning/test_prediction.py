"""Damage curves: through the measured points, monotone, power laws recovered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toast_onnx.planning.prediction import damage_curve

LOSSES = np.append(np.geomspace(100, 0.01, 64), 0.0)


@given(st.floats(0.6, 1.9), st.floats(1e-3, 1e3), st.sets(st.integers(0, 62), min_size=2, max_size=4))
def test_a_power_law_is_found_again(slope: float, scale: float, kept: set[int]) -> None:
    truth = scale * LOSSES**slope
    found = damage_curve(LOSSES, {k: float(truth[k]) for k in kept})
    np.testing.assert_allclose(found[:64], truth[:64], rtol=1e-6)
    assert found[64] == 0


def test_one_point_scales_the_losses() -> None:
    np.testing.assert_allclose(damage_curve(LOSSES, {32: 5.0}), 5.0 * LOSSES / LOSSES[32], rtol=1e-9)


@given(st.dictionaries(st.integers(0, 63), st.floats(0, 10), min_size=1, max_size=6))
def test_fewer_kept_never_hurt_less(measured: dict[int, float]) -> None:
    found = damage_curve(LOSSES, measured)
    assert np.isfinite(found).all()
    assert (np.diff(found) <= 0).all()


def test_dead_channels_cost_nothing_more() -> None:
    losses = np.array([4.0, 1.0, 0.0, 0.0, 0.0])
    found = damage_curve(losses, {1: 0.5})
    assert found[1] == pytest.approx(0.5)
    assert found[2] < 1e-6


@pytest.mark.parametrize("measured", [{}, {64: 1.0}, {-1: 1.0}])
def test_points_must_be_on_the_curve(measured: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="measured points"):
        damage_curve(LOSSES, measured)
