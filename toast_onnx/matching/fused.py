"""com.microsoft attention nodes that hold more than the attention, spelled out so that their layers can be found.

ONNX Runtime's optimizers move the Q, K, V projection (`Attention`), its bias or its packed output
(`MultiHeadAttention`) into one node. For matching, solving and the proof, projection, bias and split stand in front of
a plain `MultiHeadAttention`; `toast_onnx.rewriting.fusing` puts them back. Specification: ONNX Runtime's contrib
operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, rewired
from toast_onnx.matching.respelling import Respelling, free_prefix
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
        write: Respelling | None = None
        if node.op_type == "Attention":
            write = _attention(view, facts, node)
        elif node.op_type == "MultiHeadAttention":
            write = _multi_head(view, facts, node)
        if write is not None:
            made[i] = SpelledOut(node, tuple(write.nodes))
    if not made:
        return view.model, ()
    return rewired(view, {i: each.parts for i, each in made.items()}), tuple(made.values())


def _attention(view: GraphView, facts: Facts, node: onnx.NodeProto) -> Respelling | None:
    """x W + b, split, MultiHeadAttention; None where the node does more (a cache, rotary embedding)."""
    inputs = [*node.input, *[""] * (7 - len(node.input))]
    x, w, b, mask, past, bias, length = inputs[:7]
    x_shape, w_shape = facts.shape(x), facts.shape(w)
    more = past or length or any(node.output[1:]) or attribute(node, "do_rotary", 0) or not _plain_mask(facts, mask, x)
    if more or x_shape is None or w_shape is None or len(x_shape) != 3 or len(w_shape) != 2:
        return None
    sizes = attribute(node, "qkv_hidden_sizes") or [w_shape[1] // 3] * 3
    write = _writer(view, node)
    (whole,) = write.node("MatMul", [x, w], outputs=[f"{write.name}/product"])
    if b:
        (whole,) = write.node("Add", [whole, b], outputs=[f"{write.name}/qkv"])
    parts = [f"{write.name}/{part}" for part in "qkv"]
    write.split(whole, [int(size) for size in sizes], 2, parts)  # type: ignore[attr-defined]
    return _plain(write, node, [*parts, "", mask, bias])


def _plain_mask(facts: Facts, mask: str, x: str) -> bool:
    """Whether MultiHeadAttention takes the mask, too: lengths (batch,), or a mask of rank 2 or 3."""
    shape, batch = facts.shape(mask), (facts.shape(x) or (0,))[0]
    return not mask or (shape is not None and (len(shape) in (2, 3) or shape == (batch,)))


def _multi_head(view: GraphView, facts: Facts, node: onnx.NodeProto) -> Respelling | None:
    """Bias and packed operands taken out; None where there are none, or a key/value cache."""
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    q, k, v, bias, mask, scores = inputs[:6]
    shapes = [facts.shape(name) for name in (q, k, v)]
    if any(inputs[6:]) or any(node.output[1:]) or shapes[0] is None:
        return None
    write = _writer(view, node)
    named = [f"{write.name}/{part}" for part in "qkv"]
    operands = [q, k, v]
    widths = [shape[-1] if shape is not None else 0 for shape in shapes]
    if len(shapes[0]) == 5 and not k and not v:
        operands = named
        _unpack(write, q, operands, shapes[0])
        widths = [shapes[0][2] * shapes[0][4]] * 3
    elif len(shapes[0]) == 3 and shapes[1] is not None and len(shapes[1]) == 5 and not v:
        operands = [q, *named[1:]]
        _unpack(write, k, operands[1:], shapes[1])
        widths = [widths[0], *[shapes[1][2] * shapes[1][4]] * 2]
    elif any(shape is None or len(shape) != 3 for shape in shapes):
        return None
    if bias:
        if not facts.is_constant(bias) or facts.shape(bias) != (sum(widths),):
            return None
        pieces = [f"{part}_bias" for part in named]
        write.within(f"{write.name}/bias").split(bias, widths, 0, pieces)
        for part, operand, piece in zip(named, operands, pieces, strict=True):
            write.within(part).node("Add", [operand, piece], outputs=[f"{part}_with_bias"])
        operands = [f"{part}_with_bias" for part in named]
    return _plain(write, node, [*operands, "", mask, scores]) if write.nodes else None


def _unpack(write: Respelling, packed: str, made: Sequence[str], shape: Sequence[int]) -> None:
    """(batch, tokens, heads, parts, dim) to one (batch, tokens, heads x dim) a part."""
    slices = [f"{part}_slice" for part in made]
    write.within(f"{write.name}/packed").split(packed, [1] * len(made), 3, slices)
    target = write.numbers([0, 0, shape[2] * shape[4]], "merged")
    for part, slice_ in zip(made, slices, strict=True):
        write.within(part).node("Reshape", [slice_, target], outputs=[part])


def _plain(write: Respelling, node: onnx.NodeProto, inputs: list[str]) -> Respelling:
    """MultiHeadAttention with three operands, mask and bias on the scores, and the node's own attributes."""
    while inputs and not inputs[-1]:
        inputs.pop()
    write.node("MultiHeadAttention", inputs, outputs=[node.output[0]], domain="com.microsoft")
    write.nodes[-1].attribute.extend(a for a in node.attribute if a.name in _SHARED)
    return write


def _writer(view: GraphView, node: onnx.NodeProto) -> Respelling:
    """A writer under a prefix of its own."""
    return Respelling(view, free_prefix(view, node.name or node.output[0]), inline="{}/Constant")
