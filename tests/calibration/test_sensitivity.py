"""Trials against whole pruned models run on their own, and results that survive an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from tests import zoo
from tests.pruning import look, run
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ConfigError, DataError
from toast_onnx.matching.study import Study
from toast_onnx.model import save_model
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import Ratios, parse_ratios
from toast_onnx.planning.search import Kept
from toast_onnx.planning.width_costs import dense_widths
from toast_onnx.pruning import prune
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.labels import Labels
from toast_onnx_calibration.sensitivity_results import Trial, read_results, resume, write_results
from toast_onnx_calibration.sensitivity_stream import Trials, chosen_output, read_samples
from toast_onnx_calibration.sensitivity_trials import Damages, Solver, in_turn, measure, trial_grid

Exported = Callable[[zoo.Case], Path]
SETTINGS = parse_ratios({"version": 1, "align": 1})
OPTIONS = CalibrationOptions(threads=1, batch=4)


def data(folder: Path, model: Path, count: int = 8) -> Path:
    """Random samples for a model with one input."""
    path = folder / "x.npy"
    np.save(path, next(iter(zoo.inputs(model, count).values())))
    return path


def trials_of(dense: Study, folder: Path, count: int = 8, **more: Any) -> Trials:
    samples = read_samples(dense, data(folder, dense.view.model.path, count), OPTIONS, folder)
    return Trials(dense, samples, OPTIONS, folder, **more)


def reference(dense: Study, kept: Kept, folder: Path, settings: Ratios = SETTINGS) -> tuple[np.ndarray, np.ndarray]:
    """First outputs of the dense model and of one that was pruned to these counts and written, on all samples."""
    ratios = planned_ratios(settings, kept, [dense_widths(b) for b in dense.match.blocks])
    save_model(prune(dense, ratios, SyntheticStatistics(dense)).model, folder / "pruned.onnx")
    path = dense.view.model.path
    feeds = {next(iter(zoo.inputs(path, 1))): np.load(folder / "x.npy")}
    return tuple(run(p, feeds)[0].astype(np.float64) for p in (path, folder / "pruned.onnx"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def vit(exported: Exported) -> Study:
    return look(exported(zoo.Case("timm-vit")))


@pytest.mark.parametrize("kept", [{0: {"qk": 20, "vo": 9}}, {1: {"fc2": 100}}, {0: {"fc1": 50}, 1: {"vo": 7}}])
def test_damage_is_that_of_the_pruned_model(kept: Kept, vit: Study, tmp_path: Path) -> None:
    trials = trials_of(vit, tmp_path)
    solver = Solver(vit, SETTINGS, SyntheticStatistics(vit))
    found = trials.damage(solver.weights(kept))
    a, b = reference(vit, kept, tmp_path)
    p, q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    assert found["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-2, abs=1e-9)
    assert found["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-2)
    assert found["top1_agreement"] == (a.argmax(axis=1) == b.argmax(axis=1)).mean()


def test_trials_on_the_first_samples_are_those_of_the_first_samples_alone(vit: Study, tmp_path: Path) -> None:
    """In whole batches; what is judged on all samples in between does not disturb them."""
    trials = trials_of(vit, tmp_path)
    few = trials.on_first(6)  # one batch of four and a half
    weights = Solver(vit, SETTINGS, SyntheticStatistics(vit)).weights({1: {"vo": 5}})
    found, whole, again = few.damage(weights), trials.damage(weights), few.damage(weights)
    a, b = reference(vit, {1: {"vo": 5}}, tmp_path)
    assert found["relative_error"] == pytest.approx(np.linalg.norm((a - b)[:4]) / np.linalg.norm(a[:4]), rel=1e-2)
    assert whole["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-2)
    assert found == again != whole
    assert few.samples.rows == trials.samples.rows[:4]
    assert trials.on_first(3).samples.rows == trials.samples.rows[:4]
    assert trials.on_first(None) is trials.on_first(9) is trials


def test_labels_of_the_first_samples(vit: Study, tmp_path: Path) -> None:
    late = Labels({"6": 0, "7": 0}, "made up")
    assert trials_of(vit, tmp_path, labels=late).on_first(4).dense_top1() is None
    answers = run(vit.view.model.path, {"input": np.load(tmp_path / "x.npy")})[0].argmax(axis=1)
    right = {str(i): int(c) + (i == 3) for i, c in enumerate(answers)}
    assert trials_of(vit, tmp_path, labels=Labels(right, "made up")).on_first(4).dense_top1() == pytest.approx(3 / 4)


def test_the_order_of_trials_does_not_matter(vit: Study, tmp_path: Path) -> None:
    trials = trials_of(vit, tmp_path)
    solver = Solver(vit, SETTINGS, SyntheticStatistics(vit))
    early, late = (solver.weights({b: {"vo": 4}}) for b in (0, 1))
    first = [trials.damage(w) for w in (early, late)]
    again = [trials.damage(w) for w in (late, early, late)]
    assert again == [first[1], first[0], first[1]]


@pytest.mark.parametrize("name", ["hf-dinov2", pytest.param("timm-swin", marks=pytest.mark.slow)])
def test_other_models(name: str, exported: Exported, tmp_path: Path) -> None:
    dense = look(exported(zoo.Case(name)))
    trials = trials_of(dense, tmp_path, 4)
    block = dense.match.blocks[-1].index
    kept: Kept = {block: {"fc2": 8}}
    found = trials.damage(Solver(dense, SETTINGS, SyntheticStatistics(dense)).weights(kept))
    a, b = reference(dense, kept, tmp_path)
    assert found["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-2, abs=1e-6)
    assert ("kl" in found) == trials.classes


def test_blocks_that_read_a_mask_run_from_there_on(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(zoo.Case("hf-bert-eager"))
    dense = look(path)
    feeds = zoo.inputs(path, 4)
    np.savez(tmp_path / "x.npz", **feeds)
    trials = Trials(dense, read_samples(dense, tmp_path / "x.npz", OPTIONS, tmp_path), OPTIONS, tmp_path)
    kept: Kept = {1: {"fc2": 16}}
    whole: list[str | None] = []
    true = trials._whole
    monkeypatch.setattr(trials, "_whole", lambda model, tensor=None: whole.append(tensor) or true(model, tensor))
    found = trials.damage(Solver(dense, SETTINGS, SyntheticStatistics(dense)).weights(kept))
    assert len(whole) == 1  # up to the first block alone
    assert whole[0] is not None
    ratios = planned_ratios(SETTINGS, kept, [dense_widths(b) for b in dense.match.blocks])
    save_model(prune(dense, ratios, SyntheticStatistics(dense)).model, tmp_path / "p.onnx")
    at = [o.name for o in dense.view.model.proto.graph.output].index(trials.output)
    a, b = (run(p, feeds)[at].astype(np.float64) for p in (path, tmp_path / "p.onnx"))
    assert found["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-2, abs=1e-6)


def test_labels_add_top1(vit: Study, tmp_path: Path) -> None:
    path = data(tmp_path, vit.view.model.path)
    answers = run(vit.view.model.path, {"input": np.load(path)})[0].argmax(axis=1)
    wrong = {str(i): int(c) + (i == 3) for i, c in enumerate(answers)}
    del wrong["7"]  # a sample without a label does not count
    trials = trials_of(vit, tmp_path, labels=Labels(wrong, "made up"))
    assert trials.dense_top1() == pytest.approx(6 / 7)
    found = trials.damage(Solver(vit, SETTINGS, SyntheticStatistics(vit)).weights({1: {"fc2": 200}}))
    assert 0 <= found["top1"] <= 1


def test_outputs(vit: Study, exported: Exported, tmp_path: Path) -> None:
    assert chosen_output(vit, None) == "logits"
    with pytest.raises(ConfigError, match="no output 'x'"):
        chosen_output(vit, "x")
    features = look(exported(zoo.Case("hf-dinov2")))
    with pytest.raises(ConfigError, match="labels need class scores"):
        trials_of(features, tmp_path, 4, labels=Labels({"0": 1}, "made up"))


def test_the_grid_leaves_out_what_repeats(vit: Study) -> None:
    coarse = parse_ratios({"version": 1, "align": {"head_dim": 32, "width": 64}})
    heads = dense_widths(vit.match.blocks[0])["qk"]
    grid = trial_grid(vit, coarse, ["qk", "fc1+fc2"], [0.1, 0.5, 0.55], blocks=[1])
    assert {t.block for t in grid} == {1}
    counts = [t.kept["qk"] for t in grid if t.part == "qk"]
    assert len(counts) == len(set(counts))
    assert all(k < heads for k in counts)
    assert all(set(t.kept) == {"fc1", "fc2"} for t in grid if t.part == "fc1+fc2")


def weighed(trials: Trials, solver: Solver) -> Damages:
    return in_turn(lambda t: trials.damage(solver.weights({t.block: dict(t.kept)})))  # type: ignore[dict-item]


@pytest.fixture
def interrupted(vit: Study, tmp_path: Path) -> tuple[Trials, Solver, list[Trial], Path]:
    """A run that was stopped after two of four trials."""
    trials = trials_of(vit, tmp_path)
    solver = Solver(vit, SETTINGS, SyntheticStatistics(vit))
    grid = trial_grid(vit, SETTINGS, ["qk", "vo"], [0.5])
    path = tmp_path / "results.json"

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(weighed(trials, solver), grid, resume(path, {"model": {"sha256": "a"}}, "kl", None), path, stop)
    return trials, solver, grid, path


def test_a_stopped_run_goes_on(interrupted: tuple[Trials, Solver, list[Trial], Path]) -> None:
    trials, solver, grid, path = interrupted
    assert len(read_results(path)["trials"]) == 2
    found = resume(path, {"model": {"sha256": "a"}}, "kl", None)
    seen: list[str] = []
    measure(weighed(trials, solver), grid, found, path, lambda done, total, *_: seen.append(f"{done}/{total}"))
    assert seen == ["1/2", "2/2"]
    assert [t["kept"] for t in read_results(path)["trials"]] == [t.kept for t in grid]
    assert found.measured(1, "vo") == {grid[3].kept["vo"]: found.trials[3].damage["kl"]}


def test_results_of_something_else_are_refused(interrupted: tuple[Trials, Solver, list[Trial], Path]) -> None:
    path = interrupted[3]
    for identity, metric, top1, match in (
        ({"model": {"sha256": "b"}}, "kl", None, "another model"),
        ({"model": {"sha256": "a"}}, "relative_error", None, "other labels"),
        ({"model": {"sha256": "a"}}, "kl", 0.5, "other labels"),
    ):
        with pytest.raises(ConfigError, match=match):
            resume(path, identity, metric, top1)
    resume(path, {"model": {"sha256": "a", "file": "renamed.onnx"}}, "kl", None)


def test_damaged_results(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("{", "[]", json.dumps({"format": "something"})):
        path.write_text(text)
        with pytest.raises(DataError, match=r"r\.json"):
            resume(path, {}, "kl", None)


def test_squared_errors_add_up(tmp_path: Path) -> None:
    found = resume(None, {}, "relative_error", None)
    found.trials.append(Trial(0, "qk", 0.5, {"qk": 8}, {"relative_error": 0.1}))
    assert found.measured(0, "qk") == {8: pytest.approx(0.01)}
    write_results(found, tmp_path / "r.json")
    assert resume(tmp_path / "r.json", {}, "relative_error", None).trials == found.trials
