"""Fused attention whose keys and values have different widths, written as the operators it stands for.

ONNX's `Attention` (opset 23) and ONNX Runtime take d_qk != d_v; TensorRT's parser wants both alike. The formula is that
of the operator's specification: softmax(scale * Q K^T + mask) V.
"""

from __future__ import annotations

import math

import onnx
import onnx.helper

from toast_onnx.edit import GraphEdit, PlaceWriter
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.input_shapes import counted_shapes
from toast_onnx.model import Model

#: Scores of masked keys, by element type, where those of float32 do not fit.
LOWEST: dict[int, float] = {onnx.TensorProto.FLOAT16: -65504.0}


def spell_out_uneven(model: Model) -> tuple[Model, int]:
    """Write every `Attention` node with d_qk != d_v as MatMul, Softmax and MatMul.

    Nodes that carry a cache, a causal mask, a soft cap or more outputs than one stay, for TensorRT to speak about.

    Args:
        model: the model; it is not changed.

    Returns:
        The new model and how many nodes were written; the same model when there are none.

    Raises:
        ModelError: the graph does not fit its declared input shapes.
    """
    if not any(_is_attention(node) for node in model.proto.graph.node):
        return model, 0
    view = GraphView(model)
    facts = counted_shapes(view, {}).facts
    found = [i for i, node in enumerate(view.nodes) if _is_attention(node) and _is_uneven(facts, node)]
    if not found:
        return model, 0
    edit = GraphEdit(view)
    for i in found:
        _write(edit, view, facts, i)
    return edit.apply(), len(found)


def _is_attention(node: onnx.NodeProto) -> bool:
    return node.op_type == "Attention" and is_standard(node)


def _is_uneven(facts: Facts, node: onnx.NodeProto) -> bool:
    """Whether a node has the form written here: (batch, heads, tokens, d) operands, d_qk != d_v, at most a mask."""
    shapes = [facts.shape(name) for name in node.input[:3]]
    plain = not any(attribute(node, name, 0) for name in ("is_causal", "softcap", "softmax_precision"))
    if not plain or any(node.input[4:]) or any(node.output[1:]):
        return False
    if any(s is None or len(s) != 4 for s in shapes):
        return False
    q, k, v = (s for s in shapes if s is not None)
    if q[1] != k[1] or k[3] == v[3] or float(attribute(node, "scale", 1.0)) <= 0:  # type: ignore[arg-type]
        return False
    mask = facts.shape(node.input[3]) if len(node.input) > 3 and node.input[3] else (1,)
    return mask is not None and mask[-1] in (1, k[2])


def _write(edit: GraphEdit, view: GraphView, facts: Facts, i: int) -> None:
    node = view.nodes[i]
    q, k, v = node.input[:3]
    name, output = node.name or node.output[0], node.output[0]
    elem = facts.elem_type(q)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(elem)

    write = PlaceWriter(edit, i, name)
    scale = float(attribute(node, "scale", 1 / math.sqrt((facts.shape(q) or (1,))[-1])))  # type: ignore[arg-type]
    # The specification splits the scale between both operands, which keeps half precision in range.
    half = write.constant(math.sqrt(scale), "scale", dtype)
    keys = write.one("Transpose", [write.one("Mul", [k, half])], perm=[0, 1, 3, 2])
    scores = write.one("MatMul", [write.one("Mul", [q, half]), keys])
    mask = node.input[3] if len(node.input) > 3 else ""
    boolean = bool(mask) and facts.elem_type(mask) == onnx.TensorProto.BOOL
    if boolean:
        lowest = write.constant(LOWEST.get(elem, -3e38), "lowest", dtype)
        scores = write.one("Where", [mask, scores, lowest])
    elif mask:
        scores = write.one("Add", [scores, mask if facts.elem_type(mask) == elem else write.cast(mask, elem)])
    weights = write.one("Softmax", [scores], axis=-1)
    if boolean:  # a query that sees no key at all gives zeros
        weights = write.one("Where", [mask, weights, write.constant(0, "zero", dtype)])
    edit.remove([i])
    edit.emit(i, "MatMul", [weights, v], output, f"{name}/context")
