"""The corrected bias gives back the dense mean, through layer scale too."""

from __future__ import annotations

import numpy as np

from toast_onnx.solving.means import match_mean


def test_mean_after_the_block_is_the_dense_one() -> None:
    rng = np.random.default_rng(0)
    stream, branch, gamma = rng.standard_normal((50, 4)), rng.standard_normal((50, 4)), rng.random(4) + 0.1
    b2, dense_mean = rng.standard_normal(4), rng.standard_normal(4)
    pruned = stream + (branch + b2) * gamma
    corrected = match_mean(b2, dense_mean, pruned.mean(axis=0), gamma)
    np.testing.assert_allclose((stream + (branch + corrected) * gamma).mean(axis=0), dense_mean)


def test_channels_switched_off_keep_their_bias() -> None:
    got = match_mean(np.ones(2, dtype=np.float32), [5.0, 5.0], [2.0, 2.0], [0.0, 1.0])
    np.testing.assert_array_equal(got, np.array([1, 4], dtype=np.float32))
    assert got.dtype == np.float32
