"""Statistics taken behind pruned blocks, against those of a model that holds the padded weights itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import zoo
from tests.pace import mostly_slow
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.matching.study import study as look_at
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.proof.twin import padded_twin
from toast_onnx.pruning import prune
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import DEFAULT_PARTS, everything, needed
from toast_onnx_calibration.sequential import SequentialStatistics
from toast_onnx_calibration.statistics import CalibratedStatistics

Exported = Callable[[zoo.Case], Path]
OPTIONS = CalibrationOptions(batch=2, threads=1)
RATIOS = {
    "version": 1,
    "attention": {"qk": 0.5, "vo": 0.5},
    "ffn": {"fc2": 0.5},
    "compensation": {"statistics": "sequential"},
}


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        [zoo.Case("timm-vit"), zoo.Case("hf-swin"), zoo.Case("timm-vit", after="external")],
        lambda c: c.family == "timm-vit",
        lambda c: c.id,
    ),
)
def test_a_block_is_measured_in_the_model_with_the_new_weights_before_it(
    case: zoo.Case, exported: Exported, tmp_path: Path
) -> None:
    path = exported(case)
    dense = look_at(load_model(path))
    np.savez(tmp_path / "x.npz", **zoo.inputs(path, 4))
    ratios = parse_ratios(RATIOS)
    one_shot = parse_ratios(RATIOS | {"compensation": {}})
    new = prune(dense, one_shot, SyntheticStatistics(dense), check=False).weights
    last = len(dense.match.blocks) - 1
    before = {k: v for k, v in new.items() if k < last}

    sequential = SequentialStatistics(dense, tmp_path / "x.npz", needed(dense, ratios), OPTIONS, tmp_path)
    found = sequential.behind(last, before)

    # The reference is a file of its own, found and measured like any other model.
    save_model(padded_twin(dense.view, dense.facts, dense.match.blocks, before), tmp_path / "padded.onnx")
    padded = look_at(load_model(tmp_path / "padded.onnx"))
    calibrate(padded, tmp_path / "x.npz", tmp_path / "s.npz", everything(padded, DEFAULT_PARTS), OPTIONS)
    expected = CalibratedStatistics(padded, tmp_path / "s.npz")
    assert relative(found.attention(last).s_qq, expected.attention(last).s_qq) < 1e-5
    assert relative(found.attention(last).context.covariance, expected.attention(last).context.covariance) < 1e-5
    assert relative(found.hidden(last).covariance, expected.hidden(last).covariance) < 1e-5

    calibrate(dense, tmp_path / "x.npz", tmp_path / "d.npz", everything(dense, DEFAULT_PARTS), OPTIONS)
    plain = CalibratedStatistics(dense, tmp_path / "d.npz")
    assert relative(found.hidden(last).covariance, plain.hidden(last).covariance) > 1e-2


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
