"""Work that is divided gives what undivided work gives, whoever does which part of it and in whatever order."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests import zoo
from tests.calibration.elsewhere import Apart, Elsewhere
from tests.calibration.tiny import colour_folder, colour_model
from tests.pruning import look
from toast_onnx.errors import BackendError, DataError, ModelError
from toast_onnx.files import sha256_of
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.calibrating_shards import calibrate_on
from toast_onnx_calibration.evaluating import evaluate
from toast_onnx_calibration.executing import Alone, Report, divided
from toast_onnx_calibration.planning import Budget
from toast_onnx_calibration.plans import Planner
from toast_onnx_calibration.ray_workers import RayExecutor, _place, _Worker
from toast_onnx_calibration.sensitivity_trials import trial_grid
from toast_onnx_calibration.store import open_statistics
from toast_onnx_calibration.work import open_work
from toast_onnx_cli.main import main

Exported = Callable[[zoo.Case], Path]
SETTINGS = parse_ratios({"version": 1, "align": 1})
PARTS = ("tokens", "qk", "fc2")
OPTIONS = CalibrationOptions(threads=1, batch=4)


@pytest.mark.parametrize(
    ("count", "batch", "parts", "expected"),
    [
        (10, 4, 2, [(0, 4), (4, 10)]),
        (10, 4, 9, [(0, 4), (4, 8), (8, 10)]),
        (16, 2, 3, [(0, 4), (4, 10), (10, 16)]),
        (3, 8, 2, [(0, 3)]),
    ],
)
def test_parts_are_whole_batches(count: int, batch: int, parts: int, expected: list[tuple[int, int]]) -> None:
    assert divided(count, batch, parts) == expected


def test_a_recipe_goes_by_its_name_unless_it_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is called as a recipe is, as that of the images may be, is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "none").write_text("size: 8\n")
    (tmp_path / "own.yaml").write_text("size: 8\n")
    asked = ("imagenet", "none", "own.yaml", None)
    sent = [CalibrationOptions(preprocess=name).sent(tmp_path / "m.onnx").preprocess for name in asked]
    assert sent == ["imagenet", "none", str(tmp_path / "own.yaml"), None]


def test_one_process_reports_all_tasks_as_one() -> None:
    class Counting:
        def do(self, task: int, report: Report) -> int:
            for done in range(1, task + 1):
                report(done)
            return -task

    seen: list[int] = []
    assert list(Alone(Counting()).do([2, 0, 3], seen.append)) == [(0, -2), (1, 0), (2, -3)]  # type: ignore[arg-type]
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("first", [None, 4])
def test_trials_are_exactly_those_of_one_process(first: int | None, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    dense, data, parts = look(path), tmp_path / "x.npy", ["tokens", "qk"]
    np.save(data, zoo.inputs(path, 8)["input"])
    grid = trial_grid(dense, SETTINGS, parts, [0.5])
    schedules = [{0: 3}, {0: 2, 1: 2}, {1: 5}]
    calibrate(dense, data, tmp_path / "s.npz", {k: frozenset({"qk"}) for k in (0, 1)}, OPTIONS)
    with (
        open_work(dense, data, SETTINGS, parts, OPTIONS, tmp_path / "s.npz", trial_samples=first) as one,
        open_work(
            dense,
            data,
            SETTINGS,
            parts,
            OPTIONS,
            tmp_path / "s.npz",
            executor=Elsewhere(tmp_path),
            trial_samples=first,
        ) as two,
    ):
        assert isinstance(two.pool, Apart)
        found = {trial.key: damage for trial, damage in two.damages(grid)}
        assert {t.key for t in grid} == found.keys()
        assert all(len({t.block for t in piece}) == 1 for piece in two.pool.given)
        assert {trial.key: damage for trial, damage in one.damages(grid)} == found
        assert dict(two.merged(schedules, 1)) == dict(one.merged(schedules, 1))
        order = two.order()
    assert (order.threads, order.statistics) == (1, tmp_path / "s.npz")
    assert type(order.samples.feeds["input"]) is np.ndarray  # a map of a file would be sent element by element


def test_workers_solve_where_they_are_told(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that only merge tokens, or measure, need no GPU for it."""
    path = exported(zoo.Case("timm-vit"))
    dense, data = look(path), tmp_path / "x.npy"
    np.save(data, zoo.inputs(path, 4)["input"])
    monkeypatch.setattr("toast_onnx_calibration.work.solver", lambda: "cuda")
    orders = []
    for parts in (["fc2"], ["tokens"]):
        with open_work(dense, data, SETTINGS, parts, OPTIONS) as work:
            orders.append(pickle.loads(pickle.dumps(work.order())))
    narrowing, merging = orders
    assert (narrowing.solver, merging.solver) == ("cuda", "cpu")
    cluster: Any = SimpleNamespace(
        cluster_resources=lambda: {"CPU": 8.0}, nodes=lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}]
    )
    with (
        pytest.raises(BackendError, match="has not a GPU for --solve-on cuda; leave --ray out"),
        RayExecutor(cluster).open(SimpleNamespace(order=lambda: narrowing)),  # type: ignore[arg-type]
    ):
        pass


