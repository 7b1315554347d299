"""Attention cores: a Softmax between two activation-by-activation products, or one fused attention node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.operators import (
    ATTENTIONS,
    CONTRACTIONS,
    MOVEMENT,
    RESHAPING,
    Effect,
    Trait,
    having,
    operators,
)
from toast_onnx.matching.walks import downstream, upstream
from toast_onnx.reasons import Decline, Kind, Reason

#: What may stand between the score product and Softmax: mask, scale, cap, shape; quantizers, to be declined by name.
_BETWEEN = having(Trait.MASKS) | having(Trait.ROUNDS) | RESHAPING - {"Flatten"} | {"Expand"}
#: What mixes the scores or probabilities of different heads.
_MIXING = CONTRACTIONS - {"FusedMatMul"} | operators(Effect.NORMS_CHANNELS) | {"LayerNormalization"}
#: What may stand there where heads are mixed.
_AROUND = _BETWEEN | _MIXING | MOVEMENT


@dataclass(frozen=True)
class Core:
    """Scores, softmax and weighted sum of one attention.

    Attributes:
        kind: `matmul` (separate nodes), `attention` (ONNX opset 23), `mha` (com.microsoft MultiHeadAttention) or `gqa`
            (com.microsoft GroupQueryAttention).
        qk: position of the score product (the fused node itself when fused).
        softmax: position of the Softmax (the fused node itself when fused).
        av: position of the weighted sum (the fused node itself when fused).
        q: tensor of the queries; k, v: keys and values; context: the weighted sum.
        k_dim_axis: axis of the head's dimensions in `k` (-1, or -2 where the keys come transposed).
        heads: number of heads where q, k, v hold heads and dimensions on one axis, else None.
        kv_heads: the same of keys and values, which several queries may share.
        mixed: whether heads are mixed between the scores and the weighted sum (talking heads, Shazeer et al. 2020): the
            dimensions of each head stay its own, but no row of the softmax belongs to one head.
    """

    kind: str
    qk: int
    softmax: int
    av: int
    q: str
    k: str
    v: str
    context: str
    k_dim_axis: int = -1
    heads: int | None = None
    kv_heads: int | None = None
    mixed: bool = False

    @property
    def one_width(self) -> bool:
        """Whether queries, keys and values must have equally many dimensions, a multiple of 8 of them."""
        return self.kind == "gqa"

    @property
    def nodes(self) -> tuple[int, ...]:
        """Positions of the core's nodes."""
        return tuple(dict.fromkeys((self.qk, self.softmax, self.av)))


def find_cores(view: GraphView, facts: Facts) -> tuple[list[Core], dict[int, Reason]]:
    """All attention cores in graph order, and the nodes that look like one but are not (position: reason)."""
    cores: list[Core] = []
    declined: dict[int, Reason] = {}
    for i, node in enumerate(view.nodes):
        find = _finder(node)
        if find is None:
            continue
        try:
            core = find(view, facts, i)
        except Decline as e:
            declined[i] = e.reason
            continue
        if core is not None:
            cores.append(core)
    declined.update(_without_softmax(view, facts, cores))
    return cores, declined


def _without_softmax(view: GraphView, facts: Facts, cores: Sequence[Core]) -> dict[int, Reason]:
    """Products of three activations, one after another, that no Softmax makes an attention (position: reason).

    Linear attention is one, and so are scores that another function than a Softmax makes weights of.
    """
    known = {i for core in cores for i in core.nodes}
    found: dict[int, Reason] = {}
    for i in range(len(view.nodes)):
        if i in known or not _meets(view, facts, i):
            continue
        before = _ends_before(view, facts, i)
        first = sorted(k for k in before - known if _meets(view, facts, k))
        around = before.union(*(_ends_before(view, facts, k) for k in first))
        if first and not any(view.nodes[k].op_type == "Softmax" for k in around):  # which has its own reason
            text = "{node} multiplies what {first} makes of two activations by a third, and no Softmax lies between"
            found[i] = Kind.NO_ATTENTION.says(text, node=view.label(i), first=view.label(first[0]))
    return found


