"""Hand-made encoders for negative cases: a class token in front of 16 tokens, and whatever a test puts behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model

TOKENS, WIDTH, HEADS = 17, 16, 2


class Encoder:
    """A graph that grows node by node; `x` is (batch, 16, 8)."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        """A node; returns its output."""
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def constant(self, value: object, dtype: type = np.int64) -> str:
        """An initializer."""
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def noise(self, *shape: int, scale: float = 1.0) -> str:
        """An initializer of seeded numbers."""
        return self.constant(self.random.standard_normal(shape) * scale, np.float32)

    def linear(self, x: str, fan_in: int, fan_out: int, bias: float = 0.0) -> str:
        """x W + b."""
        product = self.add("MatMul", x, self.noise(fan_in, fan_out, scale=fan_in**-0.5))
        return self.add("Add", product, self.constant(self.random.standard_normal(fan_out) + bias, np.float32))

    def norm(self, x: str) -> str:
        """LayerNormalization."""
        ones, zeros = np.ones(WIDTH), np.zeros(WIDTH)
        return self.add("LayerNormalization", x, self.constant(ones, np.float32), self.constant(zeros, np.float32))

    def sequence(self, x: str = "x", *, expanded: bool = False) -> str:
        """Class token, patches and positions; `expanded` repeats the table of positions for the batch."""
        batch = self.add("Slice", self.add("Shape", "x"), self.constant([0]), self.constant([1]))
        one = self.add("Concat", batch, self.constant([1, WIDTH]), axis=0)
        token = self.add("Expand", self.noise(1, 1, WIDTH), one)
        tokens = self.add("Concat", token, self.linear(x, 8, WIDTH), axis=1)
        table = self.noise(1, TOKENS, WIDTH)
        if expanded:
            table = self.add("Expand", table, self.add("Concat", batch, self.constant([TOKENS, WIDTH]), axis=0))
        return self.add("Add", tokens, table)

    def heads(self, x: str, bias: float = 0.0) -> str:
        """(batch, tokens, channels) to (batch, heads, tokens, dimensions) behind a layer."""
        split = self.constant([0, TOKENS, HEADS, WIDTH // HEADS])
        return self.add("Transpose", self.add("Reshape", self.linear(x, WIDTH, WIDTH, bias), split), perm=[0, 2, 1, 3])

    def block(self, x: str, key_bias: float = 0.0) -> str:
        """One pre-norm block."""
        normed = self.norm(x)
        q, k, v = self.heads(normed), self.heads(normed, key_bias), self.heads(normed)
        scores = self.add("MatMul", q, self.add("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.add("Mul", scores, self.constant((WIDTH // HEADS) ** -0.5, np.float32))
        context = self.add("MatMul", self.add("Softmax", scores, axis=-1), v)
        flat = self.constant([0, TOKENS, WIDTH])
        context = self.add("Reshape", self.add("Transpose", context, perm=[0, 2, 1, 3]), flat)
        x = self.add("Add", x, self.linear(context, WIDTH, WIDTH))
        hidden = self.add("Relu", self.linear(self.norm(x), WIDTH, 4 * WIDTH))
        return self.add("Add", x, self.linear(hidden, 4 * WIDTH, WIDTH))

    def mean(self, x: str) -> str:
        """Mean over the tokens."""
        return self.add("ReduceMean", x, axes=[1], keepdims=0)

    def study(self, output: str, folder: Path) -> Study:
        """The study of the graph with that output."""
        graph = helper.make_graph(
            self.nodes,
            "encoder",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16, 8])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.weights,
        )
        model = onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        )
        onnx.save(model, folder / "encoder.onnx")
        return study(load_model(folder / "encoder.onnx"))
