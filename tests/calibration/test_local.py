"""Local compensation: trained blocks come closer to the dense ones on unseen samples, and nothing else changes."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from tests import zoo
from tests.pruning import look, run
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import BackendError, ConfigError, DataError
from toast_onnx.finetune import local
from toast_onnx.finetune.local import LocalSettings
from toast_onnx.matching.span import block_span
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import Pruned, prune
from toast_onnx.runtime import run_model
from toast_onnx.solving.weights import BlockWeights
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.local import refine_locally
from toast_onnx_cli.main import main

Exported = Callable[[zoo.Case], Path]
RATIOS: dict[str, Any] = {
    "version": 1,
    "attention": {"qk": 0.35, "vo": 0.35},
    "ffn": {"fc2": 0.35},
    "align": 1,
    "compensation": {"kind": "local"},
}
OPTIONS = CalibrationOptions(threads=1, batch=8)
BRIEF = LocalSettings(steps=12, rate=0.01)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 random images of 64 x 64 as tensors; the last 16 are for judging."""
    path = tmp_path_factory.mktemp("samples") / "images.npy"
    np.save(path, np.random.default_rng(5).standard_normal((48, 3, 64, 64)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def vit(exported: Exported) -> Study:
    return look(exported(zoo.Case("timm-vit")))


def trained(dense: Study, data: Path, settings: LocalSettings = BRIEF, ratios: dict[str, Any] = RATIOS) -> Pruned:
    def refine(new: Any) -> Any:
        return refine_locally(dense, new, data, OPTIONS, settings)

    return prune(dense, parse_ratios(ratios), SyntheticStatistics(dense), refine=refine)


def closed_form(dense: Study, ratios: dict[str, Any] = RATIOS) -> Pruned:
    ridge = ratios | {"compensation": {"kind": "ridge"}}
    return prune(dense, parse_ratios(ridge), SyntheticStatistics(dense))


def error(pruned: Pruned, dense: Study, images: np.ndarray, folder: Path) -> float:
    """Relative squared error of the logits."""
    path = folder / "pruned.onnx"
    save_model(pruned.model, path)
    want, got = (run(p, {"input": images})[0].astype(np.float64) for p in (dense.view.model.path, path))
    return float(((got - want) ** 2).sum() / (want**2).sum())


def same(a: BlockWeights, b: BlockWeights) -> bool:
    assert a.ffn is not None
    assert b.ffn is not None
    assert a.attention is not None
    assert b.attention is not None
    pairs = [(a.ffn.fc2, b.ffn.fc2)]
    arrays = [(x, y) for p in pairs for x, y in zip(p[0] or (), p[1] or (), strict=True)]
    for part in ("q", "k", "v", "proj"):
        x, y = getattr(a.attention, part), getattr(b.attention, part)
        arrays += [(x.weight, y.weight), (x.bias, y.bias)]
    return all(np.array_equal(x, y) for x, y in arrays)


def test_training_helps_on_unseen_images_and_passes_the_twin(vit: Study, samples: Path, tmp_path: Path) -> None:
    longer = replace(BRIEF, steps=36)  # from the refit on
    first, second = trained(vit, samples, longer), trained(vit, samples, longer)
    unseen = np.random.default_rng(6).standard_normal((16, 3, 64, 64)).astype(np.float32)
    assert first.twin is not None
    assert first.twin.worst < 1e-4
    assert error(first, vit, unseen, tmp_path) < 0.9 * error(closed_form(vit), vit, unseen, tmp_path)
    assert any(r.kept == "trained" for r in first.local)
    for result in first.local:
        assert result.after is not None
        assert result.before is not None
        assert result.after < 0.95 * result.before
    assert all(same(first.weights[b], second.weights[b]) for b in first.weights), "the same run twice differs"


def test_means_are_matched_without_torch(
    vit: Study, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ratios = RATIOS | {"compensation": {"kind": "ridge"}}
    matched = trained(vit, samples, replace(BRIEF, steps=0), ratios)
    assert {r.kept for r in matched.local} <= {"mean", "refit"}
    images = np.load(samples)
    path = tmp_path / "matched.onnx"
    save_model(matched.model, path)
    seen = images[:40]  # the last of six batches judged
    for block in vit.match.blocks:
        end = block_span(vit.view, vit.facts, block).end
        want, got = (stream(p, end, seen, tmp_path) for p in (vit.view.model.path, path))
        weights = np.ones((1, want.shape[1], 1))
        weights[:, 0] = 20
        shift = (weights * (got - want)).mean(axis=(0, 1))
        plain = (weights * want).mean(axis=(0, 1))
        assert np.abs(shift).max() < 1e-4 * np.abs(plain).max()


def stream(model: Path, tensor: str, images: np.ndarray, folder: Path) -> np.ndarray:
    """A tensor inside a model, in float64."""
    copy = folder / "copy.onnx"
    copy.write_bytes(model.read_bytes())
    return run_model(copy, [tensor], [{"input": images}], threads=1)[0][tensor].astype(np.float64)


def test_last_layers_are_fitted_behind_the_blocks_before(vit: Study, samples: Path) -> None:
    """More is gained on held-out samples than by means alone, and other samples decided how much."""
    found = trained(vit, samples, replace(BRIEF, steps=0), RATIOS | {"compensation": {"kind": "ridge"}})
    start = closed_form(vit)
    assert [r.kept for r in found.local] == ["refit", "refit"]
    assert found.twin is not None
    assert found.twin.worst < 1e-4
    for block, result in enumerate(found.local):
        assert result.after is not None
        assert result.before is not None
        assert result.after < 0.9 * result.before
        new, old = found.weights[block].ffn, start.weights[block].ffn
        assert new is not None
        assert old is not None
        assert new.fc2 is not None
        assert old.fc2 is not None
        assert not np.array_equal(new.fc2[0], old.fc2[0])
        assert new.entries is not None  # those of the twin, unchanged
        assert found.weights[block].attention is not None


def test_what_gets_worse_is_not_kept(vit: Study, samples: Path) -> None:
    pruned = trained(vit, samples, replace(BRIEF, rate=30.0))
    assert all(r.kept in ("closed form", "mean", "refit") for r in pruned.local)
    start = closed_form(vit)
    for block, result in enumerate(pruned.local):
        assert result.after is not None
        assert result.before is not None
        assert result.after <= result.before
        assert same(pruned.weights[block], start.weights[block]) == (result.kept == "closed form") or (
            result.kept in ("mean", "refit")
        )


def test_the_best_weights_are_kept_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer learns four noisy rows by heart: held-out rows are best some way before the end."""
    rng = np.random.default_rng(3)
    true, start = rng.standard_normal((2, 16, 4))
    x = rng.standard_normal((6, 2, 16)).astype(np.float32)
    y = (x @ (0.2 * true) + 2 * rng.standard_normal((6, 2, 4))).astype(np.float32)
    weight = onnx.numpy_helper.from_array((0.5 * start).astype(np.float32), "w")
    inputs, outputs = ([onnx.helper.make_tensor_value_info(n, 1, [2, c])] for n, c in (("x", 16), ("y", 4)))
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "layer", inputs, outputs, [weight])
    piece = Model(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), Path("layer.onnx"))
    settings = LocalSettings(steps=200, check=10, rate=0.1, held_out=0.5)
    looks: list[float] = []
    error = local._Problem.error
    monkeypatch.setattr(local._Problem, "error", lambda self, judges: looks.append(error(self, judges)) or looks[-1])
    found, best = local.train_block(piece, {"w": np.ones((16, 4), bool)}, x, y, np.ones((6, 1, 1)), settings)
    assert len(looks) == 21
    assert best == min(looks) < 0.98 * looks[-1]
    judged = np.mean([((a @ found["w"] - b) ** 2).sum() / (b**2).sum() for a, b in zip(x[3:], y[3:], strict=True)])
    assert judged == pytest.approx(best, rel=1e-5)


def test_parts_that_keep_their_width_are_left_alone(vit: Study, samples: Path) -> None:
    only_values = RATIOS | {"attention": {"qk": 0, "vo": 0.5}, "ffn": {"fc2": 0}}
    pruned = trained(vit, samples, ratios=only_values)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    for weights in pruned.weights.values():
        assert weights.ffn is None
        assert weights.attention is not None
        assert weights.attention.q is None


@pytest.mark.parametrize("family", [pytest.param("timm-swin", marks=pytest.mark.slow), "hf-dinov2"])
def test_other_families_are_cut_into_blocks(family: str, exported: Exported, tmp_path: Path) -> None:
    dense = look(exported(zoo.Case(family)))
    (shape,) = dense.counted_shapes.values()
    data = tmp_path / "images.npy"
    np.save(data, np.random.default_rng(7).standard_normal((12, *shape[1:])).astype(np.float32))
    pruned = trained(dense, data, replace(BRIEF, steps=3))
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    assert [r.block for r in pruned.local] == sorted(pruned.weights)
    assert all(r.note is None for r in pruned.local)
    assert all(r.after is not None and r.before is not None and r.after <= r.before for r in pruned.local)


def test_too_few_samples(vit: Study, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, 3, 64, 64), np.float32))
    with pytest.raises(DataError, match="give more samples"):
        trained(vit, tmp_path / "one.npy")


def test_without_samples_the_library_says_so(vit: Study) -> None:
    with pytest.raises(ConfigError, match="--data"):
        prune(vit, parse_ratios(RATIOS), SyntheticStatistics(vit))


def test_without_torch(vit: Study, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **named: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BackendError, match=r"toast-onnx\[torch\]"):
        trained(vit, samples)


@pytest.mark.slow
def test_the_command(vit: Study, samples: Path, tmp_path: Path) -> None:
    ratios = tmp_path / "ratios.yaml"
    ratios.write_text("version: 1\nffn: {fc2: 0.5}\nalign: 1\ncompensation: {kind: local}\n")
    model, out = str(vit.view.model.path), tmp_path / "out.onnx"
    arguments = ["prune", model, "--ratios", str(ratios), "-o", str(out)]
    bare = CliRunner().invoke(main, arguments)
    assert bare.exit_code == 1
    assert "--data" in bare.stderr
    assert not out.exists()
    done = CliRunner().invoke(
        main, [*arguments, "--data", str(samples), "--samples", "16", "--threads", "1", "--overwrite"]
    )
    assert done.exit_code == 0, done.stderr
    report = json.loads(out.with_suffix(".json").read_text())
    assert [each["block"] for each in report["local"]] == [0, 1]
    assert all(each["after"] <= each["before"] for each in report["local"])
    assert report["twin"]["worst"] < 1e-4
    ratios.write_text("version: 1\nffn: {fc2: 0.5}\nalign: 1\n")
    done = CliRunner().invoke(
        main, [*arguments, "--data", str(samples), "--samples", "16", "--threads", "1", "--overwrite"]
    )
    assert done.exit_code == 0, done.stderr
    report = json.loads(out.with_suffix(".json").read_text())
    assert all(each["kept"] in ("refit", "mean", "closed form") for each in report["local"])
