"""Multiply-accumulates and parameters of a graph, counted as the literature counts them.

One multiply-accumulate is one; the two matrix products of attention count; norms, activations, softmax and position
bias do not. Constant folding counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import onnx

from toast_onnx.matching.blocks import Attention, Ffn
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import FLOATS, LEARNED, ROWS, GraphView, attribute
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.operators import ATTENTIONS


def graph_macs(view: GraphView, facts: Facts) -> int:
    """Multiply-accumulates of the whole graph at the facts' input shapes."""
    return sum(node_macs(view, facts, i) for i in range(len(view.nodes)))


def node_macs(view: GraphView, facts: Facts, i: int) -> int:
    """Multiply-accumulates of one node; 0 for nodes that do none, are constant, or have unknown shapes."""
    node = view.nodes[i]
    if not node.output or facts.is_constant(node.output[0]) or _is_spelled(view, node):
        return 0
    return macs_at(node, [facts.shape(name) if name else None for name in node.input], facts.shape(node.output[0]))


def _is_spelled(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node only spells learned queries, which are constants in the graph as it came."""
    first = view.initializers.get(node.input[0]) if node.input else None
    return first is not None and first.doc_string == ROWS


def macs_at(node: onnx.NodeProto, shapes: Sequence[tuple[int, ...] | None], out: tuple[int, ...] | None) -> int:
    """Multiply-accumulates of a node at some shapes.

    Args:
        node: the node.
        shapes: of its operands, None where one is missing or unknown.
        out: of its first output.
    """
    if out is None or not shapes or shapes[0] is None:
        return 0
    op = node.op_type
    if op in ("MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul"):
        inner = shapes[0][-2] if op == "FusedMatMul" and attribute(node, "transA", 0) else shapes[0][-1]
        return prod(out) * inner
    if op in ("Gemm", "FusedGemm"):
        return prod(out) * shapes[0][0 if attribute(node, "transA", 0) else 1]
    if op in ("Conv", "FusedConv", "ConvInteger", "QLinearConv"):
        weight = shapes[3] if op == "QLinearConv" else shapes[1]
        return 0 if weight is None else prod(out) * prod(weight[1:])
    if op == "ConvTranspose" and shapes[1] is not None:
        return prod(shapes[0]) * prod(shapes[1][1:])
    if op == "Einsum":
        return _einsum(str(attribute(node, "equation", b""), "utf-8"), shapes)  # type: ignore[call-overload]
    if op in ATTENTIONS:
        return _fused_attention(node, shapes, out)
    return 0


def _einsum(equation: str, shapes: Sequence[tuple[int, ...] | None]) -> int:
    extents: dict[str, int] = {}
    for term, shape in zip(equation.replace(" ", "").split("->")[0].split(","), shapes, strict=True):
        if "." in term or shape is None:
            return 0
        extents.update(zip(term, shape, strict=True))
    return prod(extents.values()) if len(shapes) > 1 else 0


def _fused_attention(node: onnx.NodeProto, shapes: Sequence[tuple[int, ...] | None], out: tuple[int, ...]) -> int:
    q, k, v = (list(shapes) + [None] * 3)[:3]
    if node.domain == "com.microsoft" and node.op_type == "Attention":
        if q is None or k is None:
            return 0
        # (batch, tokens, channels) and packed weights (channels, q + k + v)
        value = out[-1]
        return q[0] * q[1] * (q[2] * k[1] + q[1] * ((k[1] - value) // 2 + value))
    if q is None or k is None or v is None:
        return 0
    batch, queries, keys = q[0], q[-2], k[-2]
    qk = q[1] * q[3] if len(q) == 4 else q[-1]
    vo = out[1] * out[3] if len(out) == 4 else out[-1]  # several heads may share values
    return batch * queries * keys * (qk + vo)


def attention_macs(view: GraphView, facts: Facts, attention: Attention) -> int:
    """Multiply-accumulates of an attention: its four projections, two products, and what convolves the values."""
    nodes = set(attention.core.nodes) | {linear.node for linear in attention.linears}
    nodes |= set() if attention.side is None else set(attention.side.nodes)
    return sum(node_macs(view, facts, i) for i in nodes)


def ffn_macs(view: GraphView, facts: Facts, ffn: Ffn) -> int:
    """Multiply-accumulates of a feed-forward network, depthwise convolutions between fc1 and fc2 included."""
    nodes = {linear.node for linear in ffn.linears} | set(ffn.nodes)
    return sum(node_macs(view, facts, i) for i in nodes)


def graph_params(view: GraphView) -> int:
    """Weights of a graph, floating-point or of one byte: initializers and Constant nodes, single numbers left out."""
    kinds = FLOATS | {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    own = (t for t in view.initializers.values() if t.doc_string not in (ROWS, LEARNED))
    total = sum(n for t in own if t.data_type in kinds and (n := prod(t.dims)) > 1)
    for node in view.nodes:
        for a in node.attribute:
            if node.op_type == "Constant" and a.name == "value" and a.t.data_type in FLOATS:
                total += n if (n := prod(a.t.dims)) > 1 else 0
    return total


def linear_params(linears: Iterable[Linear]) -> int:
    """Weights and biases of linear layers."""
    return sum(x.in_features * x.out_features + (0 if x.bias is None else x.out_features) for x in linears)
