"""What `toast-onnx prune` says beside its result, and how it leaves when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests import zoo
from tests.matching.test_dims import Turn, attention, pooled, pooled_image
from tests.matching.tiny import TOKENS, WIDTH
from tests.pruning import run, worst
from toast_onnx.finetune.local import LocalResult
from toast_onnx.planning.presets import preset
from toast_onnx.planning.ratios import Ratios
from toast_onnx_cli.main import main
from toast_onnx_cli.prune_summary import correction_notes

Exported = Callable[[zoo.Case], Path]


@pytest.mark.parametrize(("ratio", "said"), [("0.1", True), ("0.5", False)])
def test_a_share_of_the_heads_that_rounds_to_none_is_said(
    ratio: str, said: bool, exported: Exported, tmp_path: Path
) -> None:
    ratios = tmp_path / "r.yaml"
    ratios.write_text(f"version: 1\nattention: {{heads: {ratio}}}\n")
    arguments = ["prune", str(exported(zoo.Case("timm-vit"))), "--ratios", str(ratios), "-o", str(tmp_path / "o.onnx")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert ("attention.heads rounds to no head in block 0, 1" in result.stderr) is said


@pytest.mark.parametrize("given", [{"steps": 400}, {"views": 2}, {"steps": 400, "views": 2}, {}])
def test_settings_of_training_that_nothing_trains_are_said(
    given: dict[str, int], exported: Exported, tmp_path: Path
) -> None:
    ratios = tmp_path / "r.yaml"
    words = ", ".join(["kind: ridge", *(f"{key}: {value}" for key, value in given.items())])
    ratios.write_text(f"version: 1\nffn: {{fc2: 0.5}}\ncompensation: {{{words}}}\n")
    arguments = ["prune", str(exported(zoo.Case("timm-vit"))), "--ratios", str(ratios), "-o", str(tmp_path / "o.onnx")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    for key in ("steps", "views"):
        assert (f"compensation.{key} does nothing with kind: ridge" in result.stderr) is (key in given)


def test_blocks_that_are_not_corrected_are_said(exported: Exported, tmp_path: Path) -> None:
    """Places that share their weights keep them; the default corrects, and none of a ViT or a BERT is named."""
    (tmp_path / "r.yaml").write_text("version: 1\nffn: {fc2: 0.5}\n")
    paths = {"albert": Path(__file__).parents[1] / "cases" / "graphs" / "albert.onnx"}
    paths |= {family: exported(zoo.Case(family)) for family in ("hf-bert", "timm-vit")}
    said = {}
    for name, path in paths.items():
        np.savez(tmp_path / f"{name}.npz", **zoo.inputs(path, batch=24))
        words = ["prune", str(path), "--ratios", str(tmp_path / "r.yaml"), "-o", str(tmp_path / f"{name}.onnx")]
        result = CliRunner().invoke(main, [*words, "--data", str(tmp_path / f"{name}.npz"), "--threads", "1"])
        assert result.exit_code == 0, result.stderr
        said[name] = result.stderr
    assert "3 of 3 blocks keep their closed form and are not corrected: block 0" in said["albert"]
    assert said["albert"].count("shares weights with") == 1
    assert "keep their" not in said["timm-vit"] + said["hf-bert"]


def test_what_is_kept_of_blocks_that_are_not_trained_is_said() -> None:
    results = [
        LocalResult(0, 0.2, 0.1, "trained"),
        LocalResult(1, 0.2, 0.1, "refit", "the node 'a' cannot run"),
        LocalResult(2, 0.2, 0.2, "closed form", "the node 'b' cannot run"),
        LocalResult(3, note="reads more"),
        LocalResult(4, 0.3, 0.1, "refit", "the node 'c' cannot run"),
    ]
    assert correction_notes(results) == [
        "2 of 5 blocks keep their refit and are not trained: the node 'a' cannot run",
        "1 of 5 blocks keep their closed form and are not trained: the node 'b' cannot run",
        "1 of 5 blocks keep their closed form and are not corrected: reads more",
    ]
    assert correction_notes([]) == correction_notes(results[:1]) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
def test_a_terminated_run_leaves_nothing(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    work = tmp_path / "work"
    work.mkdir()
    np.save(tmp_path / "x.npy", np.repeat(zoo.inputs(path, 1)["input"], 3_000, axis=0))
    command = [sys.executable, "-m", "toast_onnx_cli.main", "calibrate", str(path), "--data", str(tmp_path / "x.npy")]
    command += ["--samples", "3000", "--threads", "1", "--memory", "0.000001", "-o", str(work / "s.npz")]
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(work)}, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not list(work.rglob("toast-passes-*/*.npy")):
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    assert not [*work.glob("toast-*"), *work.glob("*s.npz*")]


@pytest.mark.parametrize(("option", "said"), [([], True), (["--compensation", "ridge"], False)])
def test_a_published_schedule_says_that_it_expects_training(
    option: list[str], said: bool, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(zoo.Case("timm-vit"))
    np.save(tmp_path / "x.npy", zoo.inputs(path, 4)["input"])
    short = preset("paper:deit_tiny@0.8").model_copy(update={"attention": Ratios().attention, "ffn": Ratios().ffn})
    monkeypatch.setattr("toast_onnx_cli.prune.ratios_given", lambda _: short)  # for a model of two blocks
    words = ["prune", str(path), "--ratios", "paper:deit_tiny@0.8", "--data", str(tmp_path / "x.npy"), *option]
    result = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "o.onnx")])
    assert result.exit_code == 0, result.stderr
    document = json.loads((tmp_path / "o.json").read_text())
    assert ("expects fine-tuning" in result.stdout) is said
    assert ("expects fine-tuning" in (document["options"]["expects"] or "")) is said
    assert document["options"]["ratios"]["compensation"]["kind"] == ("none" if said else "ridge")


@pytest.mark.parametrize("pool", [pooled, pooled_image])
def test_pooled_queries_are_measured_before_they_are_pooled(pool: Turn, tmp_path: Path) -> None:
    """Hiera and SAM 2, from calibration data: the statistics lie in the layout of the layer's output."""
    built = attention(tmp_path / "model.onnx", pool, lambda _, name: name, dead=(0, 3, 4, 6))
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((64, TOKENS, WIDTH)).astype(np.float32))
    (tmp_path / "ratios.yaml").write_text("version: 1\nattention: {qk: 0.5}\nalign: 1\n")
    command = ["prune", built.path, "--ratios", tmp_path / "ratios.yaml", "--data", tmp_path / "data.npz"]
    result = CliRunner().invoke(main, [str(word) for word in [*command, "-o", tmp_path / "pruned.onnx"]])
    assert result.exit_code == 0, result.output
    feeds = {"x": np.random.default_rng(1).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)}
    assert worst(run(tmp_path / "pruned.onnx", feeds), run(built.path, feeds)) < 1e-4


def test_a_target_keeps_one_head_size(exported: Exported, tmp_path: Path) -> None:
    """Q/K and V/Proj keep the wider of the two; `tie: false` in the file has them padded instead."""
    source, widths = exported(zoo.Case("timm-vit")), {}
    for name, tie in {"tied": "", "padded": ", tie: false"}.items():
        ratios = tmp_path / "r.yaml"
        ratios.write_text(f"version: 1\nattention: {{qk: 0.5, vo: 0.25{tie}}}\ncompensation: {{kind: none}}\n")
        out = tmp_path / f"{name}.onnx"
        arguments = ["prune", str(source), "--ratios", str(ratios), "-o", str(out), "--target", "tensorrt", "--json"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.stderr
        assert ("were padded with zeros" in result.stderr) is (name == "padded")
        after = [block["after"] for block in json.loads(result.stdout)["blocks"]]
        widths[name] = {(block["qk_dim"], block["vo_dim"]) for block in after}
    assert widths == {"tied": {(48, 48)}, "padded": {(48, 48)}}
