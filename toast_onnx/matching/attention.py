"""From an attention core to its linear layers: Q, K and V behind it, the output projection in front of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from toast_onnx.matching.blocks import Attention, Branch
from toast_onnx.matching.cores import Core
from toast_onnx.matching.cosine import length_division
from toast_onnx.matching.dims import DimRegion, Operand, match_dims
from toast_onnx.matching.droppable_heads import match_heads
from toast_onnx.matching.facts import Facts, Probe
from toast_onnx.matching.flattening import before_flattening
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.groups import shared_heads
from toast_onnx.matching.head_norms import HeadNorm, match_norm
from toast_onnx.matching.layout import Layout, check_spelling, invert_labels, read_layout
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.probe import Walk, before_repeats, check_readers, propagate, walk_back, walk_forward
from toast_onnx.matching.value_side import SidePath, find_side, match_side
from toast_onnx.reasons import Decline, Kind, Reason

Outcome = tuple[Branch | None, Reason | None]


def match_attention(probe: Probe, linears: Mapping[str, Linear], core: Core) -> Attention:
    """Find the linear layers of an attention core.

    Args:
        probe: the graph and its facts.
        linears: the graph's linear layers by output.
        core: the attention core.

    Raises:
        Decline: the operands' shapes are unknown.
    """
    view, facts = probe.view, probe.facts
    q_shape, v_shape, k_shape = facts.shape(core.q), facts.shape(core.v), facts.shape(core.k)
    if q_shape is None or v_shape is None or k_shape is None:
        raise Kind.SHAPE.decline("the shapes of the attention's operands cannot be inferred")
    walks: dict[str, Walk] = {}
    reasons: dict[str, Reason] = {}
    for name, tensor in (("Q", core.q), ("K", core.k), ("V", core.v)):
        try:
            walks[name] = walk_back(view, facts, linears, tensor, name)
            _same_scale(probe, linears, tensor, name, walks[name])
            if name != "Q":
                walks[name] = before_repeats(view, facts, walks[name], name)
        except Decline as e:
            reasons[name] = e.reason
    path = find_side(view, facts, walks["V"].linear, core.context) if "V" in walks else None
    if path is not None:
        try:
            return _with_layouts(probe, linears, core, walks, reasons, path)
        except Decline as e:
            found = _with_layouts(probe, linears, core, walks, reasons, None)
            return replace(found, vo_reason=found.vo_reason.then(e.reason) if found.vo_reason else e.reason)
    return _with_layouts(probe, linears, core, walks, reasons, None)


def _with_layouts(
    probe: Probe,
    linears: Mapping[str, Linear],
    core: Core,
    found_walks: Mapping[str, Walk],
    reasons: Mapping[str, Reason],
    path: SidePath | None,
) -> Attention:
    """The attention behind the ways that were found.

    Raises:
        Decline: what is made of the values beside the weighted sum is not understood; without `path` never.
    """
    view, facts = probe.view, probe.facts
    beside = frozenset[int]() if path is None else path.readers
    walks = dict(found_walks)
    for name in walks:
        walks[name] = _before_outsiders(view, facts, core, walks, name, beside)
    outcomes = {name: _operand(probe, core, name, walks, reasons, beside) for name in ("Q", "K", "V")}
    _complete_layers(outcomes)
    proj, proj_reason = _projection(probe, core, linears, None if path is None else path.total)
    (q, _), (k, _), (v, v_reason) = (outcomes[n] for n in "QKV")
    between = _between(view, facts, core, outcomes)
    k, qk_groups, qk_misfit = _shared(view, facts, core, k, "K", q, bool(between.regions))
    v, vo_groups, vo_misfit = _shared(view, facts, core, v, "V", proj, False)
    between = between if qk_misfit is None else _Between(qk_misfit)
    vo_reason = vo_misfit or v_reason or proj_reason
    side = None
    if path is not None:
        if v is None or proj is None or vo_reason is not None:
            raise Decline(vo_reason or Kind.NO_LAYER.says("V and the output projection were not found"))
        allowed = {i for w in walks.values() for i in w.nodes} | set(core.nodes) | beside
        side = match_side(probe, path, v, proj, allowed)
    q_shape, v_shape = facts.shape(core.q) or (), facts.shape(core.v) or ()
    found = Attention(
        core,
        q,
        k,
        v,
        proj,
        num_heads=_num_heads(core, q_shape, [b for b in (q, proj, k, v) if b is not None]),
        qk_dim=q_shape[-1] // (core.heads or 1),
        vo_dim=v_shape[-1] // (core.kv_heads or 1),
        qk_reason=between.reason,
        vo_reason=vo_reason,
        divisions=between.divisions,
        regions=between.regions,
        units=between.units,
        side=side,
        norms=between.norms,
        qk_groups=qk_groups,
        vo_groups=vo_groups,
    )
    return _with_heads(probe, found)


def _with_heads(probe: Probe, found: Attention) -> Attention:
    """An attention with what handles all its heads, or with the reason why whole heads cannot be dropped."""
    if found.grouped:
        return replace(found, heads_reason=Kind.GROUPED.says("several heads of queries share keys or values"))
    if found.side is not None:
        text = "the values are also convolved beside the attention, all heads at once"
        return replace(found, heads_reason=Kind.CONVOLVED.says(text))
    try:
        return replace(found, head_region=match_heads(probe, found))
    except Decline as e:
        return replace(found, heads_reason=e.reason)


def _num_heads(core: Core, q_shape: Sequence[int], branches: Sequence[Branch]) -> int:
    """Heads of a layer whose every channel was followed; else the core's own, which may lie folded in the batch."""
    followed = [b.layout.num_heads for b in branches if b.walk.blocked is None]
    before = [b.layout.num_heads for b in branches if b.walk.blocked is not None]
    own = [core.heads] if core.heads else [q_shape[-3]] if len(q_shape) > 3 else []
    return [*followed, *own, *before, 1][0]


