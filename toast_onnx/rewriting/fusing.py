"""Putting attention nodes together again that were spelled out for matching (`toast_onnx.matching.fused`).

What was not rewritten becomes the very node it was. A rewritten com.microsoft `Attention` stays one, with the new
packed weights, `qkv_hidden_sizes`, number of heads and an explicit scale; other forms stay a `MultiHeadAttention` with
plain operands, because a packed operand or bias has no room for queries and values of different widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.helper

from toast_onnx.edit import drop_attributes, tidy
from toast_onnx.matching.fused import SpelledOut
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.model import Model


def fuse_again(model: Model, spelled: Sequence[SpelledOut]) -> Model:
    """Put spelled-out nodes together again (in place).

    Args:
        model: the rewritten model.
        spelled: what was spelled out.

    Returns:
        The model.
    """
    for each in spelled:
        view = GraphView(model)
        i = view.producer.get(each.node.output[0])
        if i is None:
            continue
        present = {n.name: k for k, n in enumerate(view.nodes) if n.name}
        places = [present.get(part.name) for part in each.parts]
        same = [k is not None and view.nodes[k] == part for k, part in zip(places, each.parts, strict=True)]
        if all(same):
            _replace(model, i, [k for k in places if k is not None], each.node)
        elif each.node.op_type == "Attention":
            _fuse_attention(model, view, i, each.node)
    if spelled:
        tidy(model)
    return model


def _fuse_attention(model: Model, view: GraphView, i: int, old: onnx.NodeProto) -> None:
    """MatMul, Add, Split, MultiHeadAttention to Attention, where they still stand in a row and nothing else reads."""
    core = view.nodes[i]
    split = view.producer_of(core.input[0])
    if split is None or split.op_type != "Split" or list(split.output) != list(core.input[:3]):
        return
    whole, bias = split.input[0], ""
    chain = [view.producer[split.output[0]]]
    node = view.producer_of(whole)
    if node is not None and node.op_type == "Add" and node.input[1] in view.initializers:
        chain.append(view.producer[whole])
        whole, bias = node.input[0], node.input[1]
        node = view.producer_of(whole)
    # Without a bias ONNX Runtime 1.31 crashes on the CPU: the node stays a MultiHeadAttention.
    if not bias or node is None or node.op_type != "MatMul" or node.input[1] not in view.initializers:
        return
    chain.append(view.producer[whole])
    inside = {i, *chain}
    made = [name for k in chain for name in view.nodes[k].output]
    if any(reader not in inside for name in made for reader in view.consumers.get(name, [])):
        return
    fused = onnx.NodeProto()
    fused.CopyFrom(old)
    fused.input[0], fused.input[1], fused.input[2] = node.input[0], node.input[1], bias
    if len(core.input) > 5:
        fused.input[5] = core.input[5]
    sizes = _sizes(view, split)
    if sizes is None:
        return
    scale, heads = attribute(core, "scale"), attribute(core, "num_heads")
    drop_attributes(fused, "qkv_hidden_sizes", "scale", "num_heads")
    fused.attribute.append(onnx.helper.make_attribute("num_heads", heads))
    fused.attribute.append(onnx.helper.make_attribute("qkv_hidden_sizes", sizes))
    if scale is not None:
        fused.attribute.append(onnx.helper.make_attribute("scale", scale))
    _replace(model, i, chain, fused)


def _sizes(view: GraphView, split: onnx.NodeProto) -> list[int] | None:
    """Widths of Q, K and V."""
    given = attribute(split, "split")
    if given is not None:
        return [int(v) for v in given]  # type: ignore[attr-defined]
    tensor = view.initializers.get(split.input[1]) if len(split.input) > 1 else None
    return None if tensor is None else [int(v) for v in view.model.array(tensor)]


def _replace(model: Model, at: int, gone: Sequence[int], node: onnx.NodeProto) -> None:
    """Put a node in the place of another, and drop some more."""
    nodes = [node if k == at else old for k, old in enumerate(model.proto.graph.node) if k == at or k not in gone]
    kept = [onnx.NodeProto() for _ in nodes]
    for new, old in zip(kept, nodes, strict=True):
        new.CopyFrom(old)
    del model.proto.graph.node[:]
    model.proto.graph.node.extend(kept)
