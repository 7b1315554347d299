"""Time left, and what a run will take, before and while it runs."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests import zoo
from tests.pruning import look
from toast_onnx.errors import ConfigError
from toast_onnx.matching.span import block_span
from toast_onnx.planning.macs import graph_macs
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.forecast import Forecast, Spent, cost_behind
from toast_onnx_calibration.work import working_bytes
from toast_onnx_cli.main import main

Exported = Callable[[zoo.Case], Path]
Usage = namedtuple("Usage", "total used free")


def trials(blocks: int = 12) -> list[Spent]:
    """Nine trials of three parts of every block; the deeper the block, the less is run behind it."""
    rng = np.random.default_rng(0)
    making = {"qk": 0.4, "vo": 0.6, "fc2": 3.0}
    return [
        Spent(part, 1 - b / blocks, seconds * rng.uniform(0.9, 1.1), 2.0 * (1 - b / blocks) * rng.uniform(0.9, 1.1))
        for b in range(blocks)
        for part, seconds in making.items()
        for _ in range(9)
    ]


def test_the_time_left_is_right_after_a_tenth() -> None:
    """Where equal steps would be taken for granted it would be a fifth too much and more."""
    every = trials()
    done, ahead = every[: len(every) // 10], every[len(every) // 10 :]
    true = sum(t.making + t.running for t in ahead)
    found = Forecast(done).seconds([(t.kind, t.cost) for t in ahead])
    assert found == pytest.approx(true, rel=0.1)
    equal = sum(t.making + t.running for t in done) / len(done) * len(ahead)
    assert equal > 1.2 * true
    assert Forecast(done).seconds([(t.kind, t.cost) for t in ahead], workers=2) == pytest.approx(found / 2)
    longer = sum(t.making + 3 * t.running for t in ahead)
    assert Forecast(done).seconds([(t.kind, t.cost) for t in ahead], longer=3) == pytest.approx(longer, rel=0.1)
    assert Forecast().seconds([("qk", 1.0)]) is None


def test_what_runs_behind_a_block(exported: Exported) -> None:
    dense = look(exported(zoo.Case("timm-vit")))
    behind = cost_behind(dense)
    starts = [block_span(dense.view, dense.facts, b).start for b in dense.match.blocks]
    shares = [behind(None), *(behind(start) for start in starts)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    blocks = shares[1] - shares[2]  # one block, of two equal ones
    assert shares[2] == pytest.approx(blocks, rel=0.1)
    assert graph_macs(dense.view, dense.counted) > 0


def test_a_full_disk_is_told_before_the_work(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(zoo.Case("timm-vit"))
    dense = look(path)
    np.save(tmp_path / "x.npy", zoo.inputs(path, 8)["input"])
    options = CalibrationOptions(threads=1, budget=1)
    needed = working_bytes(dense, 8)
    width = dense.match.blocks[0].ffn.in_features  # type: ignore[union-attr]
    tokens = dense.counted.shape(block_span(dense.view, dense.facts, dense.match.blocks[0]).start)[1]  # type: ignore[index]
    x = np.load(tmp_path / "x.npy")
    assert needed >= x.nbytes + 2 * 8 * tokens * width * 4
    assert needed < x.nbytes + 2 * 8 * tokens * width * 4 + 3 * path.stat().st_size + 8 * 4096
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 1000))
    with pytest.raises(ConfigError, match=r"working files need .* GB in .*, where 0.0 GB are free: free space"):
        calibrate(dense, tmp_path / "x.npy", tmp_path / "s.npz", options=options)
    arguments = ["sensitivity", str(path), "--data", str(tmp_path / "x.npy"), "-o", str(tmp_path / "r.json")]
    result = CliRunner().invoke(main, [*arguments, "--ratios", "0.5", "--parts", "qk"])
    assert result.exit_code == 1
    assert "Error: working files need" in result.stderr
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("command", "least", "each"),
    [
        (["sensitivity", "--ratios", "0.5", "--parts", "qk,vo"], 4, 8),
        (["plan", "--macs", "0.9", "--parts", "vo", "--trial-samples", "4"], 4, 4),
    ],
)
def test_dry_runs(command: list[str], least: int, each: int, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    np.save(tmp_path / "x.npy", zoo.inputs(path, 8)["input"])
    given = [*command, str(path), "--data", str(tmp_path / "x.npy"), "-o", str(tmp_path / "out"), "--batch", "2"]
    result = CliRunner().invoke(main, [*given, "--align-heads", "1", "--threads", "1", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["trials"] >= least
    assert (document["samples"], document["trial_samples"], document["measured_on"]) == (8, each, 2)
    assert 0 < document["seconds"] < 600
    assert 0 < document["disk_bytes"] < document["free_bytes"]
    assert not (tmp_path / "out").exists()
