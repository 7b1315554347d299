"""Linear layers, however they are spelled: y = x @ W + b as MatMul + Add, Gemm, or a 1x1 Conv."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx.helper

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, is_standard, other_input
from toast_onnx.reasons import Kind, Reason


@dataclass(frozen=True)
class Linear:
    """One linear layer of the graph.

    Attributes:
        node: position of the multiplying node.
        add: position of the `Add` that holds the bias, None when there is none or the node holds it itself.
        input: tensor x; channels on `channel_axis`.
        output: tensor y, after the bias.
        weight: tensor name of the constant W (any spelling; read it with `weights`).
        bias: tensor name of the constant b, None when there is none.
        in_features: number of input channels.
        out_features: number of output channels.
        channel_axis: axis of the channels in x and y: -1, or 1 for a convolution.
        kernel: axes of a convolution's kernel, each one long; 0 for any other layer.
        small: how the weight is stored in fewer bits than it computes with, and what to do; None where it is not.
    """

    node: int
    add: int | None
    input: str
    output: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    channel_axis: int
    kernel: int
    small: Reason | None

    @property
    def nodes(self) -> tuple[int, ...]:
        """Positions of the nodes the layer consists of."""
        return (self.node,) if self.add is None else (self.node, self.add)


def find_linears(view: GraphView, facts: Facts) -> dict[str, Linear]:
    """All linear layers of a graph, by the name of their output tensor."""
    found = (_linear_at(view, facts, i) for i in range(len(view.nodes)))
    return {linear.output: linear for linear in found if linear is not None}


def weights(view: GraphView, facts: Facts, linear: Linear) -> np.ndarray:
    """Weight matrix W (in_features, out_features) in the graph's own precision, Gemm's alpha folded in."""
    node = view.nodes[linear.node]
    w = facts.array(linear.weight)
    if node.op_type == "Conv":
        return w.reshape(linear.out_features, linear.in_features).T
    if node.op_type == "Gemm":
        w = w.T if attribute(node, "transB", 0) else w
        alpha = float(attribute(node, "alpha", 1.0))  # type: ignore[arg-type]
        return w if alpha == 1.0 else (w * np.asarray(alpha, w.dtype))
    return w


def bias(view: GraphView, facts: Facts, linear: Linear) -> np.ndarray | None:
    """Bias vector b (out_features,), Gemm's beta folded in; None when the layer has none."""
    if linear.bias is None:
        return None
    b = np.broadcast_to(facts.array(linear.bias).reshape(-1), (linear.out_features,))
    node = view.nodes[linear.node]
    beta = float(attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else 1.0  # type: ignore[arg-type]
    return b if beta == 1.0 else (b * np.asarray(beta, b.dtype))


def _linear_at(view: GraphView, facts: Facts, i: int) -> Linear | None:
    node = view.nodes[i]
    if not is_standard(node) or node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.input) < 2:
        return None
    x, w = node.input[0], node.input[1]
    shape, w_shape = facts.shape(x), facts.shape(w)
    if facts.is_constant(x) or not facts.is_constant(w) or shape is None or w_shape is None:
        return None
    fans, b = _fans(node, w_shape), node.input[2] if len(node.input) > 2 and node.input[2] else None
    if fans is None or (b is not None and not _is_vector(facts, b, fans[1], axis=-1)):
        return None
    fan_in, fan_out = fans
    axis, kernel = (1, len(w_shape) - 2) if node.op_type == "Conv" else (-1, 0)
    add, output = None, node.output[0]
    if node.op_type == "MatMul":
        found = _bias_add(view, facts, output, fan_out)
        if found is not None:
            add, b = found
            output = view.nodes[add].output[0]
    return Linear(i, add, x, output, w, b, fan_in, fan_out, axis, kernel, _stored_small(view, facts, w))


def _fans(node: onnx.NodeProto, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Channels in and out of a layer by the shape of its weight; None where it is no product of channels alone."""
    if node.op_type == "Conv":
        plain = all(k == 1 for k in shape[2:]) and attribute(node, "group", 1) == 1 and _is_pointwise(node)
        return (shape[1], shape[0]) if plain else None
    if len(shape) != 2 or attribute(node, "transA", 0):
        return None
    return (shape[1], shape[0]) if attribute(node, "transB", 0) else shape


def _bias_add(view: GraphView, facts: Facts, tensor: str, width: int) -> tuple[int, str] | None:
    reader = view.only_reader(tensor)
    if reader is None or view.nodes[reader].op_type != "Add" or not is_standard(view.nodes[reader]):
        return None
    other = other_input(view.nodes[reader], tensor)
    if not facts.is_constant(other) or not _is_vector(facts, other, width, axis=-1):
        return None
    rank, other_rank = len(facts.shape(tensor) or ()), len(facts.shape(other) or ())
    return (reader, other) if other_rank <= rank else None


def _is_vector(facts: Facts, name: str, width: int, axis: int) -> bool:
    """Whether a constant has `width` entries along `axis` and no other extent."""
    shape = facts.shape(name)
    return bool(shape) and shape is not None and shape[axis] == width and int(np.prod(shape)) == width


def _is_pointwise(node: object) -> bool:
    strides = attribute(node, "strides", [1])  # type: ignore[arg-type]
    pads = attribute(node, "pads", [0])  # type: ignore[arg-type]
    return all(s == 1 for s in strides) and all(p == 0 for p in pads)  # type: ignore[attr-defined]


def _stored_small(view: GraphView, facts: Facts, weight: str) -> Reason | None:
    """How a weight is stored in fewer bits than it computes with: dequantized, or cast up on the way."""
    name, computed = weight, _bits(facts, weight)
    while (node := view.producer_of(name)) is not None and node.input:
        if node.op_type == "DequantizeLinear":
            return Kind.QUANTIZED.says("quantized; prune first, then quantize")
        name = max(node.input, key=lambda each: int(np.prod(facts.shape(each) or (0,))) if each else -1)
    if _bits(facts, name) >= computed:
        return None
    kind = onnx.helper.tensor_dtype_to_np_dtype(facts.elem_type(name))
    if kind.kind in "iu":
        return Kind.QUANTIZED.says("stored as {kept}; prune first, then quantize", kept=kind.name)
    text = "stored as {kept} and cast up; prune the float{bits} model, then store it smaller"
    return Kind.STORED.says(text, kept=kind.name, bits=computed)


def _bits(facts: Facts, name: str) -> int:
    """Bits of one element of a tensor."""
    kind = facts.elem_type(name)
    return 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize if kind else 0
