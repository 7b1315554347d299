"""Tiny models and images for the data side: a classifier that names the brightest colour channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}


def colour_model(
    path: Path,
    batch: int | str = "batch",
    size: int | str = 8,
    *,
    dtype: int = TensorProto.FLOAT,
    classes: int = 3,
    with_map: bool = False,
) -> Path:
    """Writes a model pixels (batch, 3, size, size) -> scores (batch, classes); class 0, 1, 2 = red, green, blue.

    Classes from 3 on always score lowest. `with_map` puts a 4-D output `map` before the scores.
    """
    weight = np.zeros((3, classes), helper.tensor_dtype_to_np_dtype(dtype))
    weight[:, :3] = np.eye(3)
    bias = np.array([0.0] * 3 + [-1e4 - i for i in range(classes - 3)], weight.dtype)
    nodes = [
        helper.make_node("ReduceMean", ["pixels"], ["pooled"], axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["pooled", "weight", "bias"], ["scores"]),
    ]
    outputs = [helper.make_tensor_value_info("scores", dtype, [batch, classes])]
    if with_map:
        nodes.append(helper.make_node("Neg", ["pixels"], ["map"]))
        outputs.insert(0, helper.make_tensor_value_info("map", dtype, [batch, 3, size, size]))
    graph = helper.make_graph(
        nodes,
        "colour",
        [helper.make_tensor_value_info("pixels", dtype, [batch, 3, size, size])],
        outputs,
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    return _save(graph, path)


def two_input_model(path: Path) -> Path:
    """Writes a model (ids int64 (batch, 4), mask float (batch, 4)) -> scores (batch, 4), their product."""
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 4]),
        helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 4]),
    ]
    nodes = [
        helper.make_node("Cast", ["ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "mask"], ["scores"]),
    ]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 4])]
    return _save(helper.make_graph(nodes, "two", inputs, outputs), path)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A colour image with structure at several scales, so that every filter and offset shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    fine = rng.integers(-40, 41, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + fine, 0, 255).astype(np.uint8))


def colour_folder(root: Path, each: int = 4, size: int = 12) -> Path:
    """Writes root/<colour>/<n>.png, `each` of the three colours."""
    for name, value in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (size + i, size), value).save(root / name / f"{i}.png")
    return root


def _save(graph: onnx.GraphProto, path: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