def _ends_before(view: GraphView, facts: Facts, i: int) -> set[int]:
    """The nodes in front of one, up to and with the nearest layers, products and softmaxes."""
    ends = CONTRACTIONS | ATTENTIONS | {"Softmax"}
    met = upstream(view, facts, view.nodes[i].input, lambda k: view.nodes[k].op_type in ends)
    return {k for k in met if k is not None}


def _finder(node: onnx.NodeProto) -> Callable[[GraphView, Facts, int], Core | None] | None:
    if is_standard(node):
        return {"Softmax": _softmax_core, "Attention": _fused_core}.get(node.op_type)
    theirs = {"MultiHeadAttention": _mha_core, "Attention": _packed_core, "GroupQueryAttention": _gqa_core}
    return theirs.get(node.op_type) if node.domain == "com.microsoft" else None


def _softmax_core(view: GraphView, facts: Facts, i: int) -> Core | None:
    node = view.nodes[i]
    products = _products_before(view, facts, node.input[0])
    sums = _products_after(view, facts, node.output[0])
    mixed = _mixed_products(view, facts, i) if not (products and sums) else None
    if mixed is not None:
        products, sums = [mixed.scores], [mixed.total]
    if not sums:
        reason = _without_values(view, facts, node)
        if reason is None:
            return None
        raise Decline(reason)
    if not products:
        raise Decline(_without_scores(view, facts, node))
    if len(products) > 1 or len(sums) > 1:
        raise Kind.NO_ATTENTION.decline("more than one activation product surrounds this Softmax")
    shape = facts.shape(node.input[0])
    scores = facts.shape(view.nodes[products[0]].output[0])
    if shape is None or scores is None:
        raise Kind.SHAPE.decline("the shape of the attention scores cannot be inferred")
    default = -1 if view.model.opset >= 13 else 1
    axis = int(attribute(node, "axis", default))  # type: ignore[call-overload]
    keys = len(shape) - 1 if mixed is None else mixed.keys
    if axis % len(shape) != keys:
        text = "this Softmax runs over axis {axis}, not over the one of the keys"
        raise Kind.NO_ATTENTION.decline(text, axis=axis)
    if mixed is None and scores[-2:] != shape[-2:]:
        raise Kind.NO_ATTENTION.decline("the attention scores are transposed or regrouped before the Softmax")
    qk, av = products[0], sums[0]
    product, total = view.nodes[qk], view.nodes[av]
    if attribute(total, "transB", 0):
        raise Kind.NO_ATTENTION.decline("the values come transposed into the weighted sum")
    k_dim_axis = -1 if attribute(product, "transB", 0) else -2
    q, k = product.input[:2]
    return Core("matmul", qk, i, av, q, k, total.input[1], total.output[0], k_dim_axis, mixed=mixed is not None)


def _without_values(view: GraphView, facts: Facts, softmax: onnx.NodeProto) -> Reason | None:
    """Why no product takes up the probabilities; None for the softmax of a classifier."""
    reader = _reader_before_values(view, facts, softmax.output[0])
    if reader is not None:
        text = "{node} takes the probabilities of this Softmax before they meet another activation"
        return Kind.NO_ATTENTION.says(text, node=view.label(reader))
    if not any(_meets(view, facts, i) for i in _before(view, facts, softmax.input[0], _BETWEEN | MOVEMENT)):
        return None
    return Kind.NO_ATTENTION.says("the probabilities of this Softmax weigh no values: no product takes them up")


def _without_scores(view: GraphView, facts: Facts, softmax: onnx.NodeProto) -> Reason:
    """Why what the softmax reads are no scores."""
    before = _before(view, facts, softmax.input[0], _BETWEEN | MOVEMENT)
    einsum = next((i for i in before if view.nodes[i].op_type == "Einsum"), None)
    if einsum is None:
        return Kind.NO_ATTENTION.says("the scores before this Softmax are no product of two activations")
    text = "the scores come from {node}, whose equation is no batched matrix product"
    return Kind.NO_ATTENTION.says(text, node=view.label(einsum))


@dataclass(frozen=True)
class _Mixed:
    """Scores and weighted sum of an attention between which heads are mixed.

    Attributes:
        scores: position of the score product.
        total: position of the weighted sum.
        keys: axis of the keys in what the Softmax reads; -1 where it could not be followed.
    """

    scores: int
    total: int
    keys: int


