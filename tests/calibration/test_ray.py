"""Two workers of Ray, one of them killed in the middle, give what one process gives."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.calibration.tiny import colour_folder, colour_model
from tests.pruning import look
from toast_onnx.errors import BackendError, DataError
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.calibrating_shards import calibrate_on
from toast_onnx_calibration.evaluating import evaluate
from toast_onnx_calibration.ray_workers import RayExecutor, ray_executor
from toast_onnx_calibration.sensitivity_trials import trial_grid
from toast_onnx_calibration.store import open_statistics
from toast_onnx_calibration.work import open_work

pytestmark = pytest.mark.slow

Exported = Callable[[zoo.Case], Path]
SETTINGS = parse_ratios({"version": 1, "align": 1})
OPTIONS = CalibrationOptions(threads=1, batch=4)
PARTS = ["tokens", "qk", "vo", "fc2"]


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two workers need two cores")
    with ray_executor("local") as found:
        yield found


def test_trials_while_a_worker_is_killed(executor: RayExecutor, exported: Exported, tmp_path: Path) -> None:
    import ray

    path = exported(zoo.Case("timm-vit"))
    dense, data = look(path), tmp_path / "x.npy"
    np.save(data, zoo.inputs(path, 32)["input"])
    grid = trial_grid(dense, SETTINGS, PARTS, [0.2, 0.4, 0.6])
    calibrate(dense, data, tmp_path / "s.npz", options=OPTIONS)
    with open_work(dense, data, SETTINGS, PARTS, OPTIONS, tmp_path / "s.npz") as work:
        expected = {trial.key: damage for trial, damage in work.damages(grid)}
        merged = dict(work.merged([{0: 3}, {1: 2}], 1))
    with open_work(dense, data, SETTINGS, PARTS, OPTIONS, tmp_path / "s.npz", executor=executor) as work:
        pool: Any = work.pool
        assert pool.workers >= 2
        pids = [ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) for actor in pool._actors]
        found: dict[Any, dict[str, float]] = {}
        for trial, damage in work.damages(grid):
            if not found:
                os.kill(pids[-1], signal.SIGKILL)
            assert trial.key not in found
            found[trial.key] = damage
        assert ray.get(pool._actors[-1].__ray_call__.remote(lambda _: os.getpid())) != pids[-1]
        assert dict(work.merged([{0: 3}, {1: 2}], 1)) == merged
    assert found == expected


def test_calibration_and_accuracy(executor: RayExecutor, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    dense, data = look(path), tmp_path / "x.npy"
    np.save(data, zoo.inputs(path, 10)["input"])
    header = calibrate(dense, data, tmp_path / "one.npz", options=OPTIONS)
    assert calibrate_on(executor, dense, data, tmp_path / "two.npz", options=OPTIONS) == header
    one, two = (open_statistics(tmp_path / f"{name}.npz") for name in ("one", "two"))
    for name in one.names():
        a, b = one.array(name), two.array(name)
        assert np.linalg.norm(a - b) <= (1e-7 if name.endswith(".covariance") else 1e-12) * np.linalg.norm(a)
    model, images = colour_model(tmp_path / "m.onnx"), colour_folder(tmp_path / "images")
    given: dict[str, Any] = {"preprocess": "none", "batch": 1, "threads": 1}
    assert evaluate(model, images, "folders", executor=executor, **given).to_json() == (
        evaluate(model, images, "folders", **given).to_json()
    )


def test_errors_of_workers_are_ours(executor: RayExecutor, tmp_path: Path) -> None:
    model, images = colour_model(tmp_path / "m.onnx"), colour_folder(tmp_path / "images")
    for each in sorted(images.rglob("*.png"))[:3]:
        each.write_bytes(b"no image")
    with pytest.raises(DataError, match="more than 5% of 12 images cannot be read"):
        evaluate(model, images, "folders", preprocess="none", batch=1, threads=1, executor=executor)
    large: Any = SimpleNamespace(order=lambda: SimpleNamespace(provider="cpu", threads=1000))
    with pytest.raises(BackendError, match="has not 1000 CPUs in one place"), executor.open(large):
        pass
