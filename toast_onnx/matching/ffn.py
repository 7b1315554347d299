"""Feed-forward networks: linear layers joined by nodes that act on each channel alone, in a residual branch."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from toast_onnx.matching.activations import activation_name
from toast_onnx.matching.blocks import Ffn
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.operators import (
    ELEMENTWISE,
    MOVEMENT,
    NORMS,
    PASSING,
    QUANTIZED,
    Effect,
    Trait,
    having,
    operators,
)
from toast_onnx.matching.probe import carried, check_readers
from toast_onnx.reasons import Decline, Kind, Reason

_NORMS = operators(Effect.NORMS, Effect.NORMS_IMAGES)
_REDUCING = operators(Effect.SUMS, Effect.SHARES) | _NORMS
_QDQ = having(Trait.ROUNDS)
_SUMS = operators(Effect.ADDS_AND_NORMS) | {"Add", "Sum"}
_JOINS = _SUMS | {"Concat"}  # a gate on the stream is no part of it


@dataclass
class _Region:
    """Nodes between the entries and fc2.

    Attributes:
        norm: what normalises over the hidden channels, if anything does.
        foreign: a tensor that enters and is made by no linear layer, if one does.
    """

    entries: dict[str, Linear] = field(default_factory=dict)
    nodes: set[int] = field(default_factory=set)
    norm: str | None = None
    foreign: str | None = None


def match_ffn(view: GraphView, facts: Facts, linears: Mapping[str, Linear], fc2: Linear) -> Ffn | None:
    """The feed-forward network that ends in `fc2`; None when nothing of the kind ends there.

    Raises:
        Decline: it looks like one, but its parts do not fit.
    """
    region = _walk_back(view, facts, linears, fc2)
    if region is None:
        return None
    nodes = tuple(sorted(region.nodes))
    entries = tuple(sorted(region.entries.values(), key=lambda e: e.node))
    activation = activation_name(view, facts, nodes)
    if activation is None and any(view.nodes[i].op_type in _QDQ for i in nodes):
        activation = "relu"  # quantizers leave it to the range of the quantized numbers
    if activation is None or not _is_branch(view, facts, region, entries, fc2, activation):
        return None
    stored = next((e.small for e in (*entries, fc2) if e.small is not None), None)
    if stored is not None or any(view.nodes[i].op_type in QUANTIZED for i in nodes):
        why = Kind.QUANTIZED.says("the network is quantized; prune first, then quantize")
        why = why if stored is None else stored.within("the network's weights are {}")
        return Ffn(entries, fc2, nodes, (), {}, {}, activation, why, why)
    convolution = Kind.CONVOLUTION.says("fc1 is a convolution: its inputs are not selected")
    fc1_reason = None if entries[0].channel_axis == -1 else convolution
    if region.norm is not None:
        text = "the hidden width is normalised across channels by {node}"
        reason = None if fc2.channel_axis == -1 else Kind.HIDDEN_NORM.says(text, node=region.norm)
        return Ffn(entries, fc2, nodes, (), {}, {}, activation, fc1_reason, reason, selects_at_exit=True)
    labels = _label(view, facts, nodes, entries)
    units, reason = _units(labels.get(fc2.input, []), entries, fc2)
    axes: dict[str, int] = {}
    unit_of: dict[str, np.ndarray] = {}
    if reason is None:
        try:
            axes, unit_of = _channel_axes(view, labels, units, entries)
            check_readers(view, unit_of, [*nodes, fc2.node], "the hidden activation")
            _check_operands(view, facts, nodes, axes)
        except Decline as e:
            reason = e.reason
    return Ffn(entries, fc2, nodes, units, axes, unit_of, activation, fc1_reason, reason)


def _is_branch(
    view: GraphView, facts: Facts, region: _Region, entries: tuple[Linear, ...], fc2: Linear, activation: str
) -> bool:
    """Whether layers that are joined before fc2 begin in the residual stream that its output joins.

    Raises:
        Decline: only some of them do, or they are joined by an activation and no stream is there.
    """
    where = view.label(fc2.node)
    if region.foreign is None and len({e.input for e in entries}) == 1:
        if _returns_to_residual(view, facts, entries[0].input, fc2.output):
            return True
        text = "the layers before {node} are joined by {activation}, but their output joins no residual stream"
        raise Kind.NO_RESIDUAL.decline(text, node=where, activation=activation)
    if not any(_returns_to_residual(view, facts, e.input, fc2.output) for e in entries):
        return False
    if region.foreign is None:
        raise Kind.JOINED.decline("the layers that are joined before {node} read different tensors", node=where)
    text = "the hidden channels before {node} are joined with '{tensor}'"
    raise Kind.JOINED.decline(text, node=where, tensor=region.foreign)


def _walk_back(view: GraphView, facts: Facts, linears: Mapping[str, Linear], fc2: Linear) -> _Region | None:
    region = _Region()
    pending = [fc2.input]
    while pending:
        tensor = pending.pop()
        if tensor in linears:
            region.entries[tensor] = linears[tensor]
            continue
        i = view.producer.get(tensor)
        if i is None:
            region.foreign = tensor
            continue
        if i in region.nodes:
            continue
        node = view.nodes[i]
        if not _acts_per_channel(view, facts, i):
            if node.op_type not in _REDUCING:
                return None
            region.norm = view.label(i)
        region.nodes.add(i)
        pending.extend(
            name for name in node.input if name and facts.value(name) is None and not facts.is_constant(name)
        )
    return region if region.entries else None


def _acts_per_channel(view: GraphView, facts: Facts, i: int) -> bool:
    node = view.nodes[i]
    if node.domain == "com.microsoft":
        return node.op_type in ELEMENTWISE
    if not is_standard(node):
        return False
    if node.op_type == "Conv":
        weight = facts.shape(node.input[1])
        return bool(weight) and attribute(node, "group", 1) == weight[0] and weight[1] == 1  # type: ignore[index]
    if node.op_type == "BatchNormalization":
        return True
    return node.op_type in ELEMENTWISE | MOVEMENT | _QDQ


def _label(
    view: GraphView, facts: Facts, nodes: tuple[int, ...], entries: tuple[Linear, ...]
) -> dict[str, list[np.ndarray]]:
    """Run channel numbers through the region.

    Returns:
        Tensor name -> label arrays, one for each different channel that an element is made of. Labels are
        1 + offset of the entry + channel; 0 is no channel.
    """
    labels: dict[str, list[np.ndarray]] = {}
    offset = 1
    for entry in entries:
        shape = facts.shape(entry.output)
        if shape is None:
            raise Kind.SHAPE.decline("the shape of the tensor '{tensor}' cannot be inferred", tensor=entry.output)
        view_shape = [1] * len(shape)
        view_shape[entry.channel_axis] = -1
        numbers = np.arange(offset, offset + entry.out_features, dtype=np.int32).reshape(view_shape)
        labels[entry.output] = [np.broadcast_to(numbers, shape)]
        offset += entry.out_features
    for i in nodes:
        node = view.nodes[i]
        if node.op_type in MOVEMENT and is_standard(node):
            _move(view, facts, i, labels)
        elif node.op_type not in _REDUCING - _NORMS:
            parts = [array for name in node.input for array in labels.get(name, [])]
            merged = _distinct([a for a in parts if a.size == max(p.size for p in parts)])
            if merged:
                labels[node.output[0]] = merged
    return labels


def _move(view: GraphView, facts: Facts, i: int, labels: dict[str, list[np.ndarray]]) -> None:
    node = view.nodes[i]
    if node.op_type == "Concat":
        raise view.decline(i, Kind.JOINED, "{node} puts hidden channels together")
    if node.input[0] in labels:
        moved = carried(view, facts, i, labels[node.input[0]])
        labels.update({name: _distinct(arrays) for name, arrays in moved.items()})


def _distinct(arrays: list[np.ndarray]) -> list[np.ndarray]:
    kept: list[np.ndarray] = []
    for array in arrays:
        if not any(a is array or (a.shape == array.shape and np.array_equal(a, array)) for a in kept):
            kept.append(array)
    return kept


def _along(array: np.ndarray, axis: int) -> np.ndarray | None:
    """Values along one axis, None when they differ anywhere else."""
    moved = np.moveaxis(array, axis, -1)
    line = moved[(0,) * (array.ndim - 1)]
    return line if bool((moved == line).all()) else None


def _units(
    arrived: list[np.ndarray], entries: tuple[Linear, ...], fc2: Linear
) -> tuple[tuple[np.ndarray, ...], Reason | None]:
    """For every entry (width, parts) its channels that make up each of fc2's inputs."""
    columns = [_along(array, fc2.channel_axis) for array in arrived]
    if not columns or any(c is None or (c == 0).any() for c in columns):
        return (), Kind.UNFOLLOWED.says("its hidden channels cannot be followed from fc1 to fc2")
    table = np.stack([c for c in columns if c is not None], axis=1) - 1  # (width, parts)
    total = sum(e.out_features for e in entries)
    if np.unique(table).size != table.size or table.size != total:
        return (), Kind.HIDDEN_MIXED.says("its hidden channels are mixed between fc1 and fc2")
    units, offset = [], 0
    for entry in entries:
        inside = (table >= offset) & (table < offset + entry.out_features)
        if not (inside == inside[:1]).all():
            return (), Kind.HIDDEN_MIXED.says("its hidden channels are mixed between fc1 and fc2")
        units.append(table[:, inside[0]] - offset)
        offset += entry.out_features
    return tuple(units), None