def _mixed_products(view: GraphView, facts: Facts, i: int) -> _Mixed | None:
    """Scores and weighted sum around a Softmax where heads are mixed (talking heads) or subtracted (differential).

    Nothing but constants may join on the way, and every matrix on it must contract over the heads: whatever is done to
    finished scores, a head's dimensions have been summed before it, and are multiplied into V after it. Optimizers
    move the transposes around the mixing through the Softmax: its axis is the one that the keys arrive on.
    """
    scores = _only_source(view, facts, view.nodes[i].input[0])
    if scores is None or not is_product(view, facts, scores[0]):
        return None
    total = _only_reader(view, facts, view.nodes[i].output[0])
    if total is None:
        return None
    shape = facts.shape(view.nodes[scores[0]].output[0]) or ()
    taken = facts.shape(view.nodes[total[0]].input[0]) or ()
    heads = shape[-3] if len(shape) > 2 else 0
    way = (*scores[1], *total[1])
    matrices = [view.nodes[n] for n in way if view.nodes[n].op_type in CONTRACTIONS - {"Einsum"}]
    sides = [facts.shape(name) or () for node in matrices for name in node.input[:2] if facts.is_constant(name)]
    mixing = all(np.prod(side) == heads * max(side) and heads in side for side in sides)
    if not (way and mixing and heads and taken[-2:] == shape[-2:]):
        return None
    product, sum_ = (view.nodes[n] for n in (scores[0], total[0]))
    softmax = view.nodes[i]
    keys = _axes_of_keys(view, facts, product.output[0], [*way, i])
    arrived = keys.get(sum_.input[0]) == len(taken) - 1
    return _Mixed(scores[0], total[0], keys.get(softmax.input[0], -1) if arrived else -1)


def _axes_of_keys(view: GraphView, facts: Facts, scores: str, way: Sequence[int]) -> dict[str, int]:
    """Axis (not negative) of the keys in every tensor made of some scores, whose last one it is.

    Args:
        view: the graph.
        facts: its facts.
        scores: the scores.
        way: positions of the nodes behind them.
    """
    axes = {scores: len(facts.shape(scores) or ()) - 1}
    for i in sorted(way):
        node = view.nodes[i]
        for name in (n for n in node.input if n in axes):
            axis = _carried_axis(node, axes[name], facts.shape(name) or (), facts.shape(node.output[0]) or ())
            if axis is not None:
                axes.update(dict.fromkeys(node.output, axis))
    return axes


def _carried_axis(node: onnx.NodeProto, axis: int, before: Sequence[int], after: Sequence[int]) -> int | None:
    """Where a node on the way puts an axis; None where it does not stay one."""
    if node.op_type == "Transpose":
        perm = list(attribute(node, "perm", []) or range(len(before) - 1, -1, -1))  # type: ignore[call-overload]
        return int(perm.index(axis))
    if node.op_type in RESHAPING:
        places = (k for k, n in enumerate(after) if n == before[axis] and prod(after[:k]) == prod(before[:axis]))
        return next(places, None)
    if node.op_type == "Gather" and len(after) < len(before):
        taken = int(attribute(node, "axis", 0)) % len(before)  # type: ignore[call-overload]
        return None if taken == axis else axis - (taken < axis)
    return None if node.op_type == "Einsum" else axis - len(before) + len(after)


def _only_source(view: GraphView, facts: Facts, tensor: str) -> tuple[int, list[int]] | None:
    """The one activation product that all of a tensor comes from, and the nodes on the way; else None."""
    ways = upstream(view, facts, [tensor], lambda i: not _lies_around(view, facts, i), lambda i: _data(view, facts, i))
    met = list(dict.fromkeys(ways))
    found = [i for i in met if i is not None and _meets(view, facts, i)]
    way = [i for i in met if i is not None and _lies_around(view, facts, i)]
    return (found[0], way) if len(found) == 1 and len(way) + 1 == len(met) else None


def _data(view: GraphView, facts: Facts, i: int) -> list[str]:
    """Inputs of a node that hold data which changes; what movement goes by (shapes, positions) is none."""
    node = view.nodes[i]
    names = node.input[:1] if node.op_type in MOVEMENT - {"Concat"} else node.input
    return [name for name in names if name and not facts.is_constant(name)]


