"""The predicted error of a smaller layer against that of its outputs on samples."""

from __future__ import annotations

import numpy as np
import pytest

from toast_onnx.choosing import losses


@pytest.mark.parametrize("n", [5, 8, 21])
def test_it_is_the_error_of_the_outputs(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "ROWS", 8)
    rng = np.random.default_rng(n)
    x, w, kept = rng.standard_normal((50, n)), rng.standard_normal((n, 4)), np.arange(1, n, 2)
    new = w[kept] + 0.3 * rng.standard_normal((kept.size, 4))
    expected = np.linalg.norm(x @ w - x[:, kept] @ new) / np.linalg.norm(x @ w)
    assert losses._readout_error(x.T @ x / 50, w, kept, new) == pytest.approx(expected, rel=1e-7)