def test_a_worker_of_another_version_says_so_first() -> None:
    rules: Any = SimpleNamespace(version="0.0")  # nothing else is looked at
    with pytest.raises(BackendError, match=r"a worker has toast-onnx .*, but 0\.0 sends it work; install the same"):
        _Worker(rules, None).do((), 0, 0, None)


@pytest.mark.slow
def test_plans_are_exactly_those_of_one_process(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    dense, data = look(path), tmp_path / "x.npy"
    np.save(data, zoo.inputs(path, 8)["input"])
    documents = []
    for executor in (None, Elsewhere(tmp_path)):
        with open_work(dense, data, SETTINGS, PARTS, OPTIONS, executor=executor) as work:
            planner = Planner(dense, SETTINGS, PARTS, (0.3, 0.6), None, None, None, work)
            documents.append(planner.plan(Budget("macs", 0.7)).document | {"statistics_sha256": None})
    assert documents[0]["kept"] == documents[1]["kept"]
    assert documents[0]["tokens"] == documents[1]["tokens"]


def test_calibration_is_that_of_one_process(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    dense, data = look(path), tmp_path / "x.npy"
    np.save(data, zoo.inputs(path, 10)["input"])
    wanted = {1: frozenset({"qk", "context", "fc2"})}
    header = calibrate(dense, data, tmp_path / "one.npz", wanted, OPTIONS)
    seen: list[tuple[int, int | None]] = []
    found = calibrate_on(
        Elsewhere(tmp_path), dense, data, tmp_path / "two.npz", wanted, OPTIONS, lambda *a: seen.append(a[:2])
    )
    assert found == header
    assert seen[0] == (0, 10)
    assert seen[-1] == (10, 10)
    one, two = (open_statistics(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert one.names() == two.names()
    for name in one.names():
        a, b = one.array(name), two.array(name)
        tolerance = 1e-7 if name.endswith(".covariance") else 1e-12  # float32 in the file
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a), name


def test_accuracy_is_that_of_one_process(tmp_path: Path) -> None:
    model, images = colour_model(tmp_path / "m.onnx"), colour_folder(tmp_path / "images", each=8)
    (images / "green" / "0.png").write_bytes(b"no image")
    given = {"preprocess": "none", "batch": 2, "threads": 1}
    seen: list[tuple[int, int | None]] = []
    one = evaluate(model, images, "folders", **given)  # type: ignore[arg-type]
    two = evaluate(
        model,
        images,
        "folders",
        executor=Elsewhere(tmp_path),
        progress=lambda *a: seen.append(a),
        **given,  # type: ignore[arg-type]
    )
    assert one.accuracy == two.accuracy
    assert one.to_json() == two.to_json()
    assert any("1 of 24 images cannot be read" in note for note in two.notes)
    assert seen[0] == (0, 24)
    assert seen[-1] == (23, 24)


def test_a_part_may_hold_what_the_whole_may(tmp_path: Path) -> None:
    """One bad image of 24 is below a twentieth, though not of the eight that a worker gets."""
    images = colour_folder(tmp_path / "images", each=8)
    for name in ("1.png", "2.png"):
        (images / "green" / name).write_bytes(b"no image")
    model = colour_model(tmp_path / "m.onnx")
    with pytest.raises(DataError, match="more than 5% of 24 images"):
        evaluate(model, images, "folders", preprocess="none", batch=24, executor=Elsewhere(tmp_path))


def test_files_are_found_in_place_or_written_from_what_was_sent(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "w").mkdir(parents=True)
    (here / "m.onnx").write_bytes(b"graph")
    (here / "w" / "m.data").write_bytes(b"weights")
    asked = SimpleNamespace(files=((here / "m.onnx", here / "w" / "m.data"),))
    sent: dict[Path, tuple[str, bytes | None]] = {f: (sha256_of([f]), f.read_bytes()) for f in asked.files[0]}
    assert _place(sent, asked, there, lambda content: content)(here / "m.onnx") == here / "m.onnx"
    (here / "w" / "m.data").write_bytes(b"other")
    copy = _place(sent, asked, there, lambda content: content)(here / "m.onnx")
    assert copy.is_relative_to(there)
    assert (copy.read_bytes(), (copy.parent / "w" / "m.data").read_bytes()) == (b"graph", b"weights")
    with pytest.raises(ModelError, match="changed while it was worked with"):
        _place({f: (h, None) for f, (h, _) in sent.items()}, asked, there, lambda content: content)


@pytest.mark.parametrize("command", ["calibrate", "plan", "eval", "sweep"])
def test_without_ray_one_line_says_so(
    command: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    path = exported(zoo.Case("timm-vit"))
    np.savez(tmp_path / "x.npz", input=zoo.inputs(path, 2)["input"], labels=np.zeros(2, np.int64))
    more = {"plan": ["--macs", "0.9"], "sweep": ["--macs", "0.9"], "eval": ["--labels", str(tmp_path / "x.npz")]}
    out = [] if command == "eval" else ["-o", str(tmp_path / "out")]
    given = [command, str(path), "--data", str(tmp_path / "x.npz"), "--ray", "local", *more.get(command, []), *out]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1] == "Error: --ray needs Ray: pip install 'toast-onnx[ray]'"
