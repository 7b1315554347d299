"""Passes that continue one another: the same sums as one pass, every node run once, only its own weights in each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import zoo
from tests.pace import mostly_slow
from tests.pruning import look
from toast_onnx.matching.study import Study
from toast_onnx_calibration import calibrating as module
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.chain import Spool, chain
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics_graph import PARTS, TokenSettings, measuring_graph
from toast_onnx_calibration.store import open_statistics

Exported = Callable[[zoo.Case], Path]
CASES = [
    zoo.Case("timm-vit"),
    zoo.Case("timm-vit", "dynamo-20"),
    zoo.Case("hf-swin"),  # shift masks made of the image's size
    zoo.Case("torchvision-vit"),
    zoo.Case("hf-bert"),  # a mask that every block reads
    zoo.Case("hf-vitmae-pretraining"),  # two widths, the decoder reads what the encoder left out
    zoo.Case("hf-yolos"),
    zoo.Case("hf-beit"),  # a size is read by Resize, which asks for its length
]


def measured(study: Study, data: Path, out: Path, budget: int) -> dict[str, np.ndarray]:
    options = CalibrationOptions(batch=2, threads=1, budget=budget)
    calibrate(study, data, out, everything(study, PARTS), options)
    file = open_statistics(out)
    return {name: file.array(name) for name in file.names()}


@pytest.mark.parametrize(
    "case",
    mostly_slow(CASES, lambda c: c.family in ("timm-vit", "hf-bert", "hf-vitmae-pretraining"), lambda c: c.id),
)
def test_many_passes_give_what_one_gives(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    path = exported(case)
    study = look(path)
    np.savez(tmp_path / "x.npz", **zoo.inputs(path, 3))  # the last batch is not full
    one = measured(study, tmp_path / "x.npz", tmp_path / "one.npz", 10**12)
    many = measured(study, tmp_path / "x.npz", tmp_path / "many.npz", 1)
    assert list(one) == list(many)
    for name, expected in one.items():
        scale = max(float(np.abs(expected).max()), 1e-12)
        assert np.abs(many[name] - expected).max() / scale < 1e-5, name


def test_every_node_runs_once_and_every_weight_is_loaded_once(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(zoo.Case("timm-vit"))
    study = look(path)
    np.savez(tmp_path / "x.npz", **zoo.inputs(path, 2))
    run: list[onnx.GraphProto] = []

    def watch(model: object, *arguments: object, **options: object) -> object:
        graph = onnx.GraphProto()
        graph.CopyFrom(model.proto.graph)  # type: ignore[attr-defined]
        run.append(graph)
        return original(model, *arguments, **options)

    original = module.model_session
    monkeypatch.setattr(module, "model_session", watch)
    measured(study, tmp_path / "x.npz", tmp_path / "many.npz", 1)
    assert len(run) == len(study.match.blocks)
    varying = {i.name for i in study.view.model.proto.graph.input}
    for node in study.view.nodes:
        if any(name in varying for name in node.input):
            varying.update(node.output)
    made = [name for graph in run for node in graph.node for name in node.output if name in varying]
    assert len(made) == len(set(made))
    large = [t.name for graph in run for t in graph.initializer if np.prod(t.dims) > 10_000]
    assert large
    assert len(large) == len(set(large))


def test_a_vit_is_cut_at_the_residual_stream(exported: Exported) -> None:
    study = look(exported(zoo.Case("timm-vit")))
    watched = [measuring_graph(study, {block.index: PARTS}, TokenSettings()).watched for block in study.match.blocks]
    links = chain(study, watched)
    assert links[0].takes == ()
    assert links[-1].leaves == ()
    for before, after in itertools.pairwise(links):
        assert before.leaves == after.takes
        activations = [name for name in after.takes if len(study.facts.shape(name) or ()) > 1]
        assert len(activations) == 1
        (shape,) = [study.facts.shape(name) for name in activations]
        assert shape is not None
        assert shape[-1] == study.match.blocks[0].ffn.in_features  # type: ignore[union-attr]


def test_activations_are_kept_until_no_pass_reads_them(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    arrays = {"a/b:0": np.arange(3), "c": np.ones((2, 2), np.float16)}
    spool.keep(0, arrays)
    spool.keep(10, arrays)
    found = spool.read(10, ["c", "a/b:0"])
    assert {name: array.dtype for name, array in found.items()} == {n: a.dtype for n, a in arrays.items()}
    np.testing.assert_array_equal(found["a/b:0"], arrays["a/b:0"])
    spool.forget(10, ["c"])
    assert len(list(tmp_path.iterdir())) == 3
    np.testing.assert_array_equal(spool.read(0, ["a/b:0"])["a/b:0"], arrays["a/b:0"])


def test_files_last_until_they_are_read(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(zoo.Case("hf-swin"))
    study = look(path)
    np.savez(tmp_path / "x.npz", **zoo.inputs(path, 2))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    wanted = everything(study, PARTS)
    watched = [measuring_graph(study, {b: parts}, TokenSettings()).watched for b, parts in wanted.items()]
    files: list[int] = []
    options = CalibrationOptions(batch=2, threads=1, budget=1)
    calibrate(
        study,
        tmp_path / "x.npz",
        tmp_path / "s.npz",
        wanted,
        options,
        lambda *_: files.append(len([*work.rglob("*.npy")])),
    )
    assert len(watched) > 3
    assert files[-1] == 0
    assert max(files) == max(len(link.leaves) for link in chain(study, watched))  # of one batch
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("version", [3, 8])
def test_weights_that_are_inputs_too_are_not_asked_for(version: int, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    model = onnx.load(path)
    model.ir_version = version
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    onnx.save(model, tmp_path / "old.onnx")
    np.savez(tmp_path / "x.npz", **zoo.inputs(path, 2))
    expected = measured(look(path), tmp_path / "x.npz", tmp_path / "a.npz", 10**12)
    for budget in (1, 10**12):
        found = measured(look(tmp_path / "old.onnx"), tmp_path / "x.npz", tmp_path / "b.npz", budget)
        for name, value in expected.items():
            assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name
