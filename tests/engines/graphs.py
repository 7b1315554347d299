"""Small graphs for the engine tests, each with the numpy float64 function it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper
from scipy.special import erf, softmax

WIDTH = 32


def save(proto: onnx.ModelProto, path: Path) -> Path:
    """Write a model and return where."""
    onnx.save(proto, path)
    return path


def model(
    nodes: str, weights: dict[str, np.ndarray], *, opset: int = 17, x: str = "float[batch, 4, 32]"
) -> onnx.ModelProto:
    """A model from ONNX's text form of its nodes: input `x`, output `y` of the same shape."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({x} x) => ({x} y) {{ {nodes} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return proto


def mlp(hidden: int = 64, seed: int = 0) -> onnx.ModelProto:
    """LayerNorm, linear, exact GELU, linear, Softmax: x (batch, 4, 32) to y (batch, 4, 32)."""
    rng = np.random.default_rng(seed)
    weights = {
        "gain": rng.normal(1, 0.1, WIDTH),
        "bias": rng.normal(0, 0.1, WIDTH),
        "w1": rng.normal(0, WIDTH**-0.5, (WIDTH, hidden)),
        "b1": rng.normal(0, 0.1, hidden),
        "w2": rng.normal(0, hidden**-0.5, (hidden, WIDTH)),
        "half": np.array(0.5),
        "one": np.array(1.0),
        "root2": np.array(2**0.5),
    }
    nodes = """
        n = LayerNormalization <axis = -1, epsilon = 1e-5> (x, gain, bias)
        a = MatMul (n, w1)
        h = Add (a, b1)
        s = Div (h, root2)
        e = Erf (s)
        p = Add (e, one)
        q = Mul (h, p)
        g = Mul (q, half)
        z = MatMul (g, w2)
        y = Softmax <axis = -1> (z)
    """
    return model(nodes, {name: value.astype(np.float32) for name, value in weights.items()})


def mlp_reference(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """What `mlp` computes, in float64."""
    w = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}
    x = x.astype(np.float64)
    n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w["gain"] + w["bias"]
    h = n @ w["w1"] + w["b1"]
    return softmax(h * 0.5 * (1 + erf(h / 2**0.5)) @ w["w2"], axis=-1)


def spelled_out_layer_norm(epsilon: float = 1e-5) -> onnx.ModelProto:
    """LayerNorm node by node, as opset 14 exports write it, then a linear: x (batch, 4, 32) to y (batch, 4, 32)."""
    weights = {"gain": np.linspace(0.5, 1.5, WIDTH, dtype=np.float32), "w": np.eye(WIDTH, dtype=np.float32)}
    nodes = f"""
        two = Constant <value = float {{2.0}}> ()
        eps = Constant <value = float {{{epsilon!r}}}> ()
        m = ReduceMean <axes = [-1]> (x)
        d = Sub (x, m)
        sq = Pow (d, two)
        v = ReduceMean <axes = [-1]> (sq)
        ve = Add (v, eps)
        s = Sqrt (ve)
        n = Div (d, s)
        g = Mul (n, gain)
        y = MatMul (g, w)
    """
    return model(nodes, weights, opset=14)


def layer_norm_reference(x: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """What `spelled_out_layer_norm` computes, in float64."""
    x = x.astype(np.float64)
    scale = np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return (x - x.mean(-1, keepdims=True)) / scale * np.linspace(0.5, 1.5, WIDTH)


def attention(opset: int = 23) -> onnx.ModelProto:
    """One fused Attention node: q, k, v (batch, 2, 8, 16)."""
    shape = ["batch", 2, 8, 16]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("q", "k", "v", "y")]
    weight = numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["q", "w"], ["q2"]),
        helper.make_node("Attention", ["q2", "k", "v"], ["y"], name="attn", scale=0.25),
    ]
    graph = helper.make_graph(nodes, "g", values[:3], values[3:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def unsupported() -> onnx.ModelProto:
    """Two operators that TensorRT has no importer for."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Det", ["x"], ["y"], name="area"),
        helper.make_node("Unique", ["x"], ["z"], name="distinct"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y, z])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
