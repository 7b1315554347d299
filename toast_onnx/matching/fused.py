"""com.microsoft attention nodes that hold more than the attention, spelled out so that their layers can be found.

ONNX Runtime's optimizers move the Q, K, V projection (`Attention`), its bias or its packed output
(`MultiHeadAttention`) into one node. For matching, solving and the proof, projection, bias and split stand in front of
a plain `MultiHeadAttention`; `toast_onnx.rewriting.fusing` puts them back. Specification: ONNX Runtime's contrib
operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, rewired
from toast_onnx.model import Model

#: What both operators share.
_SHARED = ("num_heads", "scale", "mask_filter_value", "unidirectional")


@dataclass(frozen=True)
class SpelledOut:
    """One node and what stands in its place.

    Attributes:
        node: the node as it was.
        parts: its replacement; the last one makes the same output.
    """

    node: onnx.NodeProto
    parts: tuple[onnx.NodeProto, ...]


def spell_out(view: GraphView, facts: Facts) -> tuple[Model, tuple[SpelledOut, ...]]:
    """Replace every such node that can be spelled out.

    Args:
        view: the graph.
        facts: its facts.

    Returns:
        The model (the very same one where there is nothing to do), and what was replaced.
    """
    made: dict[int, SpelledOut] = {}
    for i, node in enumerate(view.nodes):
        if node.domain != "com.microsoft":
            continue
        parts: list[onnx.NodeProto] | None = None
        if node.op_type == "Attention":
            parts = _attention(view, facts, node)
        elif node.op_type == "MultiHeadAttention":
            parts = _multi_head(view, facts, node)
        if parts is not None:
            made[i] = SpelledOut(node, tuple(parts))
    if not made:
        return view.model, ()
    return rewired(view, {i: each.parts for i, each in made.items()}), tuple(made.values())


def _attention(view: GraphView, facts: Facts, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """x W + b, split, MultiHeadAttention; None where the node does more (a cache, rotary embedding)."""
    inputs = [*node.input, *[""] * (7 - len(node.input))]
    x, w, b, mask, past, bias, length = inputs[:7]
    x_shape, w_shape = facts.shape(x), facts.shape(w)
    more = past or length or any(node.output[1:]) or attribute(node, "do_rotary", 0) or not _plain_mask(facts, mask, x)
    if more or x_shape is None or w_shape is None or len(x_shape) != 3 or len(w_shape) != 2:
        return None
    sizes = attribute(node, "qkv_hidden_sizes") or [w_shape[1] // 3] * 3
    name = _base(view, node)
    nodes = [onnx.helper.make_node("MatMul", [x, w], [f"{name}/product"], name=f"{name}/MatMul")]
    whole = f"{name}/product"
    if b:
        whole = f"{name}/qkv"
        nodes.append(onnx.helper.make_node("Add", [f"{name}/product", b], [whole], name=f"{name}/Add"))
    parts = [f"{name}/{part}" for part in "qkv"]
    nodes += _split(view, whole, parts, list(sizes), 2, name)  # type: ignore[call-overload]
    return [*nodes, _plain(node, [*parts, "", mask, bias], name)]


def _plain_mask(facts: Facts, mask: str, x: str) -> bool:
    """Whether MultiHeadAttention takes the mask, too: lengths (batch,), or a mask of rank 2 or 3."""
    shape, batch = facts.shape(mask), (facts.shape(x) or (0,))[0]
    return not mask or (shape is not None and (len(shape) in (2, 3) or shape == (batch,)))


def _multi_head(view: GraphView, facts: Facts, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """Bias and packed operands taken out; None where there are none, or a key/value cache."""
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    q, k, v, bias, mask, scores = inputs[:6]
    shapes = [facts.shape(name) for name in (q, k, v)]
    if any(inputs[6:]) or any(node.output[1:]) or shapes[0] is None:
        return None
    name = _base(view, node)
    nodes: list[onnx.NodeProto] = []
    operands = [q, k, v]
    widths = [shape[-1] if shape is not None else 0 for shape in shapes]
    if len(shapes[0]) == 5 and not k and not v:
        operands = [f"{name}/{part}" for part in "qkv"]
        nodes += _unpacked(view, q, operands, shapes[0], name)
        widths = [shapes[0][2] * shapes[0][4]] * 3
    elif len(shapes[0]) == 3 and shapes[1] is not None and len(shapes[1]) == 5 and not v:
        operands = [q, f"{name}/k", f"{name}/v"]
        nodes += _unpacked(view, k, operands[1:], shapes[1], name)
        widths = [widths[0], *[shapes[1][2] * shapes[1][4]] * 2]
    elif any(shape is None or len(shape) != 3 for shape in shapes):
        return None
    if bias:
        if not facts.is_constant(bias) or facts.shape(bias) != (sum(widths),):
            return None
        pieces = [f"{name}/{part}_bias" for part in "qkv"]
        nodes += _split(view, bias, pieces, widths, 0, f"{name}/bias")
        for part, operand, piece in zip("qkv", operands, pieces, strict=True):
            made = f"{name}/{part}_with_bias"
            nodes.append(onnx.helper.make_node("Add", [operand, piece], [made], name=f"{name}/{part}/Add"))
        operands = [f"{name}/{part}_with_bias" for part in "qkv"]
    return [*nodes, _plain(node, [*operands, "", mask, scores], name)] if nodes else None


def _unpacked(
    view: GraphView, packed: str, made: Sequence[str], shape: Sequence[int], name: str
) -> list[onnx.NodeProto]:
    """(batch, tokens, heads, parts, dim) to one (batch, tokens, heads x dim) a part."""
    slices = [f"{part}_slice" for part in made]
    nodes = _split(view, packed, slices, [1] * len(made), 3, f"{name}/packed")
    target = f"{name}/merged"
    value = onnx.numpy_helper.from_array(np.asarray([0, 0, shape[2] * shape[4]], np.int64))
    nodes.append(onnx.helper.make_node("Constant", [], [target], name=f"{name}/merged/Constant", value=value))
    for part, slice_ in zip(made, slices, strict=True):
        nodes.append(onnx.helper.make_node("Reshape", [slice_, target], [part], name=f"{part}/Reshape"))
    return nodes


def _split(
    view: GraphView, tensor: str, made: Sequence[str], sizes: Sequence[int], axis: int, name: str
) -> list[onnx.NodeProto]:
    sizes = [int(s) for s in sizes]
    if view.model.opset < 13:
        return [onnx.helper.make_node("Split", [tensor], made, name=f"{name}/Split", axis=axis, split=sizes)]
    value = onnx.numpy_helper.from_array(np.asarray(sizes, np.int64))
    return [
        onnx.helper.make_node("Constant", [], [f"{name}/sizes"], name=f"{name}/sizes/Constant", value=value),
        onnx.helper.make_node("Split", [tensor, f"{name}/sizes"], made, name=f"{name}/Split", axis=axis),
    ]


def _plain(node: onnx.NodeProto, inputs: list[str], name: str) -> onnx.NodeProto:
    """MultiHeadAttention with three operands, mask and bias on the scores, and the node's own attributes."""
    while inputs and not inputs[-1]:
        inputs.pop()
    shared: dict[str, Any] = {a.name: attribute(node, a.name) for a in node.attribute if a.name in _SHARED}
    made = onnx.helper.make_node(
        "MultiHeadAttention", inputs, [node.output[0]], name=f"{name}/MultiHeadAttention", domain="com.microsoft"
    )
    made.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in shared.items())
    return made


def _base(view: GraphView, node: onnx.NodeProto) -> str:
    """Prefix for new names that no tensor and no node has."""
    taken = {*view.producer, *view.initializers, *(n.name for n in view.nodes)}
    name = node.name or node.output[0]
    while any(other.startswith(f"{name}/") for other in taken):
        name += "_spelled"
    return name