def _only_reader(view: GraphView, facts: Facts, tensor: str) -> tuple[int, list[int]] | None:
    """The one activation product that takes up all of a tensor as its first operand, and the nodes on the way."""
    met = list(downstream(view, [tensor], lambda i: _lies_around(view, facts, i)))
    found = {i for i, name in met if is_product(view, facts, i) and view.nodes[i].input[0] == name}
    way = list(dict.fromkeys(i for i, _ in met if _lies_around(view, facts, i)))
    reached = {tensor, *(name for i in way for name in view.nodes[i].output)}
    alone = all(name in reached for i in way for name in _data(view, facts, i))
    return (found.pop(), way) if len(found) == 1 and alone and {i for i, _ in met} - {*way} <= found else None


def _lies_around(view: GraphView, facts: Facts, i: int) -> bool:
    """Whether a node may stand between scores, Softmax and weighted sum where heads are mixed."""
    return view.nodes[i].op_type in _AROUND and not _meets(view, facts, i)


def is_product(view: GraphView, facts: Facts, i: int, learned: bool = False) -> bool:
    """Whether a node multiplies two activations; with `learned`, the first may be constant (learned queries)."""
    node = view.nodes[i]
    if node.op_type == "FusedMatMul" and node.domain == "com.microsoft":
        plain = not any(attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    else:
        plain = node.op_type == "MatMul" and is_standard(node)
    return plain and not any(facts.is_constant(name) for name in (node.input[1:] if learned else node.input))


def _meets(view: GraphView, facts: Facts, i: int) -> bool:
    """Whether two activations meet in a node in any product: matrix product or contraction."""
    einsum = view.nodes[i].op_type == "Einsum" and sum(not facts.is_constant(n) for n in view.nodes[i].input) > 1
    return einsum or is_product(view, facts, i)


def is_meeting(view: GraphView, facts: Facts, i: int) -> bool:
    """Whether two activations meet in a node: in a product, or inside a fused attention."""
    return _meets(view, facts, i) or view.nodes[i].op_type in ATTENTIONS


def scores_of_softmax(view: GraphView, facts: Facts, i: int) -> bool:
    """Whether a Softmax takes a node's output through scale, mask and shape nodes, or alone with its heads mixed."""
    softmaxes = (node for node in view.nodes if node.op_type == "Softmax")
    if any((found := _only_source(view, facts, node.input[0])) is not None and found[0] == i for node in softmaxes):
        return True
    behind = downstream(view, view.nodes[i].output, lambda k: view.nodes[k].op_type in _BETWEEN)
    return any(view.nodes[k].op_type == "Softmax" for k, _ in behind)


def weighs_values(view: GraphView, facts: Facts, tensor: str) -> bool:
    """Whether two activations meet in a product behind a tensor, through what may stand behind probabilities."""
    return any(_meets(view, facts, k) for k, _ in downstream(view, [tensor], lambda k: _lies_around(view, facts, k)))


def leads_to_softmax(view: GraphView, facts: Facts, i: int) -> bool:
    """Whether a Softmax takes a node's output through what may stand around an attention's scores."""
    behind = downstream(view, view.nodes[i].output, lambda k: _lies_around(view, facts, k))
    return any(view.nodes[k].op_type == "Softmax" for k, _ in behind)


def weighs(view: GraphView, facts: Facts, tensor: str) -> bool:
    """Whether a tensor holds the probabilities of a Softmax, as they are or with their heads mixed by constants."""
    node = view.producer_of(tensor)
    while node is not None and node.op_type in _AROUND:
        (tensor, *others) = [n for n in node.input if n and not facts.is_constant(n)] or [""]
        node = None if others else view.producer_of(tensor)
    return node is not None and node.op_type == "Softmax"


def _before(view: GraphView, facts: Facts, tensor: str, passed: frozenset[str]) -> list[int]:
    """Nodes in front of a tensor, nearest first, up to and with those that are none of the passed operators."""
    ways = upstream(view, facts, [tensor], lambda i: view.nodes[i].op_type not in passed)
    return [i for i in dict.fromkeys(ways) if i is not None]


def _products_before(view: GraphView, facts: Facts, tensor: str) -> list[int]:
    """Activation products reached backwards through scale, mask and shape nodes."""
    return [i for i in _before(view, facts, tensor, _BETWEEN) if is_product(view, facts, i, learned=True)]


def _products_after(view: GraphView, facts: Facts, tensor: str) -> list[int]:
    """Activation products that read the probabilities as their first operand."""
    met = downstream(view, [tensor], lambda i: view.nodes[i].op_type in _BETWEEN)
    return list({i: None for i, name in met if is_product(view, facts, i) and view.nodes[i].input[0] == name})


def _reader_before_values(view: GraphView, facts: Facts, tensor: str) -> int | None:
    """What stands between the probabilities and a matrix product of activations; None where they lead to none.

    Mixed heads (talking heads), differences of probabilities and a softmax over another axis (linear attention) all
    end in such a product, a few nodes on.
    """
    first: dict[str, int | None] = {}  # tensor -> first node on the way that no attention core knows
    for i, name in downstream(view, [tensor], lambda i: _lies_around(view, facts, i)):
        own = first.get(name)
        if own is None and view.nodes[i].op_type not in _BETWEEN:
            own = i
        if _meets(view, facts, i):
            return own
        first.update({t: own for t in view.nodes[i].output if t not in first})
    return None


def _fused_core(view: GraphView, facts: Facts, i: int) -> Core:
    node = view.nodes[i]
    if any(name for name in node.input[4:]):
        raise Kind.CACHE.decline("this Attention node carries a key/value cache")
    shape = facts.shape(node.input[0])
    heads = kv_heads = None
    if shape is None:
        raise Kind.SHAPE.decline("the shape of this Attention node's queries cannot be inferred")
    if len(shape) == 3:
        heads = int(attribute(node, "q_num_heads", 0))  # type: ignore[call-overload]
        kv_heads = int(attribute(node, "kv_num_heads", 0))  # type: ignore[call-overload]
    q, k, v = node.input[:3]
    return Core("attention", i, i, i, q, k, v, node.output[0], heads=heads, kv_heads=kv_heads)


def _mha_core(view: GraphView, facts: Facts, i: int) -> Core:
    node = view.nodes[i]
    heads = int(attribute(node, "num_heads", 0))  # type: ignore[call-overload]
    ranks = [len(facts.shape(name) or ()) for name in node.input[:3]]
    if ranks != [3, 3, 3]:
        raise Kind.FUSED.decline("this MultiHeadAttention node takes packed or transposed operands")
    if any(name for name in node.input[6:8]):
        raise Kind.CACHE.decline("this MultiHeadAttention node carries a key/value cache")
    if len(node.input) > 3 and node.input[3]:
        raise Kind.FUSED.decline("this MultiHeadAttention node adds a bias to Q, K and V that is not constant")
    q, k, v = node.input[:3]
    return Core("mha", i, i, i, q, k, v, node.output[0], heads=heads, kv_heads=heads)


def _gqa_core(view: GraphView, facts: Facts, i: int) -> Core:
    node = view.nodes[i]
    ranks = [len(facts.shape(name) or ()) for name in node.input[:3]]
    if ranks != [3, 3, 3]:
        raise Kind.FUSED.decline("this GroupQueryAttention node takes packed operands")
    if any(node.input[3:5]) or any(name in view.consumers or name in view.outputs for name in node.output[1:]):
        raise Kind.CACHE.decline("this GroupQueryAttention node carries a key/value cache")
    if attribute(node, "do_rotary", 0):
        raise Kind.FUSED.decline("this GroupQueryAttention node holds a rotary embedding; export it as separate nodes")
    q, k, v = node.input[:3]
    heads, kv_heads = (int(attribute(node, name, 0)) for name in ("num_heads", "kv_num_heads"))  # type: ignore[call-overload]
    return Core("gqa", i, i, i, q, k, v, node.output[0], heads=heads, kv_heads=kv_heads)


def _packed_core(view: GraphView, facts: Facts, i: int) -> Core:
    # Those that do nothing else were spelled out before (see fused.py).
    raise Kind.FUSED.decline(
        "this com.microsoft Attention node carries a key/value cache, a rotary embedding or a packed mask"
    )