@dataclass(frozen=True)
class _Between:
    """What lies between queries and keys and the scores, as `Attention` has it; nothing where there is a reason."""

    reason: Reason | None = None
    divisions: tuple[tuple[int | None, int], ...] = ()
    norms: tuple[HeadNorm, ...] = ()
    regions: tuple[DimRegion, ...] = ()
    units: np.ndarray | None = None


def _between(view: GraphView, facts: Facts, core: Core, outcomes: Mapping[str, Outcome]) -> _Between:
    """Look into what blocks queries and keys.

    layer -> [movement] -> target -> [division by length | dimensions, singly or in pairs | norm, dimensions] -> core
    """
    (q, q_reason), (k, k_reason), (v, _) = (outcomes[n] for n in "QKV")
    # Learned queries are an obstacle beside one of the keys alone; and where no layer of the keys was found, what
    # reads the queries of a packed layer besides may be on the way to them.
    read = q_reason is not None and q_reason.kind is Kind.READ
    keys_first = facts.is_constant(core.q) or (read and k is None)
    blocked = (k_reason or q_reason) if keys_first else (q_reason or k_reason)
    if blocked is None or q is None or k is None or (q_reason, k_reason) != (q.walk.blocked, k.walk.blocked):
        return _Between(blocked)
    if divisions := _length_divisions(view, facts, core, q, k):
        return _Between(divisions=divisions)
    branches = [q, k] if v is None else [q, k, v]
    try:
        regions, units = _regions(view, facts, core, branches)
        return _Between(regions=regions, units=units)
    except Decline as e:
        no_regions = e
    try:
        norms, regions, units = _behind_norms(view, facts, core, branches)
        return _Between(norms=norms, regions=regions, units=units)
    except Decline as no_norms:
        half = facts.elem_type(q.walk.target) != onnx.TensorProto.FLOAT
        return _Between(blocked.then((no_norms if half else no_regions).reason))


def _shared(
    view: GraphView, facts: Facts, core: Core, branch: Branch | None, name: str, whole: Branch | None, bent: bool
) -> tuple[Branch | None, np.ndarray | None, Reason | None]:
    """The branch of K or V, whose head each head of the queries has, and why that is not understood."""
    if branch is None or whole is None:
        return branch, None, None
    try:
        return *shared_heads(view, facts, core, branch, name, whole.layout, bent), None
    except Decline as e:
        return branch, None, e.reason


def _regions(
    view: GraphView, facts: Facts, core: Core, branches: Sequence[Branch]
) -> tuple[tuple[DimRegion, ...], np.ndarray]:
    """What lies between queries and keys and the scores, where it acts on dimensions singly or in pairs."""
    q, k = branches[:2]
    found, units = _regions_from(view, facts, core, branches, q.walk.target, k.walk.target)
    between = [r for r, b in zip(found, (q, k), strict=True) if b.walk.ends_early]
    return tuple(between), units


