"""Activations in files: what is written comes back, also where it is made from what the file held before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from tests import zoo
from tests.pruning import look
from toast_onnx.matching.span import block_span
from toast_onnx.runtime import run_model
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.stored import scratch_rows, store_values, whole_session


def test_new_values_may_be_made_from_the_old_ones_of_the_same_file(tmp_path: Path) -> None:
    batches = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    old = store_values(tmp_path / "x.npy", iter(batches), 5)
    new = store_values(tmp_path / "x.npy", (np.repeat(batch, 2, axis=-1) for batch in old), 5)
    np.testing.assert_array_equal(old, batches)  # its map stays valid
    np.testing.assert_array_equal(new, np.repeat(batches, 2, axis=-1))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), new)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_scratch_is_used_again_where_it_fits(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    first = scratch_rows(path, (2, 3))
    first[:] = 7
    again = scratch_rows(path, (2, 3))
    np.testing.assert_array_equal(again, first)
    assert scratch_rows(path, (3, 2)).shape == (3, 2)
    assert scratch_rows(path, (3, 0)).shape == (3, 0)


def test_only_what_makes_a_tensor_is_run(exported: Callable[[zoo.Case], Path], tmp_path: Path) -> None:
    study = look(exported(zoo.Case("timm-vit")))
    end = block_span(study.view, study.facts, study.match.blocks[0]).end
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    session = whole_session(study.view.model, [end], CalibrationOptions(threads=1), tmp_path)
    left = onnx.load(tmp_path / "model.onnx")
    assert len(left.graph.node) < 0.7 * len(study.view.nodes)
    (found,) = session.run([end], {"input": images})
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(study.view.model.path.read_bytes())
    expected = run_model(copy, [end], [{"input": images}], threads=1)[0][end]
    np.testing.assert_allclose(found, expected, atol=1e-5)
