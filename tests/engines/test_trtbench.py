"""Engines measured in turns. trtexec is a STAND-IN here (see standin.py): 2 ms for "dense" files, 1 ms for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines import graphs, standin
from toast_onnx.engines import trtexec
from toast_onnx.engines.build import record_path
from toast_onnx.engines.trtbench import common_backend, measure, open_target, plan
from toast_onnx.errors import BackendError, ConfigError


def engine(folder: Path, name: str, backend: str = "tensorrt") -> Path:
    """An empty engine with the JSON that `build` writes beside it."""
    path = folder / name
    path.touch()
    shapes = {kind: [size, 3, 8, 8] for kind, size in (("min", 1), ("opt", 8), ("max", 32))}
    record_path(path).write_text(json.dumps({"profile": {"x": shapes}, "model": "gone.onnx", "backend": backend}))
    return path


@pytest.mark.parametrize("major", [10, 11])
def test_engines_take_turns_and_are_compared_pair_by_pair(tmp_path: Path, major: int) -> None:
    path = standin.write(tmp_path, major)
    targets = [open_target(engine(tmp_path, name), [1, 8]) for name in ("dense.engine", "pruned.engine")]
    ran = []
    results = measure(
        trtexec.ask(str(path)), targets, [1, 8], trtexec.BenchSettings(), rounds=2, after_run=lambda: ran.append(1)
    )
    order = [Path(words[0].removeprefix("--loadEngine=")).name for words in standin.calls(path)]
    assert order == ["dense.engine", "pruned.engine"] * 4
    assert len(ran) == 8
    assert [(r["batch"], r["speedup"]) for r in results] == [
        (1, 1.0),
        (1, pytest.approx(2.0)),
        (8, 1.0),
        (8, pytest.approx(2.0)),
    ]
    assert results[3]["median_ms"] == pytest.approx(1.0)
    assert results[3]["images_per_second"] == pytest.approx(8 * 1000, rel=1e-3)
    assert results[3]["queries"] == 200
    assert results[0]["blocks"] == {}


@pytest.mark.parametrize("major", [10, 11])
def test_layers_are_measured_once_and_grouped(tmp_path: Path, major: int) -> None:
    path = standin.write(tmp_path, major)
    target = open_target(engine(tmp_path, "dense.engine"), [1])
    (result,) = measure(trtexec.ask(str(path)), [target], [1], trtexec.BenchSettings(), rounds=3, layers=True)
    assert result["blocks"] == {"blocks.0": 1.0, "blocks.1": 0.5, "other": 0.5}
    assert sum(any(w.startswith("--exportProfile") for w in words) for words in standin.calls(path)) == 1


def test_a_batch_outside_the_profile_is_refused_before_a_run(tmp_path: Path) -> None:
    target = open_target(engine(tmp_path, "a.engine"), [64])
    with pytest.raises(ConfigError, match="built for batches 1 to 32 of 'x', not 64"):
        plan(trtexec.assumed("11"), [target], [64], trtexec.BenchSettings())


def test_an_engine_without_its_json_needs_shapes(tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    path.touch()
    with pytest.raises(ConfigError, match="give its inputs with --shape NAME=AxBxC"):
        open_target(path, [1])
    record_path(path).write_text("broken")
    target = open_target(path, [4], {"x": (1, 3, 8, 8)})
    assert target.shapes(4) == {"x": (4, 3, 8, 8)}
    with pytest.raises(ConfigError, match="does not exist"):
        open_target(tmp_path / "absent.engine", [1])


def test_an_onnx_file_is_built_for_all_batches(tmp_path: Path) -> None:
    path = graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    target = open_target(path, [1, 16])
    words = plan(trtexec.assumed("11"), [target], [1, 16], trtexec.BenchSettings())
    assert "--minShapes=x:1x4x32" in words[0]
    assert "--maxShapes=x:16x4x32" in words[0]
    assert "--shapes=x:1x4x32" in words[0]
    assert "--shapes=x:16x4x32" in words[1]


def test_engines_of_two_backends_are_not_mixed(tmp_path: Path) -> None:
    ours = open_target(engine(tmp_path, "a.engine", "tensorrt"), [1])
    rtx = open_target(engine(tmp_path, "b.engine", "tensorrt-rtx"), [1])
    assert common_backend([rtx]) == "tensorrt-rtx"
    with pytest.raises(ConfigError, match="measure them apart"):
        common_backend([ours, rtx])


def test_a_run_that_writes_no_times_is_an_error(tmp_path: Path) -> None:
    path = standin.write(tmp_path, 11)
    path.write_text(path.read_text().replace('if "--exportTimes" in options', "if False"))
    target = open_target(engine(tmp_path, "a.engine"), [1])
    with pytest.raises(BackendError, match="exported times cannot be read"):
        measure(trtexec.ask(str(path)), [target], [1], trtexec.BenchSettings(), rounds=1)