def _regions_from(
    view: GraphView, facts: Facts, core: Core, branches: Sequence[Branch], q: str, k: str
) -> tuple[tuple[DimRegion, ...], np.ndarray]:
    """What lies between two tensors, of queries and of keys, and the scores."""
    operands = [Operand("Q", q, core.q, -1), Operand("K", k, core.k, core.k_dim_axis)]
    layers = [b.linear.output for b in branches]
    return match_dims(view, facts, core.nodes, operands, layers, branches[0].layout.head_dim)


def _behind_norms(
    view: GraphView, facts: Facts, core: Core, branches: Sequence[Branch]
) -> tuple[tuple[HeadNorm, ...], tuple[DimRegion, ...], np.ndarray]:
    """Norms of queries and keys, and what lies between them and the scores."""
    norms = tuple(match_norm(view, facts, core.nodes, b.walk.target) for b in branches[:2])
    if any(norm.gain.size != branches[0].layout.head_dim for norm in norms):
        raise Kind.NORM.decline("the norm runs over more than the dimensions of a head")
    found, units = _regions_from(view, facts, core, branches, norms[0].end, norms[1].end)
    return norms, tuple(replace(region, plain=False) for region in found), units


def _length_divisions(
    view: GraphView, facts: Facts, core: Core, q: Branch | None, k: Branch | None
) -> tuple[tuple[int | None, int], ...]:
    """The divisions by length in front of a cosine attention's core; empty for any other attention."""
    if q is None or k is None or q.walk.blocked is None or k.walk.blocked is None:
        return ()
    found = [length_division(view, facts, b.walk.target, o) for b, o in ((q, core.q), (k, core.k))]
    return tuple(f for f in found if f is not None) if all(f is not None for f in found) else ()


def _same_scale(probe: Probe, linears: Mapping[str, Linear], tensor: str, name: str, walk: Walk) -> None:
    view, other = probe.view, probe.other
    if walk.scale != walk_back(view, other, linears, tensor, name).scale:
        raise Kind.SCALE.decline("the scale of {part} changes with the input's shape", part=name)


def _operand(
    probe: Probe,
    core: Core,
    name: str,
    walks: Mapping[str, Walk],
    reasons: Mapping[str, Reason],
    beside: frozenset[int],
) -> Outcome:
    view, facts = probe.view, probe.facts
    if name in reasons:
        return None, reasons[name]
    walk = walks[name]
    heads = core.heads if name == "Q" else core.kv_heads
    dim_axis = core.k_dim_axis if name == "K" and not walk.ends_early else -1
    if walk.ends_early:
        dim_axis = _dim_axis_at(view, facts, walk) if name == "V" else -1
        heads = _heads_at(facts, core, walk.target, name, dim_axis)
    try:
        layout = _layout(probe, walk, walk.linear.output, walk.target, dim_axis, heads, name)
        if before_flattening(view, facts, walk.linear, layout) is None:
            check_spelling(layout, name)
        # A packed layer feeds Q, K and V: readers on the way of any of them are expected.
        shared = [w for w in walks.values() if w.linear.output == walk.linear.output]
        ends = {w.target for w in shared if w.ends_early}
        labelled = propagate(view, facts, walk.nodes, walk.linear.output)
        allowed = {i for w in shared for i in w.nodes} | set(core.nodes) | beside
        check_readers(view, [t for t in labelled if t not in ends], allowed, name)
    except Decline as e:
        return None, walk.blocked or e.reason
    return Branch(walk, layout), walk.blocked


def _complete_layers(outcomes: dict[str, Outcome]) -> None:
    """Decline what shares a layer with channels that are not understood: they could not be carried along (in place)."""
    for name, (branch, _) in list(outcomes.items()):
        if branch is None:
            continue
        partners = [b for b, _ in outcomes.values() if b is not None and b.linear.output == branch.linear.output]
        if sum(b.layout.channels.size for b in partners) != branch.linear.out_features:
            others = "; ".join(str(reason) for b, reason in outcomes.values() if b is None and reason is not None)
            text = "{part}: its layer also makes channels that are not understood ({others})"
            outcomes[name] = branch, Kind.PACKED.says(text, part=name, others=others or "none of Q, K and V")


