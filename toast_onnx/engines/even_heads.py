"""Attention whose queries and keys are of another width than its values, padded with zeros to one width.

Fused attention kernels have one head size for Q, K and V. Zero columns in the weights of Q and K add nothing to a
score, zero columns of V and zero rows of the output projection nothing to the output, and the scale keeps its number:
the result is exact. Where the weights cannot be reached, what the attention reads is padded, and its output cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from toast_onnx.edit import GraphEdit
from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention
from toast_onnx.matching.cores import Core, find_cores
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.matching.input_shapes import counted_shapes
from toast_onnx.matching.linear import bias, weights
from toast_onnx.matching.study import Study, study
from toast_onnx.model import Model
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.widths import fused_head_dim
from toast_onnx.rewriting.attention import head_weights
from toast_onnx.rewriting.rewrite import rewritten
from toast_onnx.solving.weights import AttentionWeights, BlockWeights, HeadWeights, ProjWeights


@dataclass(frozen=True)
class UnevenHeads:
    """An attention with two widths.

    Attributes:
        node: name of its weighted sum.
        qk_dim: dimensions of a head's queries and keys.
        vo_dim: dimensions of a head's values.
    """

    node: str
    qk_dim: int
    vo_dim: int

    @property
    def size(self) -> int | None:
        """The width that both are padded to; None where no fused kernel is as wide."""
        return fused_head_dim(max(self.qk_dim, self.vo_dim))


@dataclass(frozen=True)
class Evened:
    """A model with its uneven attentions padded.

    Attributes:
        model: the new model; the same one where nothing was padded.
        padded: the attentions that have one width now.
        left: those that do not: too wide for a fused kernel, or of a form that is not understood.
        macs: multiply-accumulates of the model as it came, and padded.
    """

    model: Model
    padded: tuple[UnevenHeads, ...]
    left: tuple[UnevenHeads, ...]
    macs: tuple[int, int]


def uneven_heads(view: GraphView, facts: Facts) -> list[tuple[Core, UnevenHeads]]:
    """The attention cores of a graph whose queries and values have different widths."""
    found = []
    for core in find_cores(view, facts)[0]:
        dims = _widths(view, facts, core)
        if dims is not None and dims[0] != dims[1]:
            node = view.nodes[core.av]
            found.append((core, UnevenHeads(node.name or node.output[0], *dims)))
    return found


def even_heads(model: Model, given: Mapping[str, Sequence[int]] | None = None) -> Evened:
    """Pad every uneven attention to the next width that a fused kernel has.

    Args:
        model: the model; it is not changed.
        given: concrete shapes of inputs, for axes that are symbolic.

    Raises:
        ModelError: a shape contradicts the model, or the graph does not fit any shapes tried.
    """
    view = GraphView(model)
    facts = counted_shapes(view, given or {}).facts
    uneven = [u for _, u in uneven_heads(view, facts)]
    before = graph_macs(view, facts)
    if all(u.size is None for u in uneven):
        return Evened(model, (), tuple(uneven), (before, before))
    result = _by_nodes(_by_weights(study(model, given)), given)
    view = GraphView(result)
    facts = counted_shapes(view, given or {}).facts
    left = [u for _, u in uneven_heads(view, facts)]
    padded = list(uneven)
    for same in left:
        if same in padded:
            padded.remove(same)
    return Evened(result, tuple(padded), tuple(left), (before, graph_macs(view, facts)))


def _by_weights(found: Study) -> Model:
    """Zeros into the weights, wherever no node between a layer and the scores would see them."""
    new: dict[int, BlockWeights] = {}
    for block in found.match.blocks:
        attention = block.attention
        if attention is None or attention.qk_dim == attention.vo_dim:
            continue
        size = fused_head_dim(max(attention.qk_dim, attention.vo_dim))
        padded = None if size is None else _padded(found, attention, size)
        if padded is not None:
            new[block.index] = BlockWeights(padded)
    try:
        return rewritten(found, new) if new else found.source
    except MatchError:  # a layer holds more than is understood
        return found.source


def _padded(found: Study, attention: Attention, size: int) -> AttentionWeights | None:
    """The weights of an attention with both widths `size`; None where they cannot be reached."""
    q, k, v, proj = attention.q, attention.k, attention.v, attention.proj
    if q is None or k is None or v is None or proj is None or attention.cosine or attention.regions or attention.side:
        return None
    if attention.grouped:
        return None
    if attention.core.kind not in ("matmul", "attention") or attention.qk_reason or attention.vo_reason:
        return None
    view, facts = found.view, found.facts
    new = AttentionWeights()
    if attention.qk_dim < size:
        both = [_wider(head_weights(view, facts, branch), size) for branch in (q, k)]
        new = replace(new, q=both[0], k=both[1])
    if attention.vo_dim < size:
        wo = weights(view, facts, proj.linear)[proj.layout.channels]  # (num_heads, vo_dim, out_features)
        bo = bias(view, facts, proj.linear)
        rows = np.pad(wo, ((0, 0), (0, size - wo.shape[1]), (0, 0)))
        values = _wider(head_weights(view, facts, v), size)
        new = replace(new, v=values, proj=ProjWeights(rows, np.zeros(wo.shape[2], wo.dtype) if bo is None else bo))
    return new


def _wider(old: HeadWeights, size: int) -> HeadWeights:
    """Weights (in_features, num_heads, d) and bias (num_heads, d) with zeros behind, up to `size` dimensions."""
    more = size - old.kept
    slots = np.broadcast_to(np.arange(size), (old.bias.shape[0], size))
    return HeadWeights(np.pad(old.weight, ((0, 0), (0, 0), (0, more))), np.pad(old.bias, ((0, 0), (0, more))), slots)


def _by_nodes(model: Model, given: Mapping[str, Sequence[int]] | None) -> Model:
    """Zeros behind what the attentions read that are still uneven."""
    view = GraphView(model)
    facts = counted_shapes(view, given or {}).facts
    found = [(core, u) for core, u in uneven_heads(view, facts) if u.size is not None]
    if not found or model.opset < 13:  # Pad takes its amounts as an input from 11 on, Slice all types from 13 on
        return model
    edit = GraphEdit(view)
    for core, uneven in found:
        _pad_core(edit, facts, core, uneven)
    return edit.apply()


def _pad_core(edit: GraphEdit, facts: Facts, core: Core, uneven: UnevenHeads) -> None:
    assert uneven.size is not None
    given = {core.k: core.k_dim_axis, core.q: -1} if uneven.qk_dim < uneven.size else {}
    wider: dict[int, dict[str, tuple[int, int]]] = {core.qk: {n: (a, uneven.qk_dim) for n, a in given.items()}}
    if uneven.vo_dim < uneven.size:
        wider.setdefault(core.av, {})[core.v] = (-1, uneven.vo_dim)
    for i, operands in wider.items():
        node = edit.copy(i)
        base = node.name or node.output[0]
        for k, tensor in enumerate(node.input):
            if tensor in operands and k < 3:
                axis, dim = operands[tensor]
                pads = np.zeros((2, len(facts.shape(tensor) or ())), np.int64)
                pads[1, axis] = uneven.size - dim
                amounts = edit.constant(f"{base}/pads", pads.reshape(-1))
                node.input[k] = edit.emit(i, "Pad", [tensor, amounts], edit.fresh(f"{base}/padded"), f"{base}/Pad")
        if core.kind == "attention" and not float(attribute(node, "scale", 0.0)):  # type: ignore[arg-type]
            node.attribute.append(onnx.helper.make_attribute("scale", uneven.qk_dim**-0.5))
        edit.replace(i, node)
        if i == core.av and uneven.vo_dim < uneven.size:
            context = node.output[0]
            node.output[0] = edit.fresh(f"{base}/wide")
            ends = [edit.constant(f"{base}/{n}", np.asarray([v])) for n, v in _cut(uneven.vo_dim).items()]
            edit.emit(i, "Slice", [node.output[0], *ends], context, f"{base}/Slice")


def _cut(size: int) -> dict[str, int]:
    """Inputs of a Slice that keeps the first `size` of the last axis."""
    return {"starts": 0, "ends": size, "axes": -1}


def _widths(view: GraphView, facts: Facts, core: Core) -> tuple[int, int] | None:
    """(d_qk, d_vo) of a core whose operands hold one head's dimensions on an axis of their own; None of others."""
    q, v = facts.shape(core.q), facts.shape(core.v)
    if core.kind in ("mha", "gqa") or core.heads is not None or q is None or v is None:
        return None
    if core.kind == "matmul" and any(view.nodes[i].op_type != "MatMul" for i in (core.qk, core.av)):
        return None
    return q[-1], v[-1]
