"""`toast-onnx calibrate`, and `prune` with what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests import zoo
from tests.pace import mostly_slow
from toast_onnx.model import file_hash
from toast_onnx_calibration.store import open_statistics
from toast_onnx_cli.main import SUBCOMMANDS, main

Exported = Callable[[zoo.Case], Path]
RATIOS = "version: 1\nattention: {qk: 0.5, vo: 0.25}\nffn: {fc2: 0.5}\nalign: 1\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported) -> Path:
    monkeypatch.chdir(tmp_path)
    source = exported(zoo.Case("timm-vit"))
    (tmp_path / "m.onnx").write_bytes(source.read_bytes())
    np.save(tmp_path / "x.npy", zoo.inputs(source, 6)["input"])
    (tmp_path / "r.yaml").write_text(RATIOS)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--threads", "1"])


def merge(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["statistics", "merge", *arguments])


def test_it_is_a_command() -> None:
    assert "calibrate" in SUBCOMMANDS


def test_what_it_writes_and_says(files: Path) -> None:
    result = run("calibrate", "m.onnx", "--data", "x.npy")
    assert result.exit_code == 0, result.stderr
    assert "m.statistics.npz: 6 samples, 2 blocks" in result.stdout
    assert "class token weighted 20" in result.stdout
    header = open_statistics(files / "m.statistics.npz").header
    assert header.model_sha256 == file_hash(files / "m.onnx")
    assert header.parts == {"0": ["context", "hidden", "qk"], "1": ["context", "hidden", "qk"]}


def test_one_json_document(files: Path) -> None:
    result = run("calibrate", "m.onnx", "--data", "x.npy", "-o", "s.npz", "--samples", "4", "--seed", "3", "--json")
    document = json.loads(result.stdout)
    assert (document["statistics"], document["samples"], document["seed"]) == ("s.npz", 4, 3)
    assert len(document["fingerprints"]) == 1


def test_pruning_from_the_file_and_from_the_data_is_the_same(files: Path) -> None:
    """With `bias`: `ridge` goes on to match means block by block, for which a file of statistics is no data."""
    (files / "b.yaml").write_text(RATIOS + "compensation: {kind: bias}\n")
    assert run("calibrate", "m.onnx", "--data", "x.npy", "--ratios", "b.yaml", "-o", "s.npz").exit_code == 0
    first = run("prune", "m.onnx", "--ratios", "b.yaml", "-o", "a.onnx", "--statistics", "s.npz")
    second = run("prune", "m.onnx", "--ratios", "b.yaml", "-o", "b.onnx", "--data", "x.npy")
    assert first.exit_code == second.exit_code == 0, first.stderr + second.stderr
    assert (files / "a.onnx").read_bytes() == (files / "b.onnx").read_bytes()
    statistics = json.loads((files / "b.json").read_text())["statistics"]
    assert statistics["samples"] == 6
    assert statistics["model_sha256"] == file_hash(files / "m.onnx")
    assert "6 samples" in second.stdout


def test_data_changes_the_result(files: Path) -> None:
    assert run("prune", "m.onnx", "--ratios", "r.yaml", "-o", "a.onnx").exit_code == 0
    assert run("prune", "m.onnx", "--ratios", "r.yaml", "-o", "b.onnx", "--data", "x.npy").exit_code == 0
    assert (files / "a.onnx").read_bytes() != (files / "b.onnx").read_bytes()


def test_the_ratios_file_gives_defaults_and_options_win(files: Path) -> None:
    (files / "c.yaml").write_text(RATIOS + "calibration: {data: x.npy, samples: 4, seed: 5, tokens: 0.5}\n")
    run("prune", "m.onnx", "--ratios", "c.yaml", "-o", "a.onnx")
    run("prune", "m.onnx", "--ratios", "c.yaml", "-o", "b.onnx", "--samples", "3", "--tokens", "all", "--seed", "6")
    a, b = (json.loads((files / f"{k}.json").read_text())["statistics"] for k in "ab")
    assert (a["samples"], a["seed"], a["tokens"]) == (4, 5, 0.5)
    assert (b["samples"], b["seed"], b["tokens"]) == (3, 6, 1.0)


@pytest.mark.parametrize("kind", mostly_slow(["none", "bias", "ridge"], "none".__eq__))
def test_every_score_finds_its_statistics(kind: str, files: Path) -> None:
    scores = (("energy", "activation"), ("second-order", "variance"), ("gm", "activation"), ("l2", "second-order"))
    for attention, ffn in scores:
        (files / "s.yaml").write_text(
            f"version: 1\nattention: {{qk: 0.5, vo: 0.5, select: index, score: {attention}}}\n"
            f"ffn: {{fc1: 0.25, fc2: 0.5, score: {ffn}}}\nalign: 1\ncompensation: {{kind: {kind}}}\n"
        )
        result = run("prune", "m.onnx", "--ratios", "s.yaml", "-o", "p.onnx", "--overwrite", "--data", "x.npy")
        assert result.exit_code == 0, (attention, ffn, result.stderr)


def test_sequential_statistics_need_samples(files: Path) -> None:
    (files / "s.yaml").write_text(RATIOS + "compensation: {statistics: sequential}\n")
    assert run("calibrate", "m.onnx", "--data", "x.npy", "-o", "s.npz").exit_code == 0
    for source in ([], ["--statistics", "s.npz"]):
        result = run("prune", "m.onnx", "--ratios", "s.yaml", *source)
        assert result.exit_code == 1
        assert "give samples with --data" in result.stderr
    result = run("prune", "m.onnx", "--ratios", "s.yaml", "--data", "x.npy", "-o", "p.onnx")
    assert result.exit_code == 0, result.stderr
    assert "each block behind the pruned ones" in result.stdout


def test_adding_up_other_samples(files: Path) -> None:
    x = np.load(files / "x.npy")
    for name, part in (("a", x[:2]), ("b", x[2:])):
        np.save(files / f"{name}.npy", part)
        assert run("calibrate", "m.onnx", "--data", f"{name}.npy", "-o", f"{name}.npz").exit_code == 0
    result = merge("a.npz", "b.npz", "-o", "m.npz")
    assert result.exit_code == 0, result.stderr
    assert "6 samples" in result.stdout


def test_shards_of_one_run(files: Path) -> None:
    given = ("calibrate", "m.onnx", "--data", "x.npy", "--batch", "2")
    for number, other in ((1, 2), (2, 1)):
        result = run(*given, "--shard", f"{number}/2")
        assert result.exit_code == 0, result.stderr
        assert f"holds shard {number} of 2; `statistics merge` adds up the others: {other}" in result.stderr
    assert run(*given).exit_code == 0
    result = merge("m.2-of-2.statistics.npz", "m.1-of-2.statistics.npz", "-o", "all.npz", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["samples"], document["share"]) == (6, None)
    assert open_statistics(files / "all.npz").header == open_statistics(files / "m.statistics.npz").header
    assert (files / "all.npz").stat().st_size == (files / "m.statistics.npz").stat().st_size


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_shards_that_are_none(shard: str, files: Path) -> None:
    assert run("calibrate", "m.onnx", "--data", "x.npy", "--shard", shard).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune", "m.onnx", "--ratios", "r.yaml", "--statistics", "absent.npz"], "absent.npz does not exist"),
        (["prune", "m.onnx", "--ratios", "r.yaml", "--statistics", "x.npy"], "no statistics file"),
        (["calibrate", "m.onnx", "--data", "absent"], "absent"),
        (["calibrate", "m.onnx", "--data", "x.npy", "--shard", "1/2"], "1 batches of 16 make no 2 shards"),
        (["calibrate", "m.onnx", "--data", "x.npy", "-o", "absent/s.npz"], "absent"),
    ],
)
def test_failures_are_one_line_and_status_one(files: Path, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert words in line
    assert not list(files.glob("*.statistics.npz"))


def test_statistics_of_another_model_are_refused(files: Path, exported: Exported) -> None:
    run("calibrate", "m.onnx", "--data", "x.npy", "-o", "s.npz")
    (files / "n.onnx").write_bytes(exported(zoo.Case("timm-deit")).read_bytes())
    result = run("prune", "n.onnx", "--ratios", "r.yaml", "--statistics", "s.npz")
    assert result.exit_code == 1
    assert file_hash(files / "m.onnx") in result.stderr
    assert file_hash(files / "n.onnx") in result.stderr


def test_wrong_usage_is_status_two(files: Path) -> None:
    assert run("calibrate", "m.onnx").exit_code == 2
    assert merge("-o", "s.npz").exit_code == 2
    assert run("calibrate", "m.onnx", "--data", "x.npy", "--tokens", "2").exit_code == 2
    assert run("prune", "m.onnx", "--ratios", "r.yaml", "--data", "x.npy", "--statistics", "s.npz").exit_code == 2


def test_nan_activations_are_named(files: Path) -> None:
    np.save(files / "huge.npy", np.full((2, 3, 64, 64), 3e38, np.float32))
    result = run("calibrate", "m.onnx", "--data", "huge.npy")
    assert result.exit_code == 1
    assert "block 0" in result.stderr
    assert not (files / "m.statistics.npz").exists()