def _before_outsiders(
    view: GraphView, facts: Facts, core: Core, walks: Mapping[str, Walk], name: str, beside: frozenset[int]
) -> Walk:
    """End a walk where something besides the core and `beside` reads the operand: its partners can still be pruned."""
    walk = walks[name]
    if walk.ends_early:
        return walk
    shared = [w for w in walks.values() if w.linear.output == walk.linear.output]
    allowed = {i for w in shared for i in w.nodes} | set(core.nodes) | beside
    ends = {w.target for w in shared if w.ends_early}
    own = _on_the_way(view, walk, set(propagate(view, facts, walk.nodes, walk.linear.output)))
    for tensor in sorted(own - ends, key=lambda t: view.producer[t]):
        outside = [i for i in view.readers(tensor) if i not in allowed]
        if outside and tensor != walk.linear.output:
            before = tuple(i for i in walk.nodes if i <= view.producer[tensor])
            reason = Kind.READ.says("{part} is also read by {node}", part=name, node=view.label(outside[0]))
            return Walk(walk.linear, tensor, before, 1.0, reason)
    return walk


def _on_the_way(view: GraphView, walk: Walk, labelled: set[str]) -> set[str]:
    """Those labelled tensors that lead to the walk's target; a split's other parts do not."""
    found: set[str] = set()
    pending = [walk.target]
    while pending:
        tensor = pending.pop()
        if tensor in found or tensor not in labelled:
            continue
        found.add(tensor)
        i = view.producer.get(tensor)
        if i in walk.nodes:
            pending.extend(view.nodes[i].input)
    return found


def _dim_axis_at(view: GraphView, facts: Facts, walk: Walk) -> int:
    """Axis (negative) along which channels, and nothing else, change at the end of a walk: the last such one."""
    labels = propagate(view, facts, walk.nodes, walk.linear.output).get(walk.target)
    shape = facts.shape(walk.linear.output)
    if labels is None or shape is None:
        return -1
    step = int(np.prod(shape[walk.linear.channel_axis % len(shape) + 1 :]))  # of the labels, between channels
    for axis in range(-1, -labels.ndim - 1, -1):
        if labels.shape[axis] > 1 and (np.diff(labels, axis=axis) == step).all():
            return axis
    return -1


def _heads_at(facts: Facts, core: Core, tensor: str, name: str, axis: int) -> int | None:
    """Number of heads when `tensor`, met before the core, holds heads and dimensions on one axis; else None."""
    operand = facts.shape(core.q if name == "Q" else core.k if name == "K" else core.v) or ()
    dim = operand[core.k_dim_axis] if name == "K" else operand[-1]
    dim //= (core.heads if name == "Q" else core.kv_heads) or 1
    width = (facts.shape(tensor) or (0,))[axis]
    return width // dim if width > dim and width % dim == 0 else None


def _layout(
    probe: Probe,
    walk: Walk,
    source: str,
    target: str,
    dim_axis: int,
    heads: int | None,
    what: str,
) -> Layout:
    view, facts, other = probe.view, probe.facts, probe.other
    labels = propagate(view, facts, walk.nodes, source)
    shape, other_shape, other_target = facts.shape(source), other.shape(source), other.shape(target)
    if target not in labels or shape is None or other_shape is None or other_target is None:
        raise Kind.UNFOLLOWED.decline("the way of {part} from its linear layer cannot be followed", part=what)
    axis = walk.linear.channel_axis % len(shape)
    return read_layout(labels[target], shape, other_shape, other_target, axis, dim_axis, what, heads)


def _projection(probe: Probe, core: Core, linears: Mapping[str, Linear], total: int | None) -> Outcome:
    view, facts, other = probe.view, probe.facts, probe.other
    what = "the attention's output"
    by_input: dict[str, list[Linear]] = {}
    for linear in linears.values():
        by_input.setdefault(linear.input, []).append(linear)
    try:
        walk = walk_forward(view, facts, by_input, core.context, what, total)
        labels = propagate(view, facts, walk.nodes, core.context)
        context, arrived = facts.shape(core.context), facts.shape(walk.target)
        other_context, other_arrived = other.shape(core.context), other.shape(walk.target)
        if context is None or arrived is None or other_context is None or other_arrived is None:
            raise Kind.SHAPE.decline("the shape of {part} cannot be inferred", part=what)
        if walk.target not in labels:
            raise Kind.UNFOLLOWED.decline("the way of {part} to its projection cannot be followed", part=what)
        inverse = invert_labels(labels[walk.target], context, what)
        axis = walk.linear.channel_axis % len(arrived)
        layout = read_layout(inverse, arrived, other_arrived, other_context, axis, -1, what, core.heads)
        check_spelling(layout, what, backwards=True)
        tensors = [name for name in labels if name != walk.target] + [walk.target]
        check_readers(view, tensors, [*walk.nodes, walk.linear.node], what)
    except Decline as e:
        return None, e.reason
    return Branch(walk, layout), None
