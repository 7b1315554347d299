"""The last layer's second fit: what the values behind a block become, and when they are not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.pruning import look
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ModelError
from toast_onnx.finetune.local import LocalSettings
from toast_onnx.matching.span import span_of
from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import Pruned, prune
from toast_onnx.runtime import run_model
from toast_onnx_calibration import local, recorded, refitting
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.local import refine_locally
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.recorded import Recording
from toast_onnx_calibration.stored import Samples, store_samples

Exported = Callable[[zoo.Case], Path]
RATIOS: dict[str, Any] = {
    "version": 1,
    "attention": {"qk": 0.35, "vo": 0.35},
    "ffn": {"fc2": 0.35},
    "align": 1,
    "compensation": {"kind": "ridge"},
}
OPTIONS = CalibrationOptions(threads=1, batch=8)
REFIT = LocalSettings(steps=0)


@pytest.fixture(scope="module")
def vit(exported: Exported) -> Study:
    return look(exported(zoo.Case("timm-vit")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("samples"), (3, 64, 64), 27)


def drawn(folder: Path, shape: tuple[int, ...], count: int) -> Path:
    path = folder / "images.npy"
    np.save(path, np.random.default_rng(8).standard_normal((count, *shape)).astype(np.float32))
    return path


def refitted(dense: Study, data: Path, settings: LocalSettings = REFIT, recording: Recording | None = None) -> Pruned:
    def refine(new: Any) -> Any:
        return refine_locally(dense, new, data, OPTIONS, settings, recording=recording)

    return prune(dense, parse_ratios(RATIOS), SyntheticStatistics(dense), refine=refine)


def arrays(pruned: Pruned) -> Iterator[np.ndarray]:
    for block in sorted(pruned.weights):
        weights = pruned.weights[block]
        if weights.ffn is not None and weights.ffn.fc2 is not None:
            yield from weights.ffn.fc2
        if weights.attention is not None and weights.attention.proj is not None:
            yield weights.attention.proj.weight
            yield weights.attention.proj.bias


def assert_same(a: Pruned, b: Pruned) -> None:
    assert [r.kept for r in a.local] == [r.kept for r in b.local]
    for found, expected in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("family", ["timm-vit", "hf-dinov2"])
def test_values_behind_a_block_are_those_of_another_run(
    family: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a layer scale (DINOv2) and without, moving them along gives later blocks what running them again does."""
    dense = look(exported(zoo.Case(family)))
    (shape,) = dense.counted_shapes.values()
    data = drawn(tmp_path, shape[1:], 24)
    told: list[bool] = []
    true = refitting._adds_up
    monkeypatch.setattr(refitting, "_adds_up", lambda *given: told.append(true(*given)) or told[-1])
    moved = refitted(dense, data)
    assert told == [True] * len(moved.local)
    monkeypatch.setattr(refitting, "_adds_up", lambda *given: False)
    assert_same(moved, refitted(dense, data))


