"""Large matrices through PyTorch, here on its processor: against LAPACK, and a pruned model against the usual one.

No GPU is needed: the operations are the same, and only where they run is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import zoo
from tests.importance.test_blocked import covariance, eliminated
from tests.pruning import look, run, worst
from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.importance import arithmetic as table
from toast_onnx.importance.arithmetic import Arithmetic, arithmetic, set_solver, solver
from toast_onnx.importance.graphics import Graphics
from toast_onnx.importance.regular import regular
from toast_onnx.importance.second_order import Elimination, keep_second_order
from toast_onnx.model import save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx_calibration.calibrating import calibrate
from toast_onnx_calibration.statistics import CalibratedStatistics

Exported = Callable[[zoo.Case], Path]


class Counted(Graphics):
    """Counts what it was asked for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.asked: list[str] = []

    def __getattribute__(self, name: str) -> object:
        if name in ("inverse", "factor", "eigen", "product", "remaining"):
            self.asked.append(name)
        return super().__getattribute__(name)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """PyTorch does the arithmetic of matrices of any size."""
    found = Counted()
    monkeypatch.setitem(table.SOLVERS, "cuda", lambda: found)
    monkeypatch.setattr(table, "SMALL", 1)
    set_solver("cuda")
    yield found
    set_solver("cpu")


@pytest.mark.parametrize("n", [1, 7, 90])
def test_every_operation_is_that_of_lapack(device: Counted, n: int) -> None:
    s, on = regular(covariance(n)), arithmetic(n)
    given, b = s.copy(), np.random.default_rng(1).standard_normal((n, 11))
    shift = 0.1 * float(np.trace(s)) / n
    shifted = s + shift * np.eye(n)
    expected = np.linalg.inv(shifted)
    np.testing.assert_allclose(on.inverse(s, shift), expected, atol=1e-10 * np.abs(expected).max())
    known = on.factor(s, shift)
    np.testing.assert_allclose(known.solve(b), expected @ b, atol=1e-10 * np.abs(expected @ b).max())
    rows = np.linalg.cholesky(shifted).T @ b
    np.testing.assert_allclose(known.energies(b), np.square(rows).sum(axis=1), rtol=1e-9)
    values, vectors = on.eigen(s)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(s), atol=1e-12 * values[-1])
    np.testing.assert_allclose(vectors * values @ vectors.T, s, atol=1e-11 * np.abs(s).max())
    np.testing.assert_allclose(on.product(s, b), s @ b, atol=1e-12 * np.abs(s @ b).max())
    np.testing.assert_array_equal(s, given)  # what was handed over is worked on in a copy
    assert set(device.asked) == {"inverse", "factor", "eigen", "product"}


@pytest.mark.parametrize("spoil", [-1.0, np.nan])
def test_what_is_not_positive_definite_is_refused(device: Counted, spoil: float) -> None:
    s = covariance(12)
    s[-1, -1] = spoil
    for work in (device.inverse, device.factor):
        with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
            work(s)


def test_what_cannot_be_done_is_an_error_of_numpys(device: Counted) -> None:
    s = covariance(12)
    s[3, 3] = np.nan
    with pytest.raises(np.linalg.LinAlgError):
        device.eigen(s)
    known = device.remaining(-np.eye(5), np.ones((5, 2)))
    with pytest.raises(np.linalg.LinAlgError):
        known.remove(np.array([1, 2]))


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (9, 1), (4, 4)])
def test_elimination_is_that_of_inverses_taken_anew(device: Counted, batch: int, groups: int) -> None:
    n = 72
    s, w = covariance(n, 2), np.random.default_rng(3).standard_normal((n, 5))
    labels = np.arange(n) // (n // groups)
    found = keep_second_order(s, w, n // groups // 3, batch, labels)
    np.testing.assert_array_equal(found.reshape(-1), eliminated(s, w, n // groups // 3, batch, labels))
    assert "remaining" in device.asked


def test_costs_on_the_way_are_those_of_refits(device: Counted) -> None:
    n = 80
    s, w = covariance(n, 11), np.random.default_rng(12).standard_normal((n, 5))
    damped, elimination = regular(s), Elimination(s, w)
    for kept in (77, 66, 59, 31):
        elimination.run(kept, 3)
        alive = elimination.alive
        known = np.linalg.inv(damped[np.ix_(alive, alive)])
        rows = known @ damped[alive] @ w
        np.testing.assert_allclose(elimination.costs(), np.square(rows).sum(axis=1) / np.diagonal(known), rtol=1e-6)
    assert "remaining" in device.asked


@pytest.mark.parametrize("select", ["subspace", "index"])
@pytest.mark.parametrize(("samples", "tolerance"), [(1, 1e-3), (8, 1e-5), (96, 1e-5)])
def test_a_model_is_pruned_as_on_the_processor(
    device: Counted, exported: Exported, tmp_path: Path, samples: int, tolerance: float, select: str
) -> None:
    """Few tokens, more, and many: each has a way of its own through the ridges. Few leave covariances singular."""
    path = exported(zoo.Case("timm-vit"))
    feeds = zoo.inputs(path, samples)
    dense = look(path)
    np.save(tmp_path / "x.npy", next(iter(feeds.values())))
    calibrate(dense, tmp_path / "x.npy", tmp_path / "s.npz")
    ratios = parse_ratios({"version": 1, "attention": {"qk": 0.5, "vo": 0.5, "select": select}, "ffn": {"fc2": 0.5}})
    answers = []
    for name in ("cuda", "cpu"):
        set_solver(name)
        pruned = prune(dense, ratios, CalibratedStatistics(dense, tmp_path / "s.npz"))
        save_model(pruned.model, tmp_path / f"{name}.onnx")
        answers.append(run(tmp_path / f"{name}.onnx", feeds))
    assert worst(*answers) < tolerance
    assert {"inverse", "remaining", "product"} <= set(device.asked)


def test_small_matrices_stay_on_the_processor(device: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SMALL", 64)
    found: list[Arithmetic] = [arithmetic(63), arithmetic(64), arithmetic()]
    assert [each is device for each in found] == [False, True, True]


def test_an_unknown_place_leaves_the_choice_as_it_was() -> None:
    with pytest.raises(ConfigError, match="unknown place to solve on 'tpu'; choose one of cpu, cuda"):
        set_solver("tpu")
    assert solver() == "cpu"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="needs a GPU, and PyTorch finds none"):
        set_solver("cuda")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendError, match=r"solving on cuda needs PyTorch: pip install 'toast-onnx\[torch\]', or"):
        set_solver("cuda")
    assert solver() == "cpu"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no room for a block's matrices: solve on cpu"),
        (RuntimeError("CUDA error: busy\nmore of it"), "the GPU gave up: CUDA error: busy.*; solve on cpu"),
    ],
)
def test_a_gpu_that_fails_is_said(
    device: Counted, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    known = device.remaining(np.eye(3), np.ones((3, 1)))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    monkeypatch.setattr(torch, "from_numpy", fails)
    for work in (
        lambda: device.inverse(np.eye(3)),
        lambda: known.corner(np.arange(2)),
        lambda: known.rows(np.arange(2)),
    ):
        with pytest.raises(BackendError, match=message):
            work()


def test_a_gpu_that_does_not_work_is_found_out_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "tensor", fails)
    with pytest.raises(BackendError, match=r"the GPU gave up: CUDA error: no kernel image .*; solve on cpu"):
        set_solver("cuda")
    assert solver() == "cpu"
