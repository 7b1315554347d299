"""`toast-onnx finetune`: files in, files out, interruption, resuming, and clear errors."""

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

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner, Result

from tests.pruning import prune_file, run
from toast_onnx.finetune import to_torch
from toast_onnx.model import file_hash, load_model
from toast_onnx_cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE = EXAMPLES / "digits_vit.onnx"
HALF = {
    "version": 1,
    "attention": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "l2"},
    "ffn": {"fc2": 0.5, "score": "l2"},
    "compensation": {"kind": "none"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pruned digits model and 48 images of the example."""
    folder = tmp_path_factory.mktemp("finetune")
    prune_file(DENSE, HALF, folder / "pruned.onnx")
    with np.load(EXAMPLES / "digits_calibration.npz") as archive:
        images = archive["images"] if "images" in archive else archive[archive.files[0]]
        np.savez(folder / "data.npz", images=images[:48])
    return folder


def arguments(files: Path, out: Path, *more: str, steps: int = 6) -> list[str]:
    return [
        "finetune", str(files / "pruned.onnx"), "--teacher", str(DENSE), "--data", str(files / "data.npz"),
        "--preprocess", "none", "--augment", "none", "--mixup", "0", "--ema", "0", "--output-weight", "1",
        "--steps", str(steps), "--batch", "8", "--lr", "1e-3", "--evaluate-every", "2", "--device", "cpu",
        "-o", str(out), *more,
    ]  # fmt: skip


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def test_trained_weights_go_into_the_same_graph_and_the_report_says_how(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.onnx"
    report_before = {"format": "toast-onnx/prune/1", "twin": {"worst": 1e-6}, "pruned": {"macs": 5}, "blocks": []}
    (files / "pruned.json").write_text(json.dumps(report_before))
    result = invoke(*arguments(files, out, "--json", "--save-module", str(tmp_path / "m.pt")))
    assert result.exit_code == 0, result.output
    before, after = onnx.load(files / "pruned.onnx"), onnx.load(out)
    trained = [t.name for t, u in zip(before.graph.initializer, after.graph.initializer, strict=True) if t != u]
    assert len(trained) > 20
    for proto in (before, after):
        del proto.graph.initializer[:]
    assert before == after
    document = json.loads((tmp_path / "tuned.json").read_text())
    assert document == json.loads(result.stdout)
    assert document["pruned"] == {
        "macs": 5,
        "file": "tuned.onnx",
        "sha256": file_hash(out),
        "bytes": out.stat().st_size,
    }
    assert document["twin"]["weights"].startswith("before fine-tuning")
    tuned = document["finetune"]
    assert tuned["best"]["loss"] < tuned["start"]["loss"]
    assert [e["step"] for e in tuned["history"]] == [0, 2, 4, 6]
    assert tuned["proof"]["worst"] < 1e-4
    assert len(tuned["compared"]["stream"]) == 6
    assert not (tmp_path / "tuned.checkpoint").exists()
    module, state = to_torch(load_model(out)), torch.load(tmp_path / "m.pt", weights_only=True)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, state[name])


def test_the_held_out_loss_is_what_onnx_runtime_gives_for_the_written_file(files: Path, tmp_path: Path) -> None:
    """The distance to the teacher in the report, computed again from the two files and the held-out rows."""
    out = tmp_path / "tuned.onnx"
    assert invoke(*arguments(files, out, "--holdout", "0.5")).exit_code == 0
    best = json.loads((tmp_path / "tuned.json").read_text())["finetune"]["best"]["outputs"]
    from toast_onnx.finetune.samples import hold_out

    _, held = hold_out(48, 0.5, 0)
    with np.load(files / "data.npz") as archive:
        pixels = archive["images"][held].reshape(len(held), 1, 28, 28).astype(np.float32) / 255
    name = ort.InferenceSession(str(DENSE), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    logits = [run(path, {name: pixels})[0].astype(np.float64) for path in (DENSE, out)]
    teacher, student = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in logits)
    assert best == pytest.approx((np.exp(teacher) * (teacher - student)).sum(1).mean(), rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_torch_export_computes_the_same(files: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "tuned.onnx", tmp_path / "again.onnx"
    result = invoke(*arguments(files, out, "--torch-export", str(again), steps=2))
    assert result.exit_code == 0, result.output
    name = load_model(out).proto.graph.input[0].name
    x = np.random.default_rng(0).random((5, 1, 28, 28), np.float32)
    np.testing.assert_allclose(run(again, {name: x})[0], run(out, {name: x})[0], rtol=1e-4, atol=1e-4)


def _command(*args: str) -> list[str]:
    program = shutil.which("toast-onnx", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("the package is not installed, so there is no toast-onnx command")
    return [program, *args]


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_bytes(files: Path, tmp_path: Path, number: int) -> None:
    whole, broken = tmp_path / "whole.onnx", tmp_path / "broken.onnx"
    subprocess.run(_command(*arguments(files, whole, steps=30)), check=True, capture_output=True)
    command = _command(*arguments(files, broken, steps=30))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(tmp_path / "broken.checkpoint", process)
    process.send_signal(number)
    status = process.wait()
    if number == signal.SIGINT:
        assert status == 130
        assert broken.exists(), "Ctrl-C keeps the best so far"
    else:
        assert not broken.exists()
    assert (tmp_path / "broken.checkpoint").exists()
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(files: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.onnx", tmp_path / "together.onnx"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = [*launcher, *_command(*arguments(files, together, "--batch", "4", steps=4))]
    done = subprocess.run(two, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert invoke(*arguments(files, alone, steps=4)).exit_code == 0
    document = json.loads((tmp_path / "together.json").read_text())["finetune"]
    assert document["processes"] == 2
    ours, theirs, start = (
        np.concatenate([a.ravel() for a in _arrays(p)]) for p in (together, alone, files / "pruned.onnx")
    )
    assert np.linalg.norm(theirs - start) > 0
    # The stream's variance is of each process's own images, so the two are close and not equal.
    assert np.linalg.norm(ours - theirs) < 0.2 * np.linalg.norm(theirs - start)


def _arrays(path: Path) -> list[np.ndarray]:
    model = load_model(path)
    found = [model.array(t) for t in model.proto.graph.initializer]
    return [a for a in found if a.dtype == np.float32 and a.size > 1]


def test_divergence_is_an_error_that_says_what_to_do(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.onnx"
    result = invoke(*arguments(files, out, "--lr", "1e18", "--clip", "0"))
    assert result.exit_code == 1
    assert "Error: the loss became" in result.output
    assert "lower --lr" in result.output
    np.testing.assert_array_equal(_arrays(out)[0], _arrays(files / "pruned.onnx")[0])


def test_without_torch_one_line_says_how_to_install_it(files: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "torch.py"
    blocker.write_text("raise ImportError('no torch here')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        _command(*arguments(files, tmp_path / "out.onnx")), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "Error: fine-tuning needs PyTorch: pip install 'toast-onnx[torch]'\n"


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--epochs", "2"], 2, "exclude each other"),
        (["--teacher", "nowhere.onnx"], 1, "nowhere.onnx does not exist"),
        (["--labels", "nowhere.csv"], 1, "no such labels file"),
        (["--resume"], 1, "does not exist; start without --resume"),
        (["--freeze", "nothing*"], 1, "fits no weight"),
        (["--report", "nowhere/report.json"], 1, "the folder nowhere does not exist"),
        (["--torch-export", str(DENSE)], 1, "is the input file"),
        (["--save-module", "same.pt", "--torch-export", "same.pt"], 1, "would both be same.pt"),
        (["--device", "cuda:99"], 1, "CUDA"),
        (["--data", "nowhere"], 1, "no such file or folder"),
    ],
)
def test_mistakes_are_told_in_one_line(
    files: Path, tmp_path: Path, more: list[str], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke(*arguments(files, tmp_path / "out.onnx", *more))
    assert result.exit_code == status
    assert message in result.output
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("labels", "augmentation", "used"),
    [
        (False, "random crops of 25% .. 100 % of the area", (0.3, 1.0, 0.95)),
        (True, "random crops of 60%", (1.0, 0.0, 0.0)),
    ],
)
def test_without_labels_images_are_varied_more_unless_told_otherwise(
    files: Path, tmp_path: Path, labels: bool, augmentation: str, used: tuple[float, float, float]
) -> None:
    command = ["finetune", str(files / "pruned.onnx"), "--teacher", str(DENSE), "--data", str(files / "data.npz")]
    command += ["--preprocess", "none", "--steps", "1", "--batch", "8", "--device", "cpu"]
    if labels:
        np.savez(tmp_path / "labels.npz", labels=np.arange(48) % 10)
        command += ["--labels", str(tmp_path / "labels.npz")]
    told = ["--augment", "none", "--output-weight", "0.2", "--mixup", "0.5", "--ema", "0.4"]
    for k, more in enumerate(([], told)):
        result = invoke(*command, *more, "-o", str(tmp_path / f"{k}.onnx"))
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / f"{k}.json").read_text())["finetune"]
        assert tuple(found["settings"][n] for n in ("outputs", "mixup", "average")) == (
            (0.2, 0.5, 0.4) if more else used
        )
        assert found["augmentation"].startswith("none" if more else augmentation)


def test_nothing_to_learn_from_is_an_error(files: Path, tmp_path: Path) -> None:
    given: list[Any] = arguments(files, tmp_path / "out.onnx")
    del given[2:4]
    result = invoke(*given)
    assert result.exit_code == 1
    assert "nothing to learn from" in result.output


def test_help_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert invoke("finetune", "--help").exit_code == 0