def test_a_norm_behind_the_layer_is_run_again(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = look(exported(zoo.Case("timm-swinv2")))
    (shape,) = dense.counted_shapes.values()
    told: list[bool] = []
    true = refitting._adds_up
    monkeypatch.setattr(refitting, "_adds_up", lambda *given: told.append(true(*given)) or told[-1])
    found = refitted(dense, drawn(tmp_path, shape[1:], 24))
    assert told
    assert not any(told)
    assert all(r.after is not None and r.before is not None and r.after <= r.before for r in found.local)


def test_a_block_that_cannot_be_trained_keeps_its_refit(
    vit: Study, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*given: Any) -> Any:
        raise ModelError("no such operator")

    plain = refitted(vit, images)
    monkeypatch.setattr(local, "train_block", unknown)
    untrained = refitted(vit, images, replace(REFIT, steps=5))
    assert untrained.local == tuple(replace(r, note="no such operator") for r in plain.local)
    assert_same(untrained, plain)


# -- outputs of the dense model that were kept ----------------------------------------------------------------------


def record(dense: Study, data: Path, folder: Path, **options: Any) -> Recording:
    kept = folder / "kept"
    kept.mkdir()
    recording = Recording(dense, kept)
    calibrate(dense, data, folder / "s.npz", everything(dense), replace(OPTIONS, **options), recording=recording)
    return recording


def samples_of(dense: Study, data: Path, folder: Path, batch: int, **options: Any) -> Samples:
    folder = folder / f"samples-{batch}"
    folder.mkdir()
    return store_samples(dense, data, replace(OPTIONS, **options), folder, lambda _: batch)


def test_kept_outputs_are_those_of_the_model(vit: Study, images: Path, tmp_path: Path) -> None:
    """27 samples: calibration ran them by eight, the last batch not full; they are taken by four, three are left."""
    recording = record(vit, images, tmp_path)
    samples = samples_of(vit, images, tmp_path, 4)
    found = recording.of(samples.rows, samples.size)
    ends = [span.end for block in vit.match.blocks if (span := span_of(vit.view, vit.facts, block)) is not None]
    assert list(found) == ends
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(vit.view.model.path.read_bytes())
    expected = run_model(copy, ends, [{"input": np.load(images)[:24]}], threads=1)[0]
    for name, array in found.items():
        assert array.shape[:2] == (6, 4)
        np.testing.assert_allclose(array.reshape(24, *array.shape[2:]), expected[name], atol=1e-5)


def test_blocks_are_refitted_to_kept_outputs_as_to_new_ones(
    vit: Study, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = record(vit, images, tmp_path)
    asked: list[int] = []
    of = recording.of
    monkeypatch.setattr(recording, "of", lambda *given: asked.append(len(of(*given))) or of(*given))
    assert_same(refitted(vit, images, recording=recording), refitted(vit, images))
    assert asked == [2]


def test_outputs_for_other_samples_are_of_no_use(vit: Study, images: Path, tmp_path: Path) -> None:
    recording = record(vit, images, tmp_path, samples=16, seed=1)
    assert recording.of(samples_of(vit, images, tmp_path, 4).rows, 4) == {}
    assert recording.of(samples_of(vit, images, tmp_path, 8, samples=16, seed=1).rows, 8)
    assert Recording(vit, tmp_path).of(samples_of(vit, images, tmp_path, 2).rows, 2) == {}


@pytest.mark.parametrize(
    "options", [{"budget": 1}, {"shard": (1, 2)}], ids=["several passes", "a share of the samples"]
)
def test_what_is_not_run_whole_keeps_nothing(options: dict[str, Any], vit: Study, images: Path, tmp_path: Path) -> None:
    recording = record(vit, images, tmp_path, **options)
    assert recording.tensors == ()
    assert recording.of(samples_of(vit, images, tmp_path, 4).rows, 4) == {}


def test_no_more_is_kept_than_the_limit(
    vit: Study, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [span.end for block in vit.match.blocks if (span := span_of(vit.view, vit.facts, block)) is not None]
    whole = sum(int(np.prod(vit.counted.shape(end) or ())) * 4 for end in ends) * 27
    monkeypatch.setattr(recorded, "LIMIT", whole)
    recording = Recording(vit, tmp_path)
    assert len(recording.begin(27)) == 2
    assert recording.begin(28) == ()
    assert recording.begin(None) == ()


def test_only_tensors_with_the_batch_in_front_are_kept(exported: Exported, tmp_path: Path) -> None:
    """torchvision's attention has tokens in front, its stream the batch; a fixed batch is no axis to tell by."""
    study = look(exported(zoo.Case("torchvision-vit")))
    for name in Recording(study, tmp_path).begin(4):
        assert (study.facts.shape(name) or ())[0] == 2
        assert (study.other.shape(name) or ())[0] == 3
    assert Recording(replace(study, dynamic_batch=False), tmp_path).begin(4) == ()
