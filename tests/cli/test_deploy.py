"""`toast-onnx deploy` for real: the example's model through every step that a machine without a GPU can run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from click.testing import CliRunner, Result

from toast_onnx.engines import cuda
from toast_onnx.model import file_hash
from toast_onnx_cli.main import main

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")
EXAMPLES = Path(__file__).parents[2] / "examples"
WHOLE: dict[str, Any] = {
    "version": 1,
    "model": "digits_vit.onnx",
    "output": "out",
    "precision": "fp16",
    "preprocess": "none",
    "prune": {"ratios": "ratios.yaml"},
    "build": {"batch": "1:4:8", "compute_capability": 8.9, "optimization_level": 0},
    "compare": {"data": "digits_calibration.npz", "samples": 32},
    "eval": {"data": "digits_test.npz", "samples": 200},
    "bench": {"runtime": ["onnxruntime", "trtexec"], "rounds": 2, "threads": 1},
    "check": {},
}
HERE = ["prune", "convert", "convert-dense", "build-dense", "build", "compare", "eval-dense", "eval"]
HERE += ["bench-onnxruntime"]
no_gpu = pytest.mark.skipif(cuda.gpu_name() is not None, reason="says what happens without a GPU, and one is here")


def prepare(folder: Path, document: dict[str, Any]) -> Path:
    """The example's files and a deployment file in a folder."""
    for name in ("digits_vit.onnx", "digits_calibration.npz", "digits_test.npz", "ratios.yaml"):
        shutil.copy(EXAMPLES / name, folder)
    path = folder / "deploy.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def deploy(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["deploy", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A whole run, made once."""
    config = prepare(tmp_path_factory.mktemp("deploy"), WHOLE)
    return config, deploy(config, "--json")


def steps(config: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.parent / "out" / "deploy.json").read_text())["steps"]
    return found


@no_gpu
def test_everything_that_can_run_here_runs_and_the_rest_says_what_it_needs(finished: tuple[Path, Result]) -> None:
    config, result = finished
    assert result.exit_code == 1
    assert json.loads(result.stdout)["steps"] == steps(config)
    assert [name for name, entry in steps(config).items() if entry["status"] == "done"] == HERE
    waits = [line for line in result.stderr.splitlines() if " waits: it needs an NVIDIA GPU and none is here; " in line]
    assert [line.split("elsewhere: ")[1].split()[:2] for line in waits] == [
        ["toast-onnx", "bench"],
        ["toast-onnx", "check-engine"],
    ]
    assert result.stderr.splitlines()[-1].startswith("Error: bench-trtexec, check could not run here")


def test_what_was_built_is_what_the_record_says(finished: tuple[Path, Result]) -> None:
    config, _ = finished
    out, found = config.parent / "out", steps(config)
    sizes = {name: found[name]["result"]["engine_bytes"] for name in ("build", "build-dense")}
    assert sizes["build"] == (out / "digits_vit.pruned.fp16.engine").stat().st_size
    assert sizes["build"] < sizes["build-dense"]
    # The engine comes from the very file that was compared and evaluated.
    assert found["build"]["result"]["model_sha256"] == file_hash(out / "digits_vit.pruned.fp16.onnx")
    types = {t.data_type for t in onnx.load(out / "digits_vit.pruned.fp16.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    assert found["prune"]["result"]["pruned"]["sha256"] == file_hash(out / "digits_vit.pruned.onnx")
    assert found["compare"]["result"]["outputs"]["logits"]["top1_agreement"] > 0.9
    assert found["eval"]["result"]["accuracy"]["top1"]["accuracy"] > 0.9
    assert all(not Path(word).is_absolute() for entry in found.values() for word in entry["command"])


@no_gpu
def test_a_second_run_only_says_so_and_a_changed_setting_runs_its_steps(finished: tuple[Path, Result]) -> None:
    config, _ = finished
    before = {name: entry.get("outputs") for name, entry in steps(config).items()}
    result = deploy(config, "--partial")
    assert result.exit_code == 0, result.stderr
    done = [line for line in result.stderr.splitlines() if line.endswith(": done before, not run again")]
    assert len(done) == len(HERE)
    assert "54.7% of the MACs" in result.stdout
    config.write_text(yaml.safe_dump(WHOLE | {"eval": {"data": "digits_test.npz", "samples": 100}}))
    result = deploy(config, "--partial")
    ran = [line.split(":")[0] for line in result.stderr.splitlines() if ": toast-onnx" in line and "waits" not in line]
    assert ran == ["== eval-dense", "== eval"]
    assert {name: entry.get("outputs") for name, entry in steps(config).items()} == before
    config.write_text(yaml.safe_dump(WHOLE))


def test_the_commands_are_shown_without_running_any(tmp_path: Path) -> None:
    config = prepare(tmp_path, WHOLE)
    result = deploy(config, "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("toast-onnx prune digits_vit.onnx --ratios ratios.yaml")
    assert len(lines) == len(HERE) + 2
    assert not (tmp_path / "out").exists()


def test_a_step_that_fails_says_which_and_why(tmp_path: Path) -> None:
    config = prepare(tmp_path, WHOLE | {"prune": {"ratios": "ratios.yaml", "data": "nowhere"}})
    result = deploy(config)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: prune: ")
    assert "nowhere" in last
    assert steps(config)["prune"]["status"] == "failed"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is not on Windows")
def test_a_run_killed_while_it_builds_goes_on_with_the_build(tmp_path: Path) -> None:
    document = {key: WHOLE[key] for key in ("version", "model", "output", "preprocess", "prune", "build")}
    config = prepare(tmp_path, document)
    program = [sys.executable, "-m", "toast_onnx_cli.main", "deploy", str(config)]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(program, stderr=stream, stdout=stream, start_new_session=True)
        deadline = time.monotonic() + 120
        while "building ..." not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert [(name, entry["status"]) for name, entry in steps(config).items()] == [("prune", "done")]
    pruned = (tmp_path / "out" / "digits_vit.pruned.onnx").stat().st_mtime_ns
    result = deploy(config)
    assert result.exit_code == 0, result.stderr
    assert "== prune: done before" in result.stderr
    assert (tmp_path / "out" / "digits_vit.pruned.onnx").stat().st_mtime_ns == pruned
    assert steps(config)["build"]["status"] == "done"


def test_code_that_a_file_names_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a deployment file nor the ratios file that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    named = prepare(tmp_path, {"version": 1, "model": "model.onnx", "eval": {"data": "x", "metric": "code"}})
    assert "eval.metric is Python code" in deploy(named).stderr
    (tmp_path / "r.yaml").write_text("version: 1\ncalibration: {data: 'code:run'}\n")
    inside = prepare(tmp_path, {"version": 1, "model": "model.onnx", "prune": {"ratios": "r.yaml"}})
    for options in ([], ["--allow-code"]):
        result = deploy(inside, *options)
        assert result.exit_code == 1
        assert "a file may not name code" in result.stderr
    assert not (tmp_path / "ran").exists()
