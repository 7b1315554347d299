"""Where heads lie between Q, K and V and the weighted sum, so that whole heads can be taken out of a graph.

Heads stay apart on that way: scale, mask, position bias, softmax and both products act on each of them alone. Every
tensor there has one axis on which the heads follow each other in equal steps, maybe inside a larger number (batch x
heads); data movement keeps that, and shapes alone tell the new axis. Whatever does not fit is declined.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from toast_onnx.matching.blocks import Attention, Branch
from toast_onnx.matching.facts import Probe, reduced_axes
from toast_onnx.matching.graph import attribute
from toast_onnx.matching.head_region import HeadAxis, HeadRegion
from toast_onnx.matching.layout import HEAD, Layout
from toast_onnx.matching.operators import ELEMENTWISE, MEASURING, REDUCTIONS, RESHAPING, SCORE_TERMS, Effect, operators
from toast_onnx.reasons import Decline, Kind

#: Act along the axes that they name.
_ALONG = operators(Effect.SUMS, Effect.REDUCES, Effect.SHARES) | {
    "Split",
    "Slice",
    "Gather",
    "Concat",
    "LpNormalization",
}
_NORMS = operators(Effect.NORMS) - {"LpNormalization"}  # which runs along one axis


@dataclass(frozen=True)
class _Heads(Probe):
    """What the rules need: the graph, its facts at two shapes, the number of heads, and what is known so far."""

    count: int
    axes: dict[str, HeadAxis]


def match_heads(probe: Probe, attention: Attention) -> HeadRegion:
    """Follow the heads from Q, K and V to the output projection.

    Args:
        probe: the graph and its facts.
        attention: the attention, matched but for its heads.

    Raises:
        Decline: heads cannot be dropped; the message says why.
    """
    view = probe.view
    branches = _branches(attention)
    context = attention.core.context
    starts = {b.walk.target: _head_axis(b.layout, b.walk.target) for b in branches[:3]}
    found = _Heads(view, probe.facts, probe.other, attention.num_heads, dict(starts))
    # a packed layer's own movement goes on beside a walk that ends early
    moved = {i for branch in branches for i in branch.walk.nodes}
    first = {i for name in starts for i in view.consumers.get(name, [])} - moved
    nodes = _follow(found, first, context, starts)
    if found.axes.get(context) != _head_axis(branches[3].layout, context):
        raise Kind.MEET.decline("the heads do not arrive at the output projection as they left Q, K and V")
    for name in (context, *(name for i in branches[3].walk.nodes for name in view.nodes[i].output)):
        for i in view.consumers.get(name, []):
            if view.nodes[i].op_type in MEASURING:
                _check_extent(found, i, context, ())
    operands = {(i, k): axis for i in nodes for k, axis in _outside(found, i).items()}
    return HeadRegion(tuple(nodes), found.axes, operands)


def _follow(found: _Heads, first: Iterable[int], context: str, starts: Iterable[str]) -> list[int]:
    """Nodes that heads pass through from the first of them to the weighted sum; where they lie is noted on the way."""
    view, pending = found.view, sorted(first)
    nodes: list[int] = []
    while pending:
        i = heapq.heappop(pending)
        if i in nodes[-1:]:
            continue
        if view.nodes[i].op_type in MEASURING:
            _check_extent(found, i, view.nodes[i].input[0], starts)
            continue
        nodes.append(i)
        for name, axis in _through(found, i).items():
            if name in view.outputs:
                raise Kind.OUTPUT.decline(
                    "'{tensor}', which holds all heads, is also an output of the graph", tensor=name
                )
            found.axes[name] = axis
            for reader in view.consumers.get(name, []) if name != context else ():
                heapq.heappush(pending, reader)
    return nodes


def _branches(a: Attention) -> tuple[Branch, Branch, Branch, Branch]:
    """All four layers of an attention, which must have the same heads."""
    if a.q is None or a.k is None:
        raise Decline(a.qk_reason or Kind.NO_LAYER.says("Q and K were not found"))
    if a.v is None or a.proj is None or a.vo_reason is not None:
        raise Decline(a.vo_reason or Kind.NO_LAYER.says("V and the output projection were not found"))
    if a.qk_reason is not None and (a.qk_reason.first or a.qk_reason) not in (a.q.walk.blocked, a.k.walk.blocked):
        raise Decline(a.qk_reason)
    for branch in (a.q, a.k, a.v):
        shared = [b for b in (a.q, a.k, a.v) if b.linear.output == branch.linear.output]
        if sum(b.layout.channels.size for b in shared) != branch.linear.out_features:
            raise Kind.PACKED.decline("a layer also makes channels that are none of Q, K and V")
    if a.num_heads == 1:
        raise Kind.ONE_HEAD.decline("there is a single head")
    if {b.layout.num_heads for b in (a.q, a.k, a.v, a.proj)} != {a.num_heads}:
        raise Kind.NUMBERS.decline("Q, K, V and the output projection have different numbers of heads")
    return a.q, a.k, a.v, a.proj


def _head_axis(layout: Layout, tensor: str) -> HeadAxis:
    """Where a layout puts the heads."""
    for axis, factors in enumerate(layout.axes):
        sources = [f.source for f in factors]
        if HEAD in sources:
            inside = factors[sources.index(HEAD) + 1 :]
            if any(f.dynamic for f in inside):
                raise Kind.DYNAMIC.decline(
                    "heads of '{tensor}' are apart by an extent that changes with the input", tensor=tensor
                )
            return HeadAxis(axis, prod(f.size for f in inside))
    raise Kind.LAYOUT.decline("'{tensor}' has no axis of heads", tensor=tensor)


def _check_extent(found: _Heads, i: int, name: str, starts: Iterable[str]) -> None:
    """A Shape node goes on telling the old extents, which must be told by what is left."""
    axis = found.axes[name].axis
    if name not in starts and found.facts.known_shape(name)[axis] != (found.other.shape(name) or ())[axis]:
        raise found.view.decline(i, Kind.DYNAMIC, "{node} reads an extent that heads and a dynamic axis make together")


def _through(found: _Heads, i: int) -> dict[str, HeadAxis]:
    """Where the heads lie behind a node: one entry for each output."""
    view, node = found.view, found.view.nodes[i]
    inside = [name for name in node.input if name in found.axes]
    op = node.op_type
    if node.domain == "com.microsoft" and op not in ("FusedMatMul", "MultiHeadAttention", "RotaryEmbedding"):
        raise view.decline(i, Kind.UNKNOWN, "{node} is not known to keep heads apart")
    first = found.axes.get(node.input[0])
    made = [name for name in node.output if name]
    if op in RESHAPING and first is not None:
        return {made[0]: _reshaped(found, i, first)}
    if op == "Transpose" and first is not None:
        rank = len(found.facts.known_shape(node.input[0]))
        perm = list(attribute(node, "perm") or range(rank)[::-1])  # type: ignore[call-overload]
        return {made[0]: HeadAxis(perm.index(first.axis), first.inner)}
    if op in ELEMENTWISE or op == "Expand":
        return {made[0]: _aligned(found, i, inside, len(found.facts.known_shape(made[0])))}
    if op in _ALONG or op in _NORMS:
        return _along(found, i, made)
    if op in ("MatMul", "FusedMatMul"):
        return {made[0]: _product(found, i, inside)}
    if op == "Einsum":
        return {made[0]: _einsum(found, i, inside)}
    if op in SCORE_TERMS or op == "RotaryEmbedding":
        return _fused(found, i)
    raise view.decline(i, Kind.UNKNOWN, "{node} is not known to keep heads apart")


def _reshaped(found: _Heads, i: int, axis: HeadAxis) -> HeadAxis:
    """Counting elements in order, the head changes every `step` of them: some axis must count alike."""
    node = found.view.nodes[i]
    new = []
    for facts in (found.facts, found.other):
        before, after = facts.shape(node.input[0]), facts.shape(node.output[0])
        if before is None or after is None:
            raise Kind.SHAPE.decline("the shape of '{tensor}' cannot be inferred", tensor=node.output[0])
        step = axis.inner * prod(before[axis.axis + 1 :])
        new.append(_axis_with(after, step, found.count))
    if new[0] is None or new[0] != new[1]:
        raise found.view.decline(i, Kind.MEET, "{node} puts heads and other things together")
    if node.op_type == "Reshape":
        target = found.facts.value(node.input[1])
        if target is None:
            raise found.view.decline(i, Kind.CONTENTS, "the target shape of {node} depends on the input's contents")
        if target[new[0].axis] == 0 and new[0] != axis:
            raise found.view.decline(i, Kind.DYNAMIC, "{node} copies an extent from where the heads were")
    return new[0]


def _axis_with(shape: tuple[int, ...], step: int, count: int) -> HeadAxis | None:
    """The axis of a tensor on which the head changes with every `step` elements; None where there is none."""
    for axis, extent in enumerate(shape):
        stride = prod(shape[axis + 1 :])
        if step % stride == 0 and extent % (step // stride * count) == 0:
            return HeadAxis(axis, step // stride)
    return None


def _aligned(found: _Heads, i: int, inside: list[str], rank: int) -> HeadAxis:
    """The heads' axis of a result of `rank` axes to which operands are broadcast; all must agree."""
    shift = {name: rank - len(found.facts.known_shape(name)) for name in inside}
    ends = {HeadAxis(found.axes[name].axis + shift[name], found.axes[name].inner) for name in inside}
    if len(ends) != 1:
        raise found.view.decline(i, Kind.MEET, "{node} lets heads meet each other")
    return ends.pop()


