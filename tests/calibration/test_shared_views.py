"""Local compensation on views that the dense and the pruned model see: which there are, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest
from click.testing import CliRunner

from tests import zoo
from tests.calibration.test_local import RATIOS
from tests.calibration.test_refitting import record
from tests.calibration.tiny import colour_model
from tests.pruning import look
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ConfigError, DataError, ModelError
from toast_onnx.finetune.local import LocalResult, LocalSettings
from toast_onnx.finetune.views import Views
from toast_onnx.matching.study import Study
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import Pruned, prune
from toast_onnx_calibration import local
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.local import refine_locally, refining_steps
from toast_onnx_calibration.shared_views import with_views
from toast_onnx_calibration.stored import Samples, store_samples
from toast_onnx_cli.main import main

Exported = Callable[[zoo.Case], Path]
COUNT, SIZE, VIEWS = 48, 8, 2
OPTIONS = CalibrationOptions(threads=1, batch=SIZE)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of 64 x 64; of six batches the last one judges."""
    path = tmp_path_factory.mktemp("images") / "images.npy"
    np.save(path, np.random.default_rng(7).standard_normal((COUNT, 3, 64, 64)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def vit(exported: Exported) -> Study:
    return look(exported(zoo.Case("timm-vit")))


def stored(dense: Study, data: Path, folder: Path) -> Samples:
    return store_samples(dense, data, OPTIONS, folder, lambda _: SIZE)


def corrected(dense: Study, data: Path, settings: LocalSettings, said: list[str] | None = None) -> Pruned:
    def refine(new: Any) -> Any:
        return refine_locally(dense, new, data, OPTIONS, settings, None if said is None else said.append)

    return prune(dense, parse_ratios(RATIOS), SyntheticStatistics(dense), refine=refine)


def outputs(dense: Study) -> list[str]:
    return [output.name for output in dense.view.model.proto.graph.output]


@pytest.mark.parametrize("batch", ["dynamic", "static"])
def test_views_of_what_does_not_judge_come_first(exported: Exported, images: Path, tmp_path: Path, batch: str) -> None:
    dense = look(exported(zoo.Case("timm-vit", batch=batch)))
    samples = stored(dense, images, tmp_path)
    model, (name,) = dense.view.model, samples.feeds
    shares: list[float] = []
    first = samples.count - 1
    found = with_views([model], outputs(dense), samples, first, VIEWS, 3, tmp_path, shares.append)
    assert found.count == first * VIEWS + samples.count
    np.testing.assert_array_equal(found.feeds[name][first * VIEWS :], samples.feeds[name])
    assert found.rows[first * VIEWS * samples.size :] == samples.rows
    assert found.rows[0] == "0 (view 1)"
    assert found.rows[first * samples.size + 1] == "1 (view 2)"
    assert shares == sorted(shares)
    assert (len(shares), shares[-1]) == (first * VIEWS, 1.0)
    alone, held = Views([model], outputs(dense), seed=3), None if batch == "dynamic" else samples.size
    pixels = np.load(images)
    for number in (0, 1, SIZE + 3):  # of each sample its own views, whatever else is in the batch
        made = alone.of({name: pixels[number : number + 1]}, number, VIEWS, held)[name]
        for view in range(VIEWS):
            at, row = divmod(view * first * samples.size + number, samples.size)
            assert close(found.feeds[name][at, row], made[view])


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the few pixels whose gradient is so near zero that its sign is rounding."""
    return float(np.mean(np.abs(a - b) > 1e-4)) < 0.01


def test_blocks_learn_from_views_that_the_written_models_see(
    vit: Study, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views are those of the smaller graph that a run without training writes, and are fitted to as samples are."""
    made: list[Samples] = []

    def kept(*given: Any) -> Samples:
        made.append(with_views(*given))
        return made[-1]

    monkeypatch.setattr(local, "with_views", kept)
    found = corrected(vit, images, LocalSettings(steps=4, views=VIEWS))
    refitted = corrected(vit, images, LocalSettings(steps=0))
    save_model(refitted.model, tmp_path / "refitted.onnx")
    samples = stored(vit, images, tmp_path)
    (name,) = samples.feeds
    pair = [vit.view.model, load_model(tmp_path / "refitted.onnx")]
    expected = with_views(pair, outputs(vit), samples, samples.count - 1, VIEWS, 0, tmp_path)
    views = expected.feeds[name][: -samples.count]
    assert close(made[0].feeds[name][: -samples.count], views)
    (tmp_path / "alone").mkdir()
    alone = with_views(pair[:1], outputs(vit), samples, samples.count - 1, VIEWS, 0, tmp_path / "alone")
    assert not close(alone.feeds[name][: -samples.count], views)
    rows = np.asarray(made[0].feeds[name]).reshape(-1, 3, 64, 64)
    np.save(tmp_path / "all.npy", rows)
    by_hand = LocalSettings(steps=4, held_out=1 / (len(rows) // SIZE))
    again = corrected(vit, tmp_path / "all.npy", by_hand)
    assert again.local == found.local
    for key, value in found.model.arrays.items():
        np.testing.assert_array_equal(value, again.model.arrays[key])
    assert found.local != corrected(vit, images, LocalSettings(steps=4)).local


def test_every_step_is_told(vit: Study, images: Path) -> None:
    settings, said = LocalSettings(steps=1, views=1), list[str]()
    corrected(vit, images, settings, said)
    assert len(said) == refining_steps(vit, settings) == 3 * len(vit.match.blocks)
    assert said == ["refitting blocks/blocks.0", "refitting blocks/blocks.1", *["making views"] * 2, *said[4:]]
    assert said[4:] == ["training blocks/blocks.0", "training blocks/blocks.1"]


@pytest.mark.parametrize("weight", [0.0, np.nan])
def test_classes_without_a_gradient_are_refused(vit: Study, images: Path, tmp_path: Path, weight: float) -> None:
    samples = stored(vit, images, tmp_path)
    model = load_model(colour_model(tmp_path / "m.onnx", size=64))
    model.arrays["weight"] = np.full((3, 3), weight, np.float32)
    pixels = replace(samples, feeds={"pixels": next(iter(samples.feeds.values()))})
    with pytest.raises(DataError, match=r"images\.npy: no view differs .* leave compensation\.views out"):
        with_views([model], ["scores"], pixels, 2, 1, 0, tmp_path)


def test_models_without_classes_are_refused_before_the_work(exported: Exported, images: Path, tmp_path: Path) -> None:
    path, ratios = exported(zoo.Case("hf-dinov2")), tmp_path / "r.yaml"
    ratios.write_text("version: 1\nffn: {fc2: 0.5}\ncompensation: {kind: local, views: 1}\n")
    words = ["prune", str(path), "--ratios", str(ratios), "-o", str(tmp_path / "o.onnx"), "--data", str(images)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert "calibrat" not in done.stderr
    assert "no output that holds classes" in done.stderr
    assert "leave compensation.views out" in done.stderr
    with pytest.raises(ConfigError, match=r"leave compensation\.views out"):
        refine_locally(look(path), {}, images, OPTIONS, LocalSettings(views=1))


def test_what_was_kept_of_the_dense_model_goes_once_it_was_used(vit: Study, images: Path, tmp_path: Path) -> None:
    recording, left = record(vit, images, tmp_path), dict[str, int]()

    def progress(note: str) -> None:
        left.setdefault(note, len(list((tmp_path / "kept").iterdir())))

    def refine(new: Any) -> Any:
        return refine_locally(vit, new, images, OPTIONS, LocalSettings(steps=0, views=1), progress, recording)

    prune(vit, parse_ratios(RATIOS), SyntheticStatistics(vit), refine=refine)
    assert left["refitting blocks/blocks.0"] > 0
    assert left["making views"] == 0


def test_operators_without_a_counterpart_are_told_before_the_work(
    exported: Exported, images: Path, tmp_path: Path
) -> None:
    """Noise is added to the pixels, by an operator that is not translated."""
    proto = onnx.load(exported(zoo.Case("timm-vit")))
    name = proto.graph.input[0].name
    for node in proto.graph.node:
        node.input[:] = ["noisy" if each == name else each for each in node.input]
    noise = onnx.helper.make_node("RandomNormalLike", [name], ["noise"], scale=0.01)
    proto.graph.node.insert(0, onnx.helper.make_node("Add", [name, "noise"], ["noisy"]))
    proto.graph.node.insert(0, noise)
    onnx.save(proto, tmp_path / "noisy.onnx")
    with pytest.raises(ModelError, match="RandomNormalLike"):
        refine_locally(look(tmp_path / "noisy.onnx"), {}, images, OPTIONS, LocalSettings(views=1))
    ratios = tmp_path / "r.yaml"
    ratios.write_text("version: 1\nffn: {fc2: 0.5}\ncompensation: {kind: local, views: 1}\n")
    words = ["prune", str(tmp_path / "noisy.onnx"), "--ratios", str(ratios), "-o", str(tmp_path / "o.onnx")]
    done = CliRunner().invoke(main, [*words, "--data", str(images)])
    assert done.exit_code == 1
    assert "RandomNormalLike" in done.stderr
    assert "calibrat" not in done.stderr


def test_room_for_views_is_asked_for_before_the_work(vit: Study, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def needed(_study: Study, _blocks: Any, samples: int) -> int:
        asked.append(samples)
        return 1 << 60

    monkeypatch.setattr(local, "refining_bytes", needed)
    with pytest.raises(ConfigError, match="free space"):
        refine_locally(vit, {}, images, OPTIONS, LocalSettings(views=3))
    assert asked == [COUNT * 5]  # the samples, and behind three views of each once more


def test_classes_that_no_gradient_reaches_are_told_before_the_work(
    exported: Exported, images: Path, tmp_path: Path
) -> None:
    """Pixels are rounded to whole numbers in front of the model: known operators, and nothing to follow."""
    proto = onnx.load(exported(zoo.Case("timm-vit")))
    name = proto.graph.input[0].name
    for node in proto.graph.node:
        node.input[:] = ["rounded" if each == name else each for each in node.input]
    cast = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    proto.graph.node.insert(0, onnx.helper.make_node("Cast", ["whole"], ["rounded"], to=cast[1]))
    proto.graph.node.insert(0, onnx.helper.make_node("Cast", [name], ["whole"], to=cast[0]))
    onnx.save(proto, tmp_path / "rounded.onnx")
    ratios = tmp_path / "r.yaml"
    ratios.write_text("version: 1\nffn: {fc2: 0.5}\ncompensation: {kind: local, views: 1}\n")
    words = ["prune", str(tmp_path / "rounded.onnx"), "--ratios", str(ratios), "-o", str(tmp_path / "o.onnx")]
    done = CliRunner().invoke(main, [*words, "--data", str(images)])
    assert done.exit_code == 1
    assert "do not depend on 'input' by a gradient" in done.stderr
    assert "calibrat" not in done.stderr


@pytest.mark.slow
def test_the_command(vit: Study, images: Path, tmp_path: Path) -> None:
    ratios, out = tmp_path / "r.yaml", tmp_path / "o.onnx"
    ratios.write_text("version: 1\nffn: {fc2: 0.5}\nalign: 1\ncompensation: {kind: local, steps: 3, views: 1}\n")
    words = ["prune", str(vit.view.model.path), "--ratios", str(ratios), "-o", str(out), "--data", str(images)]
    done = CliRunner().invoke(main, [*words, "--threads", "1"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(out.with_suffix(".json").read_text())
    results = [LocalResult(**each) for each in report["local"]]
    assert all(r.before is not None and r.after is not None and r.after <= r.before for r in results)
    assert report["twin"]["worst"] < 1e-4
    assert report["options"]["ratios"]["compensation"]["views"] == 1
