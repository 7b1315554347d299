"""Small graphs for tests of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime as ort

from toast_onnx.model import Model

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def graph_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[Any]]],
    outputs: Sequence[str],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 18,
) -> Model:
    """A model of these nodes; inputs are name -> (element type, shape)."""
    graph = onnx.helper.make_graph(
        list(nodes),
        "test",
        [onnx.helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()],
        [onnx.ValueInfoProto(name=n) for n in outputs],  # runtimes find their types
        [onnx.numpy_helper.from_array(v, n) for n, v in (constants or {}).items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    return Model(proto, Path("test.onnx"))


def run_onnx(model: Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def residual_mlp(width: int = 8, classes: int = 4, depth: int = 2, seed: int = 0) -> Model:
    """x -> x + relu(x W1 + b1) W2 + b2, `depth` times, then a linear layer: (batch, width) -> (batch, classes)."""
    rng = np.random.default_rng(seed)
    constants: dict[str, np.ndarray] = {}
    nodes, x = [], "x"
    for k in range(depth):
        for name, shape in (("w1", (width, width)), ("b1", (width,)), ("w2", (width, width)), ("b2", (width,))):
            constants[f"blocks.{k}.{name}"] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
        nodes += [
            onnx.helper.make_node("Gemm", [x, f"blocks.{k}.w1", f"blocks.{k}.b1"], [f"h{k}"]),
            onnx.helper.make_node("Relu", [f"h{k}"], [f"a{k}"]),
            onnx.helper.make_node("Gemm", [f"a{k}", f"blocks.{k}.w2", f"blocks.{k}.b2"], [f"y{k}"]),
            onnx.helper.make_node("Add", [x, f"y{k}"], [f"r{k}"]),
        ]
        x = f"r{k}"
    constants["head"] = rng.standard_normal((width, classes)).astype(np.float32)
    nodes.append(onnx.helper.make_node("MatMul", [x, "head"], ["logits"]))
    model = graph_model(nodes, {"x": (FLOAT, ["batch", width])}, ["logits"], constants)
    logits = onnx.helper.make_tensor_value_info("logits", FLOAT, ["batch", classes])
    model.proto.graph.output[0].CopyFrom(logits)
    return model