def _along(found: _Heads, i: int, made: list[str]) -> dict[str, HeadAxis]:
    """Through a node that acts along other axes than the heads'."""
    node = found.view.nodes[i]
    if node.input[0] not in found.axes and node.op_type != "Concat":
        raise found.view.decline(i, Kind.MEET, "{node} takes heads for numbers")
    inside = [name for name in node.input if name in found.axes]
    start = found.axes[inside[0]]
    rank = len(found.facts.known_shape(inside[0]))
    if any(found.axes[name] != start for name in inside):
        raise found.view.decline(i, Kind.MEET, "{node} lets heads meet each other")
    axes = _own_axes(found, i, rank)
    if start.axis in axes:
        raise found.view.decline(i, Kind.MEET, "{node} runs over all heads")
    after = len(found.facts.known_shape(made[0]))
    axis = start.axis
    if after != rank:  # a reduction that drops axes, or a Gather of one place
        axis += sum(after - rank for a in axes if a < start.axis) // max(len(axes), 1)
    return {name: HeadAxis(axis, start.inner) for name in made}


def _own_axes(found: _Heads, i: int, rank: int) -> list[int]:
    """The axes that a node acts along, not negative."""
    node = found.view.nodes[i]
    op = node.op_type
    given: Any = None
    if op in REDUCTIONS:
        given = reduced_axes(found.facts, node, rank)
    elif op == "Slice":
        starts = found.facts.value(node.input[1]) if len(node.input) > 1 else None
        if starts is None:
            raise found.view.decline(i, Kind.CONTENTS, "{node} slices by what the input holds")
        named = found.facts.value(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        given = range(starts.size) if named is None else named.reshape(-1)
    elif op in _NORMS:
        axis = int(attribute(node, "axis", -1))  # type: ignore[call-overload]
        given = range(axis % rank, rank)
    else:
        default = {"Split": 0, "Gather": 0}.get(op, -1)
        if op in operators(Effect.SHARES) and found.view.model.opset < 13:
            given = range(int(attribute(node, "axis", 1)) % rank, rank)  # type: ignore[call-overload]
        else:
            given = [attribute(node, "axis", default)]
    if given is None:
        raise found.view.decline(i, Kind.CONTENTS, "the axes of {node} depend on the input's contents")
    return [int(a) % rank for a in given]


def _product(found: _Heads, i: int, inside: list[str]) -> HeadAxis:
    """Through a product: heads lie on an axis in front of the two that are multiplied."""
    node = found.view.nodes[i]
    if any(found.axes[name].axis >= len(found.facts.known_shape(name)) - 2 for name in inside):
        raise found.view.decline(i, Kind.MEET, "{node} sums over heads")
    if any(attribute(node, name, 0) for name in ("transBatchA", "transBatchB")):
        raise found.view.decline(i, Kind.UNKNOWN, "{node} is not known to keep heads apart")
    return _aligned(found, i, inside, len(found.facts.known_shape(node.output[0])))


def _einsum(found: _Heads, i: int, inside: list[str]) -> HeadAxis:
    """Through an Einsum: heads keep a letter of their own that the result has, too."""
    node = found.view.nodes[i]
    terms, result = _terms(found, i)
    letters = {
        (term[found.axes[n].axis], found.axes[n].inner)
        for n, term in zip(node.input, terms, strict=True)
        if n in inside
    }
    if len(letters) != 1:
        raise found.view.decline(i, Kind.MEET, "{node} lets heads meet each other")
    letter, inner = letters.pop()
    if letter not in result or any(term.count(letter) > 1 for term in (*terms, result)):
        raise found.view.decline(i, Kind.MEET, "{node} sums over heads")
    return HeadAxis(result.index(letter), inner)


def _terms(found: _Heads, i: int) -> tuple[list[str], str]:
    """An Einsum's terms and result."""
    equation = attribute(found.view.nodes[i], "equation", b"")
    assert isinstance(equation, bytes)
    left, arrow, result = equation.decode().replace(" ", "").partition("->")
    if not arrow or "." in equation.decode():
        raise found.view.decline(i, Kind.UNKNOWN, "{node} is not known to keep heads apart")
    return left.split(","), result


def _fused(found: _Heads, i: int) -> dict[str, HeadAxis]:
    """Through one node that holds scores, softmax and weighted sum, or turns queries and keys."""
    node = found.view.nodes[i]
    if any(name for name in node.output[1:]):
        raise found.view.decline(i, Kind.MEET, "{node} gives out more than the weighted sum")
    for name in node.input[: 3 if node.op_type in SCORE_TERMS else 1]:
        axis, shape = found.axes.get(name), found.facts.known_shape(name)
        expected = HeadAxis(1, 1) if len(shape) == 4 else HeadAxis(2, shape[-1] // found.count)
        if axis != expected:
            raise found.view.decline(i, Kind.MEET, "{node} does not take its heads from Q, K and V alone")
    shape = found.facts.known_shape(node.output[0])
    return {node.output[0]: HeadAxis(1, 1) if len(shape) == 4 else HeadAxis(2, shape[-1] // found.count)}


def _outside(found: _Heads, i: int) -> dict[int, HeadAxis]:
    """Inputs of a node that come from elsewhere with a value for each head, by their position among the inputs."""
    node = found.view.nodes[i]
    inside = [k for k, name in enumerate(node.input) if name in found.axes]
    per_head: dict[int, HeadAxis] = {}
    for k, name in enumerate(node.input):
        if k in inside or not name or _is_setting(node.op_type, k):
            continue
        where, extent = _meeting(found, i, k, inside[0])
        shape = found.facts.known_shape(name)
        if where is None or shape[where.axis] == 1:
            continue
        if shape[where.axis] != extent:
            raise found.view.decline(
                i, Kind.UNKNOWN, "'{tensor}' meets the heads in {node} in a way that is not understood", tensor=name
            )
        if (found.other.shape(name) or ())[where.axis : where.axis + 1] != (extent,):
            raise Kind.DYNAMIC.decline(
                "'{tensor}' has a value for each head of each item of a dynamic batch", tensor=name
            )
        per_head[k] = where
    return per_head


def _is_setting(op: str, k: int) -> bool:
    """Whether an input says what to do rather than taking part: shapes, axes, indices, bounds."""
    by_inputs = op in RESHAPING or op in ("Expand", "Split", "Slice", "Gather", "Clip", "CastLike")
    return k > 0 and (by_inputs or op in REDUCTIONS)


def _meeting(found: _Heads, i: int, k: int, inside: int) -> tuple[HeadAxis | None, int]:
    """Where an outside input of a node meets the heads of another one (None: nowhere), and the extent there."""
    node = found.view.nodes[i]
    partner, rank = node.input[inside], len(found.facts.known_shape(node.input[k]))
    own = found.axes[partner]
    extent = found.facts.known_shape(partner)[own.axis]
    if node.op_type == "Concat":
        return own, extent
    if node.op_type == "Einsum":
        terms, _ = _terms(found, i)
        letter = terms[inside][own.axis]
        return (HeadAxis(terms[k].index(letter), own.inner) if letter in terms[k] else None), extent
    if node.op_type in SCORE_TERMS:
        # (batch, heads, queries, keys), broadcast: a mask of Attention, a bias of MultiHeadAttention
        per_head = rank > 2 and k == SCORE_TERMS[node.op_type]
        return (HeadAxis(rank - 3, 1) if per_head else None), found.count
    if node.op_type == "RotaryEmbedding":
        return None, extent  # its tables have an angle for each position and pair
    result = found.axes[node.output[0]]
    axis = rank - len(found.facts.known_shape(node.output[0])) + result.axis
    return (HeadAxis(axis, result.inner) if axis >= 0 else None), found.facts.known_shape(node.output[0])[result.axis]
