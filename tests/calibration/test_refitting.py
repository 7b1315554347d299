"""The last layer's second fit: what the values behind a block become, and when they are not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from tests import zoo
from tests.pruning import look
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ConfigError, ModelError
from toast_onnx.finetune.local import LocalSettings
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.piece import cut_piece
from toast_onnx.matching.span import block_span, span_of
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import Pruned, prune
from toast_onnx.runtime import run_model
from toast_onnx.solving.refit import Lack
from toast_onnx_calibration import local, refitting, room
from toast_onnx_calibration.beside import Beside
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.local import refine_locally
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.recorded import Recording
from toast_onnx_calibration.stored import store_samples
from toast_onnx_calibration.streams import Stream
from toast_onnx_cli.main import main

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


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How many blocks were run once more behind their refit."""
    moved: list[str] = []
    true = Stream.move

    def move(stream: Stream, to: str, *given: Any) -> Any:
        if stream.name == "twin" and stream.tensor == to:
            moved.append(to)
        return true(stream, to, *given)

    monkeypatch.setattr(Stream, "move", move)
    return moved


@pytest.mark.parametrize("family", ["timm-vit", "hf-dinov2"])
def test_values_behind_a_block_are_those_of_another_run(
    family: str, exported: Exported, tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a layer scale (DINOv2) and without, moving them along gives later blocks what running them again does."""
    dense = look(exported(zoo.Case(family)))
    (shape,) = dense.counted_shapes.values()
    data = drawn(tmp_path, shape[1:], 24)
    moved = refitted(dense, data)
    assert not runs
    monkeypatch.setattr(refitting, "EXACT", 0.0)
    again = refitted(dense, data)
    assert len(runs) == len(again.local)
    assert_same(moved, again)


@pytest.mark.parametrize("after", ["fp16", "constants"])
def test_other_spellings_of_the_weights_are_refitted_as_well(after: str, exported: Exported, images: Path) -> None:
    """Their twin has nodes that the dense graph lacks; a block runs between tensors that both have."""
    plain = refitted(look(exported(zoo.Case("timm-vit"))), images)
    found = refitted(look(exported(zoo.Case("timm-vit", after=after))), images)
    assert [r.kept for r in found.local] == [r.kept for r in plain.local] == ["refit", "refit"]
    for a, b in zip(found.local, plain.local, strict=True):
        assert a.note is None
        assert a.after == pytest.approx(b.after, rel=0.02)
    assert found.twin is not None
    assert found.twin.worst < 1e-2


def test_rows_that_need_too_much_of_the_disk_are_not_kept(
    vit: Study, images: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = refitted(vit, images)
    monkeypatch.setattr(room, "SPARE", 1000)
    again = refitted(vit, images)
    assert len(runs) == len(again.local)
    assert_same(moved, again)


def test_a_norm_behind_the_layer_is_run_again(exported: Exported, tmp_path: Path, runs: list[str]) -> None:
    dense = look(exported(zoo.Case("timm-swinv2")))
    (shape,) = dense.counted_shapes.values()
    found = refitted(dense, drawn(tmp_path, shape[1:], 24))
    assert len(runs) == sum(r.kept != "closed form" for r in found.local) > 0
    assert all(r.after is not None and r.before is not None and r.after <= r.before for r in found.local)


@pytest.mark.parametrize("trained", [False, True])
def test_the_error_told_is_that_of_the_pruned_model(
    trained: bool, vit: Study, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last block, on the batch that judged, also where training changed the block before."""

    def train(piece: Model, masks: Any, *given: Any) -> tuple[dict[str, np.ndarray], float]:
        if len(trainings) == 1:
            return {}, 1.0
        trainings.append("first")
        values = {t.name: onnx.numpy_helper.to_array(t) for t in piece.proto.graph.initializer}
        return {name: values[name] + np.float32(0.01) * mask for name, mask in masks.items()}, 0.0

    trainings: list[str] = []
    monkeypatch.setattr(local, "train_block", train)
    pruned = refitted(vit, images, replace(REFIT, steps=int(trained)))
    assert len(trainings) == int(trained)
    save_model(pruned.model, tmp_path / "pruned.onnx")
    span = span_of(vit.view, vit.facts, vit.match.blocks[-1])
    assert span is not None
    judged = np.load(images)[18:24]  # four batches of six fill 24 of the 27, the last of them judges
    want, got = (stream(p, span.end, judged, tmp_path) for p in (vit.view.model.path, tmp_path / "pruned.onnx"))
    weights = np.ones((1, want.shape[1], 1))
    weights[:, 0] = 20
    expected = float((weights * (got - want) ** 2).sum() / (weights * want**2).sum())
    assert pruned.local[-1].after == pytest.approx(expected, rel=1e-3)


def stream(model: Path, tensor: str, batch: np.ndarray, folder: Path) -> np.ndarray:
    """A tensor inside a model, in float64."""
    copy = folder / "copy.onnx"
    copy.write_bytes(model.read_bytes())
    return run_model(copy, [tensor], [{"input": batch}], threads=1)[0][tensor].astype(np.float64)


def test_a_fit_that_is_worse_is_taken_back(vit: Study, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def harmful(fitted: Lack, judged: Lack) -> tuple[np.ndarray, np.ndarray, float]:
        return np.full(fitted.cross.shape, 0.3), np.full(len(fitted.total), 0.3), 1.0

    monkeypatch.setattr(refitting, "refit", harmful)
    found = refitted(vit, images)
    assert [r.kept for r in found.local] == ["closed form"] * 2
    start = prune(vit, parse_ratios(RATIOS), SyntheticStatistics(vit))
    for a, b in zip(arrays(found), arrays(start), strict=True):
        np.testing.assert_array_equal(a, b)


def test_channels_far_from_zero_keep_what_they_have_in_common(
    vit: Study, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are in single precision: rows are taken around a mean, whatever is added to all of them."""
    far: list[Lack] = []
    true = Lack.of

    def of(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Lack:
        far.append(true(x, y, weights))
        return far[-1]

    monkeypatch.setattr(refitting.Lack, "of", of)
    true_outputs = Stream.outputs

    def outputs(*given: Any, **more: Any) -> Iterator[tuple[np.ndarray, ...]]:
        for output, *inside in true_outputs(*given, **more):
            yield output, *(x + np.float32(1000) for x in inside)

    monkeypatch.setattr(Stream, "outputs", outputs)
    refitted(vit, images)
    assert max(float(np.abs(each.inputs.mean).max()) for each in far) < 100


def test_a_piece_that_is_cut_after_a_change_has_the_new_weights(vit: Study, images: Path, tmp_path: Path) -> None:
    """Biases are small enough to be remembered as values of the graph's own arithmetic."""
    samples = store_samples(vit, images, OPTIONS, tmp_path, lambda _: 8)
    twin = GraphView(Model(vit.view.model.proto, vit.view.model.path, {}))
    beside = Beside(vit, samples, OPTIONS, tmp_path)
    stream = Stream("twin", twin, Facts(twin, samples.shapes), samples, OPTIONS, tmp_path, beside)
    block = vit.match.blocks[0]
    assert block.ffn is not None
    name = block.ffn.fc2.bias
    assert name is not None
    span = block_span(twin, stream.facts, block)
    stream.view.model.arrays[name] = vit.facts.array(name)
    stream.change(cut_piece(twin, stream.facts, span.start, span.end), {name: vit.facts.array(name) + 1})
    piece = cut_piece(twin, stream.facts, span.start, span.end)
    (found,) = (onnx.numpy_helper.to_array(t) for t in piece.graph.initializer if t.name == name)
    np.testing.assert_array_equal(found, vit.facts.array(name) + 1)


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


def record(dense: Study, data: Path | str, folder: Path, **options: Any) -> Recording:
    kept = folder / "kept"
    kept.mkdir()
    recording = Recording(dense, range(len(dense.match.blocks)), kept)
    calibrate(dense, data, folder / "s.npz", everything(dense), replace(OPTIONS, **options), recording=recording)
    return recording


def kept(recording: Recording, dense: Study, data: Path | str, folder: Path, batch: int, **options: Any) -> Any:
    folder = folder / f"samples-{batch}"
    folder.mkdir()
    samples = store_samples(dense, data, replace(OPTIONS, **options), folder, lambda _: batch)
    return recording.of(samples.rows, samples.size, samples.source.fingerprint)


def ends(dense: Study) -> list[str]:
    spans = [span_of(dense.view, dense.facts, block) for block in dense.match.blocks]
    return [span.end for span in spans if span is not None]


def test_kept_outputs_are_those_of_the_model(vit: Study, images: Path, tmp_path: Path) -> None:
    """27 samples: calibration ran them by eight, the last batch not full; they are taken by four, three are left."""
    recording = record(vit, images, tmp_path)
    found = kept(recording, vit, images, tmp_path, 4)
    assert list(found) == ends(vit)
    for name, array in found.items():
        assert array.shape[:2] == (6, 4)
        expected = stream(vit.view.model.path, name, np.load(images)[:24], tmp_path)
        np.testing.assert_allclose(array.reshape(24, *array.shape[2:]), expected, atol=1e-5)
    recording.forget()
    assert list((tmp_path / "kept").iterdir()) == []


def test_the_dense_model_is_not_run_for_what_was_kept(
    vit: Study, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    true = Stream.stand

    def stand(stream: Stream, tensor: str, values: np.ndarray) -> np.ndarray:
        if stream.name == "dense" and (stream.folder / "dense.npy").exists():
            ran.append(tensor)
        return true(stream, tensor, values)

    monkeypatch.setattr(Stream, "stand", stand)
    recording = record(vit, images, tmp_path)
    from_kept = refitted(vit, images, recording=recording)
    assert ran == []
    assert recording.tensors == ()  # and the files are gone
    assert_same(from_kept, refitted(vit, images))
    assert len(ran) == 2


def test_outputs_for_other_samples_are_of_no_use(vit: Study, images: Path, tmp_path: Path) -> None:
    recording = record(vit, images, tmp_path, samples=16, seed=1)
    assert kept(recording, vit, images, tmp_path, 4) == {}
    assert kept(recording, vit, images, tmp_path, 8, samples=16, seed=1)
    assert kept(Recording(vit, [0], tmp_path), vit, images, tmp_path, 2) == {}


def test_a_function_that_gives_other_samples_the_next_time(
    vit: Study, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names are numbers, the same every time."""
    module = tmp_path / "sampled.py"
    module.write_text(
        "import numpy as np\n"
        f"images = np.load({str(images)!r})\n"
        "times = 0\n"
        "def same():\n    yield from images[:16, None]\n"
        "def other():\n    global times\n    times += 1\n    yield from np.roll(images[:16, None], times, axis=0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, wanted in (("same", True), ("other", False)):
        folder = tmp_path / name
        folder.mkdir()
        recording = record(vit, f"sampled:{name}", folder, samples=16)
        assert bool(kept(recording, vit, f"sampled:{name}", folder, 4, samples=16)) == wanted


@pytest.mark.parametrize("options", [{"budget": 1}, {"shard": (1, 2)}, {"views": 1}], ids=["passes", "shard", "views"])
def test_what_is_not_the_dense_model_on_the_samples_keeps_nothing(
    options: dict[str, Any], vit: Study, images: Path, tmp_path: Path
) -> None:
    recording = record(vit, images, tmp_path, **options)
    assert recording.tensors == ()
    assert kept(recording, vit, images, tmp_path, 4) == {}


def test_behind_new_weights_nothing_is_kept(vit: Study, images: Path, tmp_path: Path) -> None:
    new = prune(vit, parse_ratios(RATIOS), SyntheticStatistics(vit)).weights
    recording = Recording(vit, [0, 1], tmp_path)
    calibrate(vit, images, tmp_path / "s.npz", everything(vit), OPTIONS, behind={0: new[0]}, recording=recording)
    assert kept(recording, vit, images, tmp_path, 4) == {}


def batch_of(vit: Study, samples: int, dtype: Any = np.float32, tokens: int = 17) -> dict[str, np.ndarray]:
    return {name: np.zeros((samples, tokens, 8), dtype) for name in ends(vit)}


def test_no_more_is_kept_than_is_spare(vit: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size that the first samples have, not the one that the model was looked at."""
    monkeypatch.setattr(room, "SPARE", 2 * 27 * 17 * 8 * 4)
    recording = Recording(vit, [0, 1], tmp_path)
    for count, tensors in ((27, 2), (28, 0), (None, 0)):
        recording.begin(count)
        recording.add(("a", "b"), batch_of(vit, 2))
        assert len(recording.tensors) == tensors
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Mock(free=4 * 2 * 27 * 17 * 8 * 4 - 1))
    recording.begin(27)
    recording.add(("a", "b"), batch_of(vit, 2))
    assert recording.tensors == ()


@pytest.mark.parametrize("odd", [{"tokens": 18}, {"dtype": np.float16}, {"samples": 3}], ids=str)
def test_samples_of_other_sizes_end_it(odd: dict[str, Any], vit: Study, tmp_path: Path) -> None:
    recording = Recording(vit, [0, 1], tmp_path)
    recording.begin(8)
    recording.add(("a", "b"), batch_of(vit, 2))
    assert list(tmp_path.glob("*.npy"))
    recording.add(("c", "d"), batch_of(vit, **{"samples": 2} | odd))
    recording.end("print")
    assert recording.of(("a", "b"), 2, "print") == {}
    assert list(tmp_path.glob("*.npy")) == []


def test_only_outputs_with_the_batch_in_front_are_kept(vit: Study, tmp_path: Path) -> None:
    assert Recording(vit, [1], tmp_path).begin(4) == (ends(vit)[1],)
    assert Recording(replace(vit, other=vit.facts), [0, 1], tmp_path).begin(4) == ()  # as long whatever the batch
    assert Recording(replace(vit, dynamic_batch=False), [0, 1], tmp_path).begin(4) == ()


def test_the_command_hands_them_over(vit: Study, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    true = Recording.of
    monkeypatch.setattr(Recording, "of", lambda *given: found.append(len(true(*given))) or true(*given))
    ratios = tmp_path / "ratios.yaml"
    ratios.write_text("version: 1\nffn: {fc2: 0.5}\nalign: 1\n")
    words = ["prune", str(vit.view.model.path), "--ratios", str(ratios), "-o", str(tmp_path / "out.onnx")]
    done = CliRunner().invoke(main, [*words, "--data", str(images), "--threads", "1"])
    assert done.exit_code == 0, done.stderr
    assert found == [2]


def test_room_is_asked_for_before_the_work(vit: Study, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Mock(free=10_000))
    with pytest.raises(ConfigError, match="free space"):
        refitted(vit, images)
