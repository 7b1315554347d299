"""LayerNorm spelled out in elementary nodes, written as the operator that it is.

Before opset 17 exporters had no other way, and graphs converted upwards keep the old spelling. In half precision its
square overflows long before the operator does, which accumulates in float32; and runtimes fuse the operator for sure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import GraphEdit
from toast_onnx.errors import ConfigError
from toast_onnx.matching.facts import Facts, reduced_axes
from toast_onnx.matching.graph import FLOATS, GraphView, attribute, is_standard, other_input
from toast_onnx.model import Model

#: First opset with the LayerNormalization operator.
OPSET = 17


@dataclass(frozen=True)
class SpelledNorm:
    """One LayerNorm over the last axis made of elementary nodes.

    Attributes:
        input: tensor that is normalised.
        last: position of the node whose output is the norm's.
        epsilon: added to the variance.
        gain: tensor with one factor a channel, "" where there is none.
        bias: tensor with one summand a channel, "" where there is none.
    """

    input: str
    last: int
    epsilon: float
    gain: str
    bias: str


def normalize_layer_norms(model: Model, shapes: Mapping[str, Sequence[int]]) -> tuple[Model, int]:
    """Write every spelled-out LayerNorm over the last axis as one LayerNormalization node.

    (x - mean) / sqrt(var + epsilon) * gain + bias, as in Ba, Kiros and Hinton, Layer Normalization (arXiv 1607.06450).
    Names of the norm's output, and every other node, stay.

    Args:
        model: the model; it is not changed.
        shapes: concrete shapes of its inputs.

    Returns:
        The new model and how many norms were written; the same model when there are none.

    Raises:
        ConfigError: the graph's opset has no such operator.
    """
    if model.opset < OPSET:
        raise ConfigError(
            f"--normalize writes LayerNormalization, an operator of opset {OPSET}, and this graph has opset "
            f"{model.opset}: export it with opset {OPSET} or newer, raise its opset with onnx.version_converter, or "
            "leave --normalize out"
        )
    view = GraphView(model)
    facts = Facts(view, shapes)
    norms = find_spelled_norms(view, facts)
    if not norms:
        return model, 0
    edit = GraphEdit(view)
    for norm in norms:
        _write(edit, view, facts, norm)
    return edit.apply(), len(norms)


def find_spelled_norms(view: GraphView, facts: Facts) -> list[SpelledNorm]:
    """Every LayerNorm over the last axis that is spelled out, in graph order."""
    found = (_norm_at(view, facts, i) for i, node in enumerate(view.nodes) if _is(node, "Div", "Mul"))
    return [norm for norm in found if norm is not None]


def _write(edit: GraphEdit, view: GraphView, facts: Facts, norm: SpelledNorm) -> None:
    node = view.nodes[norm.last]
    output, name = node.output[0], f"{node.name or node.output[0]}/LayerNormalization"
    channels = (facts.shape(norm.input) or ())[-1]
    vectors = []
    for part, tensor in (("gain", norm.gain), ("bias", norm.bias)):
        if tensor and facts.shape(tensor) == (channels,):
            vectors.append(tensor)
        elif tensor:
            vectors.append(edit.constant(f"{name}.{part}", facts.array(tensor).reshape(-1)))
        elif part == "gain":  # the operator has no form without one
            dtype = onnx.helper.tensor_dtype_to_np_dtype(facts.elem_type(norm.input))
            vectors.append(edit.constant(f"{name}.{part}", np.ones(channels, dtype)))
    edit.remove([norm.last])
    edit.emit(norm.last, "LayerNormalization", [norm.input, *vectors], output, name, axis=-1, epsilon=norm.epsilon)


def _norm_at(view: GraphView, facts: Facts, i: int) -> SpelledNorm | None:
    """The norm whose division is node `i`, gain and bias behind it included."""
    divided = _division(view, view.nodes[i])
    if divided is None:
        return None
    centred, spread = divided
    x = _centred(view, facts, centred)
    epsilon = None if x is None else _epsilon(view, facts, spread, x)
    if x is None or epsilon is None or facts.elem_type(x) not in FLOATS:
        return None
    channels = (facts.shape(x) or ())[-1]
    last, gain = _applied(view, facts, i, "Mul", channels)
    last, bias = _applied(view, facts, last, "Add", channels)
    same = all(facts.elem_type(t) == facts.elem_type(x) for t in (gain, bias, view.nodes[last].output[0]) if t)
    return SpelledNorm(x, last, epsilon, gain, bias) if same else None


def _division(view: GraphView, node: onnx.NodeProto) -> tuple[str, str] | None:
    """(numerator, denominator) of a / b or a * (1 / b)."""
    if node.op_type == "Div":
        return node.input[0], node.input[1]
    for k in (0, 1):
        inverse = view.producer_of(node.input[k])
        if inverse is not None and _is(inverse, "Reciprocal"):
            return node.input[1 - k], inverse.input[0]
    return None


def _centred(view: GraphView, facts: Facts, tensor: str) -> str | None:
    """x where `tensor` is x - mean(x) over the last axis."""
    node = view.producer_of(tensor)
    if node is None or not _is(node, "Sub"):
        return None
    x = node.input[0]
    return x if _mean_of(view, facts, node.input[1]) == x else None


def _mean_of(view: GraphView, facts: Facts, tensor: str) -> str | None:
    """x where `tensor` is the mean of x over its last axis, that axis kept."""
    node = view.producer_of(tensor)
    if node is None or not _is(node, "ReduceMean") or not attribute(node, "keepdims", 1):
        return None
    rank = len(facts.shape(node.input[0]) or ())
    return node.input[0] if rank and reduced_axes(facts, node, rank) == [rank - 1] else None


def _epsilon(view: GraphView, facts: Facts, spread: str, x: str) -> float | None:
    """epsilon where `spread` is sqrt(mean((x - mean(x))^2) + epsilon)."""
    root = view.producer_of(spread)
    total = view.producer_of(root.input[0]) if root is not None and _is(root, "Sqrt") else None
    if total is None or not _is(total, "Add"):
        return None
    for k in (0, 1):
        epsilon = facts.value(total.input[k])
        square = _mean_of(view, facts, total.input[1 - k])
        if epsilon is None or epsilon.size != 1 or not facts.is_constant(total.input[k]) or square is None:
            continue
        base = _square_of(view, facts, square)
        if base is not None and _centred(view, facts, base) == x:
            return float(epsilon.reshape(()))
    return None


def _square_of(view: GraphView, facts: Facts, tensor: str) -> str | None:
    """x where `tensor` is x^2 or x * x."""
    node = view.producer_of(tensor)
    if node is None:
        return None
    if _is(node, "Mul") and node.input[0] == node.input[1]:
        return node.input[0]
    power = facts.value(node.input[1]) if _is(node, "Pow") else None
    return node.input[0] if power is not None and power.size == 1 and float(power.reshape(())) == 2 else None


def _applied(view: GraphView, facts: Facts, i: int, op: str, channels: int) -> tuple[int, str]:
    """(position, vector) of the only reader of node `i`, where it applies one constant a channel; else (i, "")."""
    output = view.nodes[i].output[0]
    reader = view.only_reader(output)
    if reader is None or not _is(view.nodes[reader], op):
        return i, ""
    other = other_input(view.nodes[reader], output)
    shape = facts.shape(other)
    rank = len(facts.shape(output) or ())
    fits = bool(shape) and shape is not None and shape[-1] == channels == int(np.prod(shape)) and len(shape) <= rank
    return (reader, other) if fits and facts.is_constant(other) else (i, "")


def _is(node: onnx.NodeProto, *ops: str) -> bool:
    return node.op_type in ops and is_standard(node)
