"""What makes covariances invertible: enough against the rounding of float32 sums, too little to matter otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from toast_onnx.importance.regular import DOUBLE, SINGLE, regular


@pytest.mark.parametrize(("tokens", "channels"), [(40, 60), (300, 500)])
@pytest.mark.parametrize("seed", range(5))
def test_rounding_leaves_no_eigenvalue_below_zero(tokens: int, channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, channels)) * np.geomspace(10, 0.1, channels) @ rng.standard_normal((channels,) * 2)
    stored = (x.T @ x / tokens).astype(np.float32).astype(np.float64)
    exact = np.linalg.eigvalsh(stored)
    assert exact[0] < 0  # rounding did move eigenvalues that should be zero
    least = np.linalg.eigvalsh(regular(stored, 0.0))[0]
    assert least > -exact[0] / 2  # far enough from zero that no direction of noise is blown up
    assert least < 1e-5 * exact.mean()


def test_the_strength_is_relative_to_the_mean_eigenvalue() -> None:
    s = np.diag([1.0, 2.0, 3.0])
    np.testing.assert_allclose(regular(s, 0.1) - s, 0.2 * np.eye(3))
    np.testing.assert_allclose(regular(100 * s, 0.1), 100 * regular(s, 0.1))
    np.testing.assert_allclose(regular(s, 0.0, DOUBLE), s, rtol=1e-14)


def test_nothing_at_all_is_invertible() -> None:
    for strength, eps in ((1e-6, SINGLE), (0.0, DOUBLE)):
        assert np.isfinite(np.linalg.inv(regular(np.zeros((3, 3)), strength, eps))).all()