def _channel_axes(
    view: GraphView,
    labels: Mapping[str, list[np.ndarray]],
    units: tuple[np.ndarray, ...],
    entries: tuple[Linear, ...],
) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Axis of the hidden channels in every tensor between, and the unit at each position of it."""
    owner = np.full(1 + sum(e.out_features for e in entries), -1, np.int64)
    offset = 1
    for entry, table in zip(entries, units, strict=True):
        for part in range(table.shape[1]):
            owner[offset + table[:, part]] = np.arange(table.shape[0])
        offset += entry.out_features
    axes: dict[str, int] = {}
    unit_of: dict[str, np.ndarray] = {}
    for name, arrays in labels.items():
        for axis in range(arrays[0].ndim):
            found = _along(arrays[0], axis)
            if found is not None and found.size > 1 and (found != found[0]).any():
                axes[name], unit_of[name] = axis, owner[found]
                break
        else:
            producer = view.producer_of(name)
            raise Kind.HIDDEN_MIXED.decline(
                "the hidden channels are spread over several axes by '{tensor}'",
                tensor=producer.name if producer else name,
            )
        if (unit_of[name] < 0).any():
            raise Kind.UNFOLLOWED.decline("its hidden channels cannot be followed from fc1 to fc2")
    return axes, unit_of


def _check_operands(view: GraphView, facts: Facts, nodes: tuple[int, ...], axes: Mapping[str, int]) -> None:
    """Whatever else enters the region must not depend on the channel, unless it is a constant that can be sliced."""
    for i in nodes:
        node = view.nodes[i]
        if node.op_type in MOVEMENT or node.output[0] not in axes:
            continue
        rank = len(facts.shape(node.output[0]) or ())
        from_right = rank - axes[node.output[0]]
        for name in node.input:
            if not name or name in axes or facts.is_constant(name):
                continue
            shape = facts.shape(name)
            if shape is None or (len(shape) >= from_right and shape[-from_right] != 1):
                raise view.decline(i, Kind.JOINED, "{node} joins the hidden channels with '{tensor}'", tensor=name)


def _returns_to_residual(view: GraphView, facts: Facts, source: str, output: str) -> bool:
    """Whether `output`, alone or summed with parallel branches, is added to a tensor that `source` was made from."""
    pending, seen = [output], set()
    while pending:
        name = pending.pop()
        for i in view.consumers.get(name, []):
            node = view.nodes[i]
            others = [t for t in node.input if t and t != name and not facts.is_constant(t) and facts.value(t) is None]
            if i in seen or not _keeps_stream(node.op_type) or (others and node.op_type not in _JOINS):
                continue
            seen.add(i)
            addends = [a for t in others for a in _addends(view, t, view.producer.get(source, -1))]
            if node.op_type in _SUMS and any(_is_ancestor(view, a, source) for a in addends):
                return True
            pending.extend(node.output)
    return False


def _addends(view: GraphView, tensor: str, floor: int) -> list[str]:
    """A tensor, and what it is a sum of behind a position: a parallel branch may have joined the stream before."""
    found, pending = list[str](), [tensor]
    while pending:
        name = pending.pop()
        found.append(name)
        i = view.producer.get(name, -1)
        if i > floor and view.nodes[i].op_type == "Add":
            pending.extend(view.nodes[i].input)
    return found


def _keeps_stream(op_type: str) -> bool:
    norms = NORMS | operators(Effect.NORMS_IMAGES, Effect.NORMS_CHANNELS)
    return op_type in MOVEMENT | PASSING | _QDQ | _SUMS | norms | {"Mul", "Div", "ReduceSum"}


def _is_ancestor(view: GraphView, ancestor: str, tensor: str) -> bool:
    """Whether `tensor` is `ancestor`, computed from it, or made by the same node (a fused sum and norm)."""
    floor = view.producer.get(ancestor, -1)
    heap: list[int] = []
    seen: set[int] = set()
    names = {tensor}
    while True:
        if ancestor in names or floor in {view.producer.get(name) for name in names}:
            return True
        for name in names:
            i = view.producer.get(name)
            if i is not None and i > floor and i not in seen:
                seen.add(i)
                heapq.heappush(heap, -i)
        if not heap:
            return False
        names = set(view.nodes[-heapq.heappop(heap)].input)
