"""Writing smaller Q, K, V and output projections into a graph.

Layers that read the same tensor become one MatMul and a Split; the data movement between them and the core is
replaced by one canonical spelling; scales become constants. Scores, masks, position bias and softmax stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import GraphEdit, OldShape, PlaceWriter
from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention, Branch, ValueSide
from toast_onnx.matching.dims import DimRegion
from toast_onnx.matching.facts import Facts, Probe
from toast_onnx.matching.flattening import before_flattening
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.matching.layout import axis_origins
from toast_onnx.matching.linear import Linear, bias, weights
from toast_onnx.matching.probe import propagate
from toast_onnx.rewriting.head_norms import write_norm
from toast_onnx.rewriting.shapes import keep_own_shapes
from toast_onnx.rewriting.shrinking import shrink_node, shrunk_operand
from toast_onnx.rewriting.spelling import collect, spread
from toast_onnx.solving.weights import AttentionWeights, HeadWeights


@dataclass(frozen=True)
class _Part:
    """One operand to write: its branch, its (new or unchanged) weights, and what else reads it."""

    name: str
    branch: Branch
    weights: HeadWeights
    side: ValueSide | None = None

    @property
    def moving(self) -> tuple[int, ...]:
        """Positions of the data movement from the layer to whatever reads its channels."""
        beside = () if self.side is None else self.side.enter
        return tuple(sorted({*self.branch.walk.nodes, *beside}))


def head_weights(view: GraphView, facts: Facts, branch: Branch) -> HeadWeights:
    """The present weights of Q, K or V by head.

    Returns:
        weight (in_features, num_heads, head_dim), bias (num_heads, head_dim; zeros where the layer has none).
    """
    channels = branch.layout.channels
    w = weights(view, facts, branch.linear)
    b = bias(view, facts, branch.linear)
    vector = np.zeros(branch.linear.out_features, w.dtype) if b is None else b
    slots = np.broadcast_to(np.arange(channels.shape[1]), channels.shape)
    return HeadWeights(w[:, channels], vector[channels], slots)


def rewrite_attention(edit: GraphEdit, probe: Probe, attention: Attention, new: AttentionWeights, name: str) -> None:
    """Replace the layers of one attention.

    Args:
        edit: graph edit.
        probe: the graph and its facts.
        attention: the matched attention.
        new: new weights.
        name: module path for new names.

    Raises:
        MatchError: a layer shares weights with an operand that is not understood.
    """
    view, facts = probe.view, probe.facts
    branches = {part: branch for part, branch in attention.branches.items() if part != "proj"}
    changed = {branches[part].linear.output for part in new.heads if part in branches}
    sides = {"v": attention.side}
    parts = [
        _Part(part, branch, new.heads.get(part) or head_weights(view, facts, branch), sides.get(part))
        for part, branch in branches.items()
        if branch.linear.output in changed
    ]
    _write_heads(edit, probe, parts, name)
    if new.q is not None and new.q.kept != attention.qk_dim:
        _freeze_fused_scale(edit, view, attention)
        for expand, division in attention.divisions:
            _divide_unexpanded(edit, view, expand, division)
        assert new.k is not None
        for norm, part, letter in zip(attention.norms, (new.q, new.k), "qk", strict=False):
            write_norm(edit, norm, part, f"{name}/{letter}/norm")
        for region in attention.regions:
            _shrink_region(edit, probe, region, attention, new.q)
        _shrink_repeats(edit, probe, attention.k, new.k)
    _shrink_repeats(edit, probe, attention.v, new.v)
    if new.proj is not None:
        if attention.side is not None:
            _shrink_side(edit, probe, attention.side, new.v, attention.vo_dim)
        _write_projection(edit, probe, attention, new, name)


def _write_heads(edit: GraphEdit, probe: Probe, parts: Sequence[_Part], name: str) -> None:
    view, facts, other = probe.view, probe.facts, probe.other
    by_input: dict[str, list[_Part]] = {}
    for part in parts:
        by_input.setdefault(part.branch.linear.input, []).append(part)
    for group in by_input.values():
        linears = {p.branch.linear.output: p.branch.linear for p in group}
        covered = sum(p.branch.layout.channels.size for p in group)  # dropped heads included
        if covered != sum(linear.out_features for linear in linears.values()):
            raise MatchError(f"{name}: its packed layer holds channels besides Q, K and V that are understood")
        at = min(linear.node for linear in linears.values())
        for linear in linears.values():
            edit.remove(linear.nodes)
        for part in group:
            edit.remove(part.moving)
        packed, outputs = _packed_linear(edit, at, view, facts, group, list(linears.values()), name)
        for part in group:
            linear = part.branch.linear
            labels = propagate(view, facts, part.moving, linear.output)
            labels[view.nodes[linear.node].output[0]] = labels[linear.output]
            _note_changes(edit, other, labels, linear.output, packed, linear.channel_axis)
            if (whole := before_flattening(view, facts, linear, part.branch.layout)) is not None:
                _note_by_extents(edit, probe, labels, whole)
        for part, output in zip(group, outputs, strict=True):
            _write_operand(edit, at, view, facts, part, output, f"{name}/{part.name}")
            if part.side is not None:  # channels first, unlike the core's operand: never the same tensor as that
                beside = spread(edit, at, output, part.side.layout, part.weights.kept, f"{name}/{part.name}/side")
                edit.rename(at, beside, part.side.start)


def _note_by_extents(edit: GraphEdit, probe: Probe, tensors: Iterable[str], whole: str) -> None:
    """Say where shapes of moved tensors can be read that the rows of a layer cannot tell: on the tensor they came from.

    Args:
        tensors: the moved tensors; those already noted stay as they are.
        whole: tensor whose axes the layer's rows merge.
    """
    facts, other = probe.facts, probe.other
    size, other_size = facts.shape(whole) or (), other.shape(whole) or ()
    axes = [k for k, (a, b) in enumerate(zip(size, other_size, strict=False)) if a != b]
    for tensor in tensors:
        shape, elsewhere = facts.shape(tensor), other.shape(tensor)
        if tensor in edit.changed or shape is None or elsewhere is None:
            continue
        origins: list[int | tuple[int, int]] = []
        for a, b in zip(shape, elsewhere, strict=True):
            fitting = [k for k in axes if a % size[k] == 0 and a * other_size[k] == b * size[k]]
            if a == b:
                origins.append(a)
            elif len(fitting) == 1:
                origins.append((fitting[0], a // size[fitting[0]]))
        if len(origins) == len(shape):
            edit.changed[tensor] = OldShape(whole, tuple(origins))


def _note_changes(
    edit: GraphEdit, other: Facts, labels: Mapping[str, np.ndarray], source: str, new: str, axis: int
) -> None:
    """Say where shapes of moved tensors can be read once they are gone.

    Args:
        labels: labels of the moved tensors, `source` among them.
        source: tensor of the original graph that the labels number.
        new: tensor of the new graph with the extents of `source`, but for its channels.
        axis: channel axis of `source`.
    """
    sizes, other_sizes = labels[source].shape, other.shape(source)
    for tensor, array in labels.items():
        elsewhere = other.shape(tensor)
        if elsewhere is None or other_sizes is None:
            continue
        if (origins := axis_origins(array, elsewhere, sizes, other_sizes, axis)) is not None:
            edit.changed[tensor] = OldShape(new, tuple(origins))


def _packed_linear(
    edit: GraphEdit,
    at: int,
    view: GraphView,
    facts: Facts,
    group: Sequence[_Part],
    linears: Sequence[Linear],
    name: str,
) -> tuple[str, list[str]]:
    """One linear layer for all parts of a group; returns its output and the tensor of each part."""
    like = linears[0]
    dtype = weights(view, facts, like).dtype
    flat = [p.weights.weight.reshape(p.weights.weight.shape[0], -1).astype(dtype) for p in group]
    vectors = [p.weights.bias.reshape(-1).astype(dtype) for p in group]
    has_bias = any(linear.bias is not None for linear in linears) or any(v.any() for v in vectors)
    w, b = np.concatenate(flat, axis=1), np.concatenate(vectors) if has_bias else None
    path = f"{name}/{''.join(p.name for p in group)}"
    output = edit.fresh(f"{path}/output")
    edit.linear(at, like, like.input, w, b, output, path)
    if len(group) == 1:
        return output, [output]
    sizes = [f.shape[1] for f in flat]
    names = [edit.fresh(f"{path}/{p.name}") for p in group]
    PlaceWriter(edit, at, path).split(output, sizes, group[0].branch.layout.channel_axis, names)
    return output, names


def _write_operand(
    edit: GraphEdit, at: int, view: GraphView, facts: Facts, part: _Part, tensor: str, name: str
) -> None:
    """Bring one part into the core's layout, scale it, and give it the operand's old name."""
    layout, walk = part.branch.layout, part.branch.walk
    whole = before_flattening(view, facts, walk.linear, layout)
    if part.weights.heads is not None:
        layout = layout.with_heads(part.weights.heads)
    tensor = spread(edit, at, tensor, layout, part.weights.kept, name, whole)
    made, wanted = facts.elem_type(walk.linear.output), facts.elem_type(walk.target)
    if made != wanted:
        tensor = edit.emit(at, "Cast", [tensor], edit.fresh(f"{name}/cast"), f"{name}/Cast", to=wanted)
    if walk.scale != 1.0:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(wanted)
        scale = edit.constant(f"{name}/scale", np.asarray(walk.scale, dtype))
        tensor = edit.emit(at, "Mul", [tensor, scale], edit.fresh(f"{name}/scaled"), f"{name}/Mul")
    edit.rename(at, tensor, walk.target)


def _divide_unexpanded(edit: GraphEdit, view: GraphView, expand: int | None, division: int) -> None:
    """Let a division broadcast the length itself: an Expand would spread it to the old head_dim."""
    if expand is None:
        return
    node = edit.copy(division)
    node.input[1] = view.nodes[expand].input[0]
    edit.remove([expand])
    edit.replace(division, node)


def _shrink_region(
    edit: GraphEdit,
    probe: Probe,
    region: DimRegion,
    attention: Attention,
    q: HeadWeights,
) -> None:
    """Cut everything between a layer and the scores to the dimensions that all heads keep."""
    assert attention.units is not None
    if not (q.slots == q.slots[:1]).all() or q.is_basis:
        raise MatchError("all heads must keep the same dimensions where they share a rotary embedding or a table")
    stays = np.isin(np.arange(attention.units.max() + 1), attention.units[q.slots[0]])
    keep = {tensor: stays[unit] for tensor, unit in region.unit_of.items()}
    for i in region.nodes:
        shrink_node(edit, probe, region.axes, keep, i)
    for table in region.tables:
        node = edit.copy(table.node)
        kept = keep[node.input[1 - table.operand]]
        old = node.input[table.operand]
        node.input[table.operand] = shrunk_operand(edit, probe.facts, table.node, old, table.axis, kept)
        edit.replace(table.node, node)
    keep_own_shapes(edit, probe, region.unit_of)


def _shrink_repeats(edit: GraphEdit, probe: Probe, branch: Branch | None, new: HeadWeights | None) -> None:
    """Cut what repeats heads to the new number of dimensions: they stay in order, whichever they are."""
    if branch is None or branch.repeats is None or new is None:
        return
    region = branch.repeats
    keep = {tensor: unit < new.kept for tensor, unit in region.unit_of.items()}
    for i in region.nodes:
        shrink_node(edit, probe, region.axes, keep, i)
    keep_own_shapes(edit, probe, region.unit_of)


def _shrink_side(edit: GraphEdit, probe: Probe, side: ValueSide, v: HeadWeights | None, dim: int) -> None:
    """Cut what acts on each channel of the values beside the attention."""
    view = probe.view
    assert v is not None
    if v.is_basis:
        raise MatchError("values that are also convolved are pruned by index; a basis would mix their channels")
    stays = np.zeros((v.slots.shape[0], dim), bool)
    np.put_along_axis(stays, v.slots, True, axis=1)
    made = [side.start, *(name for i in side.nodes for name in view.nodes[i].output)]
    axes, keep = dict.fromkeys(made, 1), dict.fromkeys(made, stays.reshape(-1))
    for i in side.nodes:
        shrink_node(edit, probe, axes, keep, i)
    keep_own_shapes(edit, probe, made)


def _freeze_fused_scale(edit: GraphEdit, view: GraphView, attention: Attention) -> None:
    """Fused attention defaults its scale to 1/sqrt(head_dim): write the original number down."""
    core = attention.core
    if core.kind == "matmul":
        return
    node = view.nodes[core.av]
    scale = float(attribute(node, "scale", 0.0) or 0.0)  # type: ignore[arg-type]
    if scale == 0.0:
        edit.set_attribute(core.av, "scale", float(1.0 / np.sqrt(attention.qk_dim)))


def _write_projection(edit: GraphEdit, probe: Probe, attention: Attention, new: AttentionWeights, name: str) -> None:
    view, facts, other = probe.view, probe.facts, probe.other
    branch = attention.proj
    assert branch is not None
    assert new.proj is not None
    assert new.v is not None
    linear, walk, layout = branch.linear, branch.walk, branch.layout
    if new.v.heads is not None:
        layout = layout.with_heads(new.v.heads)
    dtype = weights(view, facts, linear).dtype
    heads, kept, out_features = new.proj.weight.shape
    w = np.asarray(new.proj.weight.reshape(heads * kept, out_features), dtype)
    b = new.proj.bias.astype(dtype)
    edit.remove([*walk.nodes, *linear.nodes])
    at = linear.node
    tensor = collect(edit, at, attention.core.context, layout, kept, f"{name}/proj")
    made, wanted = facts.elem_type(attention.core.context), facts.elem_type(linear.input)
    if made != wanted:
        tensor = edit.emit(at, "Cast", [tensor], edit.fresh(f"{name}/proj/cast"), f"{name}/proj/Cast", to=wanted)
    if attention.side is not None:
        side = attention.side
        edit.remove(side.leave)
        beside = spread(edit, at, side.end, side.exit, kept, f"{name}/proj/side")
        tensor = edit.emit(at, "Add", [tensor, beside], edit.fresh(f"{name}/proj/sum"), f"{name}/proj/Add")
    has_bias = linear.bias is not None or bool(b.any())
    edit.linear(at, linear, tensor, w, b if has_bias else None, linear.output, f"{name}/proj")
    labels = propagate(view, facts, walk.nodes, attention.core.context)
    _note_changes(edit, other, labels, attention.core.context, attention.core.context, -1)
