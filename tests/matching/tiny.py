"""A transformer block written by hand, small enough to bend at any place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

TOKENS, WIDTH, HEADS, DIM, HIDDEN = 5, 8, 2, 4, 16


class Graph:
    """A graph under construction; every method adds nodes and returns the name of what they make."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.outputs: list[tuple[str, list[int | str]]] = []
        self._random = np.random.default_rng(0)

    def add(
        self, op: str, *inputs: str, name: str = "", outputs: int = 1, domain: str = "", **attributes: object
    ) -> str:
        """Add a node; returns its (first) output, the others end in _1, _2, ..."""
        name = name or f"{op}_{len(self.nodes)}"
        made = [f"{name}.out", *(f"{name}.out_{k}" for k in range(1, outputs))]
        self.nodes.append(onnx.helper.make_node(op, inputs, made, name=name, domain=domain, **attributes))
        return made[0]

    def constant(self, value: object, dtype: type = np.int64) -> str:
        """Add an initializer."""
        name = f"constant_{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype)
        return name

    def random(self, *shape: int) -> str:
        """Add an initializer of random values."""
        return self.constant(self._random.standard_normal(shape), np.float32)

    def linear(self, x: str, fan_in: int, fan_out: int, name: str) -> str:
        """MatMul and Add with new random weights."""
        product = self.add("MatMul", x, self.random(fan_in, fan_out), name=f"{name}/MatMul")
        return self.add("Add", product, self.random(fan_out), name=f"{name}/Add")

    def norm(self, x: str, width: int = WIDTH) -> str:
        """LayerNormalization over the last axis."""
        return self.add("LayerNormalization", x, self.random(width), self.random(width), axis=-1)

    def heads(self, x: str, dim: int = DIM) -> str:
        """(batch, tokens, heads x dim) to (batch, heads, tokens, dim)."""
        split = self.add("Reshape", x, self.constant([0, 0, HEADS, dim]))
        return self.add("Transpose", split, perm=[0, 2, 1, 3])

    def also_output(self, name: str, *shape: int | str) -> str:
        """Make a tensor an output of the graph, too."""
        self.outputs.append((name, list(shape)))
        return name

    def save(self, path: Path, y: str) -> Path:
        """Write the model from x (batch, tokens, width) to y."""
        info = onnx.helper.make_tensor_value_info
        wanted = [*self.outputs, (y, ["batch", TOKENS, WIDTH])]
        graph = onnx.helper.make_graph(
            self.nodes,
            "tiny",
            [info("x", onnx.TensorProto.FLOAT, ["batch", TOKENS, WIDTH])],
            [info(name, onnx.TensorProto.FLOAT, shape) for name, shape in wanted],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        opsets = [onnx.helper.make_opsetid("", 17)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
        return path


#: Takes the graph and a tensor's name, adds what it likes, returns the name to go on with.
Bend = Callable[[Graph, str], str]


def straight(_graph: Graph, name: str) -> str:
    """Changes nothing."""
    return name


def product(graph: Graph, probabilities: str, values: str) -> str:
    """The weighted sum of the values."""
    return graph.add("MatMul", probabilities, values, name="sum")


def block(
    *,
    q: Bend = straight,
    k: Bend = straight,
    v: Bend = straight,
    scores: Bend = straight,
    weigh: Callable[[Graph, str, str], str] = product,
    context: Bend = straight,
    branch: Bend = straight,
    hidden: Bend = straight,
    activated: Bend = straight,
    ffn: Bend = straight,
    end: Bend = straight,
    axis: int = -1,
    activation: str = "Relu",
    residual: bool = True,
) -> tuple[Graph, str]:
    """One pre-norm block with separate Q, K and V layers and a network, of ReLU by default.

    Args:
        q: bends the queries (batch, heads, tokens, dim), and so k and v.
        scores: bends the scaled scores (batch, heads, tokens, tokens).
        weigh: makes the context (batch, heads, tokens, dim) of probabilities and values.
        context: bends the merged context (batch, tokens, width) in front of the output projection.
        branch: bends the projection's output.
        hidden: bends fc1's output, before the activation; activated: after it.
        ffn: bends fc2's output, before it joins the stream.
        end: bends the block's output.
        axis: the softmax's axis.
        activation: operator between fc1 and fc2.
        residual: whether the network's output is added to the stream.

    Returns:
        The graph and the name of its output.
    """
    g = Graph()
    y = g.norm("x")
    operands = [bend(g, g.heads(g.linear(y, WIDTH, WIDTH, n))) for n, bend in (("q", q), ("k", k), ("v", v))]
    keys = g.add("Transpose", operands[1], perm=[0, 1, 3, 2])
    product = g.add("MatMul", operands[0], keys, name="scores")
    scaled = scores(g, g.add("Mul", product, g.constant(0.5, np.float32)))
    probabilities = g.add("Softmax", scaled, name="softmax", axis=axis)
    mixed = g.add("Transpose", weigh(g, probabilities, operands[2]), perm=[0, 2, 1, 3])
    merged = context(g, g.add("Reshape", mixed, g.constant([0, 0, WIDTH])))
    stream = g.add("Add", "x", branch(g, g.linear(merged, WIDTH, WIDTH, "proj")))
    inner = hidden(g, g.linear(g.norm(stream), WIDTH, HIDDEN, "fc1"))
    out = ffn(g, g.linear(activated(g, g.add(activation, inner)), HIDDEN, WIDTH, "fc2"))
    return g, end(g, g.add("Add", stream, out) if residual else out)
