"""What tokens are compared by. A metric is one entry of the table: its name, its sentence, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from toast_onnx.edit import PlaceWriter
from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.tokens.follow import Tokens, TokenSequence

#: What a metric weighs pairs by.
Weight = Literal["nothing", "sizes", "attention"]
#: Added to attention, so that two tokens that nothing attends to still compare.
FLOOR = 1e-12


@dataclass(frozen=True)
class Metric:
    """A way to compare tokens, by the cosine of features.

    Attributes:
        name: what ratios files call it.
        sentence: its description in the docs.
        part: where the features come from: keys or values of the attention in front, or the stream itself.
        average: whether heads are averaged; otherwise they stand side by side.
        weight: what pairs are weighed by besides: nothing; their sizes, so that what counts is Ward's loss of merging
            them; or the attention that the class token pays them, so that what it reads stays apart.
    """

    name: str
    sentence: str
    part: Literal["k", "v", "stream"]
    average: bool = False
    weight: Weight = "nothing"


METRICS = {
    m.name: m
    for m in (
        Metric("keys", "keys averaged over heads, as ToMe compares them", "k", average=True),
        Metric("keys-by-head", "keys of all heads side by side, which need no axes in common", "k"),
        Metric("attended-keys", "the same, weighed by the class token's attention to both", "k", weight="attention"),
        Metric("values", "values of all heads side by side, weighed by sizes", "v", weight="sizes"),
        Metric("tokens", "the tokens themselves, after the attention, weighed by sizes", "stream", weight="sizes"),
    )
}


#: Takes the first of these that a model has what it needs for; in the order they measured in (benchmarks/tokens.py).
AUTO = "auto"
PREFERRED = ("attended-keys", "keys-by-head", "tokens")


def candidates(name: str) -> tuple[Metric, ...]:
    """The metrics to try in turn for a name of a ratios file."""
    return tuple(METRICS[n] for n in PREFERRED) if name == AUTO else (METRICS[name],)


@dataclass(frozen=True)
class Features:
    """Where a metric's features lie.

    Attributes:
        tensor: the tensor, by its name in the unmerged graph: the stream, or an operand of the attention. The operand
            rather than the layer's output, because TensorRT builds no engine where the packed layer is read twice.
        tokens: where its tokens lie.
        folded: number of heads that lie on the batch's axis, 1 for none.
        order: axes, heads unfolded, as (batch, tokens, heads, dimensions), without heads where there are none.
        metric: the metric.
        attended: for weights by attention, the tensor of probabilities (queries and keys on its last axes).
        attended_heads: number of heads in it.
    """

    tensor: str
    tokens: Tokens
    folded: int
    order: tuple[int, ...]
    metric: Metric
    attended: str | None = None
    attended_heads: int = 1


def find_features(
    metric: Metric,
    stream: str,
    attention: Attention,
    tokens: Mapping[str, Tokens],
    sequence: TokenSequence,
    view: GraphView,
    facts: Facts,
) -> Features:
    """Where the features of a metric lie at one merge.

    Args:
        metric: the metric.
        stream: the tokens to merge, (batch, tokens, channels).
        attention: the attention in front of the merge.
        tokens: tensor -> where its tokens lie.
        sequence: the token sequence.
        view: the unmerged graph.
        facts: its facts.

    Raises:
        MatchError: the attention has no such part, or its tokens lie in another order.
    """
    if metric.part == "stream":
        if stream not in tokens:
            raise MatchError(f"the tokens of '{stream}' cannot be followed")
        return Features(stream, tokens[stream], 1, (0, 1, 2), metric)
    core = attention.core
    name, dim_axis = (core.k, core.k_dim_axis) if metric.part == "k" else (core.v, -1)
    found, shape = tokens.get(name), facts.shape(name) or ()
    along = None if found is None or len(found.axes) != 1 else found.axes[0].along
    if found is None or along is None or along.inner != 1 or along.count != sequence.count:
        raise MatchError("the keys or values of an attention are no sequence of tokens; choose tokens.metric: tokens")
    items = 1 if found.batch is None else found.batch.count
    first = shape[0] == items if found.batch is None else found.batch.axis == 0 and found.batch.inner == 1
    folded = 1 if len(shape) != 3 or core.heads is not None or first else shape[0] // items
    rank, shift = len(shape) + (folded > 1), int(folded > 1)
    token_axis, dims = along.axis + shift, dim_axis % rank
    heads = [a for a in range(1, rank) if a not in (token_axis, dims)]
    outermost = found.batch is None or (found.batch.axis == 0 and found.batch.inner == folded)
    if rank not in (3, 4) or len({token_axis, dims, 0}) != 3 or not outermost or shape[0] != items * folded:
        raise MatchError("the keys or values of an attention lie in another order; choose tokens.metric: tokens")
    if metric.average and not heads and core.heads != 1:
        raise MatchError(
            "the heads of a fused attention have no axis to average over; choose tokens.metric: keys-by-head"
        )
    order = (0, token_axis, *heads, dims)
    if metric.weight != "attention":
        return Features(name, found, folded, order, metric)
    return Features(name, found, folded, order, metric, *_attended(attention, tokens, sequence, view, facts))


def _attended(
    attention: Attention, tokens: Mapping[str, Tokens], sequence: TokenSequence, view: GraphView, facts: Facts
) -> tuple[str, int]:
    """(probabilities (..., queries, keys), number of heads) of an attention whose first token is a class token."""
    name = view.nodes[attention.core.softmax].output[0]
    found, shape = tokens.get(name), facts.shape(name)
    if sequence.front == 0 or attention.core.kind != "matmul" or found is None or shape is None:
        raise MatchError(
            "no class token's attention can be read here (a fused node, or no such token); choose another tokens.metric"
        )
    batch, rank = found.batch, len(shape)
    outermost = batch is None or (batch.axis == 0 and batch.inner * batch.count == shape[0])
    if [a.along.axis for a in found.axes] != [rank - 2, rank - 1] or not outermost:
        raise MatchError("the attention's probabilities lie in another order; choose another tokens.metric")
    items = 1 if batch is None else batch.count
    return name, int(np.prod(shape[:-2])) // items


def write_features(w: PlaceWriter, features: Features, tensor: str, shape: Sequence[int], count: int) -> str:
    """Nodes that make (batch, tokens, features) in float32.

    Args:
        w: writer.
        features: where they lie.
        tensor: the tensor's name in the graph that is written.
        shape: its shape in the unmerged graph.
        count: number of tokens now.
    """
    x, order = tensor, features.order
    if features.folded > 1:
        now = [count if a == features.tokens.axes[0].along.axis else n for a, n in enumerate(shape)]
        x = w.reshape(x, [-1, features.folded, *now[1:]], "features/unfolded")
    if order != tuple(range(len(order))):
        x = w.one("Transpose", [x], "features/Transpose", perm=list(order))
    if len(order) == 4:
        x = w.reduce("ReduceMean", x, [2]) if features.metric.average else w.reshape(x, [0, 0, -1], "features")
    return w.cast(x, onnx.TensorProto.FLOAT)


def read_features(features: Features, array: np.ndarray) -> np.ndarray:
    """(batch, tokens, features) in float64, read from the tensor's value in the unmerged graph.

    Args:
        features: where they lie.
        array: value of the tensor.
    """
    x = array.astype(np.float64)
    if features.folded > 1:
        x = x.reshape(-1, features.folded, *x.shape[1:])
    x = x.transpose(features.order)
    if x.ndim == 4:
        x = x.mean(2) if features.metric.average else x.reshape(*x.shape[:2], -1)
    return x


def write_weights(w: PlaceWriter, features: Features, size: str | None, count: int) -> str | None:
    """Nodes for the weights (batch, tokens, 1) of a metric; None where all tokens weigh the same.

    Args:
        w: writer.
        features: what is compared.
        size: (batch, tokens, 1), how many tokens each stands for; None where each stands for itself.
        count: number of tokens now.
    """
    if features.attended is None:
        return size if features.metric.weight == "sizes" else None
    rows = w.reshape(features.attended, [-1, features.attended_heads, count, count], "attended/by_head")
    row = w.reshape(w.slice(rows, 2, 0, 1, what="attended/class"), [-1, features.attended_heads, count], "attended/row")
    average = w.reduce("ReduceMean", w.cast(row, onnx.TensorProto.FLOAT), [1])
    mean = w.reshape(average, [-1, count, 1], "attended")
    floor = w.constant(FLOOR, "attended/floor", np.float32)
    return w.one("Sqrt", [w.one("Add", [mean, floor], "attended/Add")], "attended/Sqrt")


def read_weights(features: Features, array: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(batch, merged tokens) weights in float64, from the probabilities of the unmerged graph.

    Args:
        features: what is compared; weighed by attention.
        array: probabilities of the unmerged graph.
        groups: (batch, tokens) the merged token that each belongs to.
    """
    tokens = array.shape[-1]
    row = array.astype(np.float64).reshape(-1, features.attended_heads, tokens, tokens)[:, :, 0].mean(1)
    weights: np.ndarray = np.sqrt(np.stack([np.bincount(g, p) for g, p in zip(groups, row, strict=True)]) + FLOOR)
    return weights
