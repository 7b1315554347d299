"""Fisher information from drawn answers, against what algebra says of small models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.finetune.graphs import FLOAT
from toast_onnx.errors import DataError
from toast_onnx.finetune.fisher import Probe, fisher
from toast_onnx.model import Model, load_model

SAMPLES, TOKENS, CHANNELS, CLASSES = 6000, 3, 4, 5


def class_reader(folder: Path, read_out: np.ndarray, ending: str = "") -> Model:
    """x (batch, 3, 4) -> y = 2 x; the output is a linear read-out of y's token 0, through a softmax if asked for."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["y"]),
        helper.make_node("Gather", ["y", "zero"], ["token"], axis=1),
        helper.make_node("MatMul", ["token", "read_out"], ["scores"]),
    ]
    if ending:
        nodes.append(helper.make_node(ending, ["scores"], ["answer"], axis=-1))
    values = {"two": np.float32(2), "zero": np.int64(0), "read_out": read_out.astype(np.float32)}
    graph = helper.make_graph(
        nodes,
        "reader",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", TOKENS, CHANNELS])],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["batch", read_out.shape[1]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    path = folder / "reader.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return load_model(path)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("ending", ["", "Softmax"])
def test_drawn_classes_give_the_hessian_of_the_divergence(tmp_path: Path, ending: str) -> None:
    rng = np.random.default_rng(0)
    read_out, x = rng.normal(size=(CHANNELS, CLASSES)), rng.normal(size=(SAMPLES, TOKENS, CHANNELS)).astype(np.float32)
    model = class_reader(tmp_path, read_out, ending)
    output = model.proto.graph.output[0].name
    batches = [{"x": part} for part in np.split(x, 4)]
    sums, counts = fisher(model, [Probe("y", -1, 20.0), Probe("scores", 1)], [output], batches)
    scores = 2 * x[:, 0].astype(np.float64) @ read_out
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    hessian = (p[:, :, None] * np.eye(CLASSES) - p[:, :, None] * p[:, None, :]).sum(0)
    draws = counts["scores"] / SAMPLES
    assert counts["y"] == draws * SAMPLES * (20 + TOKENS - 1)
    assert relative(sums["scores"], draws * hessian) < 0.03  # thousands of draws
    assert relative(sums["y"], draws * 20 * read_out @ hessian @ read_out.T) < 0.03


def test_other_outputs_count_by_random_projections_relative_to_their_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    read_out, x = rng.normal(size=(CHANNELS, CLASSES)), rng.normal(size=(SAMPLES, TOKENS, CHANNELS)).astype(np.float32)
    sums, counts = fisher(class_reader(tmp_path, read_out), [Probe("y", 2)], [], [{"x": x}])
    scores = 2 * x[:, 0].astype(np.float64) @ read_out
    expected = counts["y"] / TOKENS * read_out @ read_out.T / np.square(scores).mean()
    assert relative(sums["y"], expected) < 0.05


def test_answers_without_gradients_are_refused(tmp_path: Path) -> None:
    model = class_reader(tmp_path, np.zeros((CHANNELS, CLASSES)))
    with pytest.raises(DataError, match="second-order"):
        fisher(model, [Probe("y", 2)], ["scores"], [{"x": np.ones((2, TOKENS, CHANNELS), np.float32)}])
