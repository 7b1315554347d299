"""A batch that an export holds inside, behind a symbolic axis: found, proven at that size, and fed by every tool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests import zoo
from tests.pruning import UNEVEN, look, prune_file, run
from tests.zoo.exporting import _export
from toast_onnx.engines.even_heads import even_heads
from toast_onnx.engines.ortbench import benchmark
from toast_onnx.errors import BackendError
from toast_onnx.model import load_model, save_model
from toast_onnx_calibration.evaluating import evaluate
from toast_onnx_calibration.magnitudes import largest_magnitudes
from toast_onnx_calibration.quantizing import QuantizeOptions, quantize, table_of_steps

EXPORTERS = ["torchscript-17", pytest.param("dynamo-20", marks=pytest.mark.slow)]
SIZE = (3, 64, 64)
X = np.random.default_rng(0).standard_normal((7, *SIZE)).astype(np.float32)


def _held(path: Path, batch: int, exporter: str = "torchscript-17") -> Path:
    """An export at one batch, whose input and output somebody declared symbolic afterwards."""
    subject = zoo.build("timm-vit")
    example = {name: torch.cat([tensor] * batch) for name, tensor in subject.inputs.items()}
    _export(zoo.Case("timm-vit", exporter, "static"), zoo.Subject(subject.module, example), subject.module, path)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


def _outputs(path: Path, batch: int) -> np.ndarray:
    """The samples, one batch after another, the last one filled up."""
    filled = np.concatenate([X, np.repeat(X[-1:], -len(X) % batch, axis=0)])
    name = onnx.load(path).graph.input[0].name
    parts = [run(path, {name: filled[i : i + batch]})[0] for i in range(0, len(filled), batch)]
    return np.concatenate(parts)[: len(X)]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_it_is_found_and_pruning_is_proven_at_it(batch: int, exporter: str, tmp_path: Path) -> None:
    path = _held(tmp_path / "model.onnx", batch, exporter)
    dense, pruned = prune_file(path, UNEVEN)
    (name,) = dense.counted_shapes
    assert dense.counted_shapes == {name: (batch, *SIZE)}
    assert not dense.dynamic_batch
    (note,) = dense.notes
    assert f"holds {batch} inside" in note or f"--shape {name}={batch}x3x64x64" in note
    assert pruned.twin is not None
    assert pruned.twin.batches == (batch,)
    given = look(path, **{name: (batch, *SIZE)})
    assert not given.notes
    assert (given.dynamic_batch, given.counted_shapes) == (False, dense.counted_shapes)


@pytest.mark.parametrize("batch", [2, 4])
def test_it_is_found_where_no_constant_names_it(batch: int, tmp_path: Path) -> None:
    """Windows of all images are parted one by one, three for each image."""
    sizes = onnx.numpy_helper.from_array(np.ones(3 * batch, np.int64), "sizes")
    parts = [f"part{n}" for n in range(3 * batch)]
    nodes = [
        onnx.helper.make_node("Concat", ["x", "x", "x"], ["windows"], axis=0),
        onnx.helper.make_node("Split", ["windows", "sizes"], parts, axis=0),
        onnx.helper.make_node("Concat", parts, ["y"], axis=0),
    ]
    values = [onnx.helper.make_tensor_value_info(n, 1, ["batch", 4]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "windows", values[:1], values[1:], [sizes])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    dense = look(path)
    assert (dense.dynamic_batch, dense.counted_shapes) == (False, {"x": (batch, 4)})


@pytest.mark.parametrize("batch", [2, 3])
def test_it_is_found_where_one_item_is_broadcast(batch: int, tmp_path: Path) -> None:
    """As behind positions that an exporter repeats for every image: one image comes out as many."""
    path = tmp_path / "model.onnx"
    noise = np.random.default_rng(1).standard_normal((batch, *SIZE)).astype(np.float32)
    free = onnx.load(zoo.export(zoo.Case("timm-vit")))
    (name,) = [value.name for value in free.graph.input]
    for node in free.graph.node:
        node.input[:] = ["noisy" if each == name else each for each in node.input]
    free.graph.node.insert(0, onnx.helper.make_node("Add", [name, "noise"], ["noisy"]))
    free.graph.initializer.append(onnx.numpy_helper.from_array(noise, "noise"))
    del free.graph.value_info[:]
    onnx.save(free, path)
    assert run(path, {name: X[:1]})[0].shape[0] == batch
    dense = look(path)
    assert (dense.dynamic_batch, dense.counted_shapes) == (False, {name: (batch, *SIZE)})
    assert f"--shape {name}={batch}x3x64x64" in dense.notes[0]
    labels = _outputs(path, batch).argmax(axis=1)
    np.savez(tmp_path / "data.npz", **{name: X, "labels": labels})
    found = evaluate(path, tmp_path / "data.npz")
    assert found.accuracy is not None
    assert (found.batch, found.accuracy.top1, found.accuracy.samples) == (batch, 7, 7)


def test_a_batch_that_is_free_stays_free() -> None:
    dense = look(zoo.export(zoo.Case("timm-vit")))
    assert dense.dynamic_batch
    assert not dense.notes


@pytest.mark.parametrize("batch", [1, 2])
def test_tools_that_study_nothing_feed_it(batch: int, tmp_path: Path) -> None:
    path = _held(tmp_path / "model.onnx", batch)
    scores = _outputs(path, batch)
    labels = scores.argmax(axis=1)
    labels[:2] = (labels[:2] + 1) % scores.shape[1]
    name = onnx.load(path).graph.input[0].name
    np.savez(tmp_path / "data.npz", **{name: X, "labels": labels})
    found = evaluate(path, tmp_path / "data.npz")
    assert found.batch == batch
    assert found.accuracy is not None
    assert (found.accuracy.top1, found.accuracy.samples) == (5, 7)
    np.save(tmp_path / "data.npy", X)
    largest = largest_magnitudes(path, tmp_path / "data.npy")
    assert largest[onnx.load(path).graph.output[0].name] == pytest.approx(float(np.abs(scores).max()), rel=1e-5)
    small = tmp_path / "small.onnx"
    assert quantize(path, tmp_path / "data.npy", small, QuantizeOptions(sensitivity=True)).samples == 7
    first, second = table_of_steps({"float": path, "int8": small}, tmp_path / "data.npy")
    assert first["agreement"] == 1
    assert second["agreement"] == (_outputs(small, batch).argmax(axis=1) == scores.argmax(axis=1)).mean()


def test_a_benchmark_at_another_batch_names_the_one_inside(tmp_path: Path) -> None:
    path = _held(tmp_path / "model.onnx", 3)
    with pytest.raises(BackendError, match="holds a batch of 3 inside: use --batch 3"):
        benchmark([path], [1], rounds=1, warmup=0)
    (timing,) = benchmark([path], [3], rounds=1, warmup=0)
    assert timing.batch == 3


def test_heads_are_padded_for_an_engine(tmp_path: Path) -> None:
    path = _held(tmp_path / "model.onnx", 2)
    small = tmp_path / "small.onnx"
    prune_file(path, UNEVEN, small)
    evened = even_heads(load_model(small))
    assert len(evened.padded) == 2
    save_model(evened.model, tmp_path / "even.onnx")
    assert np.allclose(_outputs(tmp_path / "even.onnx", 2), _outputs(small, 2), atol=1e-5)
