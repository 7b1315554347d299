"""A process that is killed at any renaming, linking or deleting leaves one whole set of graph, weights and report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.pruning import run
from toast_onnx.files import drafts, exchange, write_beside, write_bytes, write_synced
from toast_onnx.model import file_hash, load_model, staged_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed")

OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir")
SHAPE = (16, 32)
FEEDS = {"x": np.random.default_rng(0).standard_normal((2, SHAPE[0])).astype(np.float32)}
#: Writes the same model and report in a copy of the old folder for every N, and dies before or after operation N.
KILLED = """
import os, shutil, sys
from pathlib import Path
from tests.trust.test_kills import OPERATIONS, write
new, old, states = map(Path, sys.argv[1:4])

def deadly(name, left, after):
    function = getattr(os, name)
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and not after:
            os._exit(9)
        try:
            return function(*arguments, **options)
        finally:
            if left[0] == 0:
                os._exit(9)
    setattr(os, name, call)

for n, after in ((n, after) for n in range(1, 100) for after in (False, True)):
    folder = states / f"{n}-{'after' if after else 'before'}"
    shutil.copytree(old, folder)
    child = os.fork()
    if child == 0:
        left = [n]
        for name in OPERATIONS:
            deadly(name, left, after)
        write(new, folder / "m.onnx")
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        shutil.rmtree(folder)
        break
"""


def write(model: Path, out: Path) -> None:
    """A model and a report that names its hash, as `prune` writes them."""
    with staged_model(load_model(model), out, out.with_suffix(".json"), check=False) as staged:
        staged.beside = json.dumps({"sha256": file_hash(staged.draft)}).encode()


def saved(folder: Path, value: float, *, external: bool) -> Path:
    """The product of x, a weight that is `value` everywhere and a factor in the graph itself, `value` + 1."""
    folder.mkdir()
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Mul", ["p", "f"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", floats, ["n", SHAPE[0]])],
        [helper.make_tensor_value_info("y", floats, ["n", SHAPE[1]])],
        [
            numpy_helper.from_array(np.full(SHAPE, value, np.float32), "w"),
            numpy_helper.from_array(np.full(1, value + 1, np.float32), "f"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(proto, folder / "m.onnx", save_as_external_data=external, location="w.bin", size_threshold=100)
    return folder / "m.onnx"


def value(path: Path) -> float:
    """Weight times factor as ONNX Runtime reads them: 2 and 6 for those of one file, 3 and 4 for a mixture."""
    (y,) = run(path, FEEDS)
    found = y / FEEDS["x"].sum(axis=1, keepdims=True)
    assert np.allclose(found, found[0, 0], rtol=1e-3)
    return round(float(found[0, 0]), 3)


def report_fits(path: Path) -> bool | None:
    """Whether the report beside a model is that model's; None where there is none."""
    report = path.with_suffix(".json")
    return json.loads(report.read_text())["sha256"] == file_hash(path) if report.exists() else None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
        (False, False),
    ],
)
def test_killed_at_every_operation(before: bool, after: bool, tmp_path: Path) -> None:
    """The old model and the new one with their weights inside or outside."""
    old, new = tmp_path / "old", saved(tmp_path / "new", 2, external=after)
    first = saved(tmp_path / "first", 1, external=before)
    old.mkdir()
    write(first, old / "m.onnx")
    assert (old / "m.onnx.data").exists() == before
    states = tmp_path / "states"
    states.mkdir()
    words = [sys.executable, "-c", KILLED, new, old, states]
    subprocess.run(list(map(str, words)), check=True, timeout=100)
    found = sorted(states.iterdir())
    assert len(found) >= 16
    values = set()
    for state in found:
        path = state / "m.onnx"
        now = value(path)
        assert now in (2, 6), state.name
        assert report_fits(path) in (True, None), state.name
        if report_fits(path) is None:  # the new set was decided for, and is finished below
            assert list(state.glob(".toast-*-decided")), state.name
        values.add(now)
        decided = now == 6 or bool(list(state.glob(".toast-*-decided")))
        with pytest.raises(KeyError), staged_model(load_model(first), path, path.with_suffix(".json")):
            raise KeyError  # the next run comes to nothing, and yet tidies up
        assert value(path) == (6 if decided else 2), state.name
        assert report_fits(path) is True, state.name
        kept = {"m.onnx", "m.json"} | ({"m.onnx.data"} if before or (after and decided) else set())
        assert {p.name for p in state.iterdir()} == kept, state.name
    assert values == {2, 6}


def test_another_run_that_goes_on_keeps_its_drafts(tmp_path: Path) -> None:
    with drafts(tmp_path / "a") as one:
        with drafts(tmp_path / "a") as two:
            assert one != two
            write_bytes(tmp_path / "a", b"third")
            assert one.is_dir()
            assert two.is_dir()
        assert one.is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


def test_an_exchange_waits_for_one_that_was_broken_off(tmp_path: Path) -> None:
    """Both sets were decided for, one after the other: the later one stands there in the end."""
    out, report = tmp_path / "e.engine", tmp_path / "e.engine.json"
    with drafts(out) as folder:
        write_synced(folder / out.name, b"one")
        write_beside(folder, report, b"1")
        folder.rename(tmp_path / f"{folder.name.rpartition('-')[0]}-decided")
    with drafts(out) as folder:
        write_synced(folder / out.name, b"two")
        write_beside(folder, report, b"2")
        exchange(folder, out, report)
    assert (out.read_bytes(), report.read_bytes()) == (b"two", b"2")
    assert {p.name for p in tmp_path.iterdir()} == {out.name, report.name}


def test_a_report_in_another_folder(tmp_path: Path) -> None:
    model = saved(tmp_path / "new", 2, external=True)
    (tmp_path / "elsewhere").mkdir()
    out, report = tmp_path / "m.onnx", tmp_path / "elsewhere" / "r.json"
    with staged_model(load_model(model), out, report) as staged:
        staged.beside = b"{}"
    assert report.read_bytes() == b"{}"
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"m.onnx", "m.onnx.data"}
    assert value(out) == 6
