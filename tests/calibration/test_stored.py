"""Activations in files: what is written comes back, also where it is made from what the file held before."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from toast_onnx_calibration.stored import store_values


def test_new_values_may_be_made_from_the_old_ones_of_the_same_file(tmp_path: Path) -> None:
    batches = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    old = store_values(tmp_path / "x.npy", iter(batches), 5)
    new = store_values(tmp_path / "x.npy", (np.repeat(batch, 2, axis=-1) for batch in old), 5)
    np.testing.assert_array_equal(old, batches)  # its map stays valid
    np.testing.assert_array_equal(new, np.repeat(batches, 2, axis=-1))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), new)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
