"""Taking whole heads out of a graph: smaller layers, and everything between them cut to the heads that stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import GraphEdit
from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention
from toast_onnx.matching.facts import Facts, Probe
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.head_region import HeadRegion
from toast_onnx.rewriting.attention import head_weights, rewrite_attention
from toast_onnx.rewriting.shapes import keep_own_shapes
from toast_onnx.rewriting.shrinking import shrunk_operand
from toast_onnx.solving.weights import AttentionWeights, ProjWeights

#: Attributes that hold the number of heads.
_COUNTS = frozenset({"num_heads", "q_num_heads", "kv_num_heads"})


def in_two_steps(
    view: GraphView, facts: Facts, attention: Attention, new: AttentionWeights
) -> tuple[AttentionWeights, AttentionWeights | None]:
    """Weights to write while heads go, and those that follow in the graph without them.

    A rotary embedding or a fused node is cut for heads and for dimensions, which are changes of the same nodes. So
    heads go first, with every dimension as it was; a pair of layers that loses dimensions, too, is written again.

    Args:
        view: the original graph.
        facts: its facts.
        attention: the matched attention.
        new: new weights, some heads missing.

    Returns:
        Weights with all dimensions for the first step. What is left for the second, or None where nothing is.
    """
    q, k, v, proj = new.q, new.k, new.v, new.proj
    assert q is not None
    assert k is not None
    assert v is not None
    assert proj is not None
    assert attention.q is not None
    assert attention.k is not None
    assert attention.v is not None
    qk_later, vo_later = q.kept < attention.qk_dim, v.kept < attention.vo_dim
    first, later = new, AttentionWeights()
    if qk_later:
        old_q, old_k = (head_weights(view, facts, b).only(q.heads) for b in (attention.q, attention.k))
        first = AttentionWeights(old_q, old_k, first.v, first.proj)
        later = AttentionWeights(q, k)
    if vo_later:
        old_v = head_weights(view, facts, attention.v).only(v.heads)
        # zeros: the projection of the first step is never run
        empty = ProjWeights(np.zeros((*old_v.bias.shape, proj.weight.shape[2]), proj.weight.dtype), proj.bias)
        first = AttentionWeights(first.q, first.k, old_v, empty)
        later = AttentionWeights(later.q, later.k, v, proj)
    return first, (later if qk_later or vo_later else None)


def drop_heads(edit: GraphEdit, probe: Probe, attention: Attention, new: AttentionWeights, name: str) -> None:
    """Replace the layers of an attention by those of the heads that stay, all their dimensions kept.

    Args:
        edit: graph edit.
        probe: the graph and its facts.
        attention: the matched attention; its heads can be dropped.
        new: weights of all four layers for the heads that stay.
        name: module path for new names.
    """
    facts, other = probe.facts, probe.other
    region = attention.head_region
    assert region is not None
    assert new.v is not None
    assert new.v.heads is not None
    rewrite_attention(edit, probe, attention, new, name)
    for i in region.nodes:
        _cut_node(edit, probe, region, attention.num_heads, new.v.heads, i)
    for tensor, where in region.axes.items():
        # an extent of heads and a dynamic axis together is read by nothing: matching saw to that
        fixed = (facts.shape(tensor) or ())[where.axis] == (other.shape(tensor) or ())[where.axis]
        if tensor not in edit.changed and fixed:
            keep_own_shapes(edit, probe, [tensor])


def _cut_node(
    edit: GraphEdit,
    probe: Probe,
    region: HeadRegion,
    heads: int,
    kept: np.ndarray,
    i: int,
) -> None:
    """Cut what a node says of the number of heads; one that says nothing stays untouched."""
    view, facts = probe.view, probe.facts
    node = edit.copy(i)
    for k, where in ((k, axis) for (n, k), axis in region.operands.items() if n == i):
        stays = where.stays((facts.shape(node.input[k]) or ())[where.axis], heads, kept)
        node.input[k] = shrunk_operand(edit, facts, i, node.input[k], where.axis, stays)
    for a in node.attribute:
        if a.name in _COUNTS and a.i == heads:
            a.i = kept.size
    if node.op_type in ("Reshape", "Expand"):
        rank = len(facts.shape(node.output[0]) or ())
        target = facts.value(node.input[1])
        if target is None:
            raise MatchError(f"the target shape of {view.label(i)} depends on the input's contents")
        place = region.axes[node.output[0]].axis - (rank - target.size)
        if place >= 0 and target[place] > 1:
            node.input[1] = _cut_target(edit, probe, node, place, heads, kept.size, i)
    if node != view.nodes[i]:
        edit.replace(i, node)


def _cut_target(edit: GraphEdit, probe: Probe, node: onnx.NodeProto, place: int, heads: int, kept: int, at: int) -> str:
    """A shape operand with one extent, a multiple of the old number of heads, made one of the new number."""
    facts, other = probe.facts, probe.other
    name, target, elsewhere = node.name or node.output[0], facts.value(node.input[1]), other.value(node.input[1])
    assert target is not None
    here = np.arange(target.size) == place
    if elsewhere is not None and np.array_equal(target, elsewhere):
        return edit.constant(f"{name}/shape", np.where(here, target // heads * kept, target).astype(np.int64))
    per_head = edit.constant(f"{name}/heads", np.where(here, heads, 1).astype(np.int64))
    left = edit.constant(f"{name}/kept_heads", np.where(here, kept, 1).astype(np.int64))
    each = edit.emit(at, "Div", [node.input[1], per_head], edit.fresh(f"{name}/by_head"), f"{name}/Div")
    return edit.emit(at, "Mul", [each, left], edit.fresh(f"{name}/shape"), f"{name}/Mul")
