"""What tokens are compared by. A metric is one entry of the table: its name, its sentence, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.tokens.follow import Tokens, TokenSequence
from toast_onnx.tokens.nodes import Writer

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
        tensor: the tensor, by its name in the unmerged graph.
        tokens: where its tokens lie.
        columns: (features,) its channels that are compared; None for all.
        heads: number of heads that are averaged, 1 for none.
        metric: the metric.
        attended: for weights by attention, the tensor of probabilities (queries and keys on its last axes).
        attended_heads: number of heads in it.
    """

    tensor: str
    tokens: Tokens
    columns: np.ndarray | None
    heads: int
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
        return Features(stream, tokens[stream], None, 1, metric)
    branch = attention.k if metric.part == "k" else attention.v
    what = "keys" if metric.part == "k" else "values"
    found = None if branch is None else tokens.get(branch.linear.output)
    if branch is None or found is None or len(found.axes) != 1 or branch.linear.channel_axis == 1:
        raise MatchError(f"the {what} of an attention were not found as a sequence; choose tokens.metric: tokens")
    along, batch = found.axes[0].along, found.batch
    if along.inner != 1 and (along.axis != 0 or batch is None):
        raise MatchError(f"the {what} of an attention lie in another order; choose tokens.metric: tokens")
    columns = branch.layout.channels.reshape(-1)
    heads = branch.layout.num_heads if metric.average else 1
    if metric.weight != "attention":
        return Features(branch.linear.output, found, columns, heads, metric)
    attended = _attended(attention, tokens, sequence, view, facts)
    return Features(branch.linear.output, found, columns, heads, metric, *attended)


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


def write_features(w: Writer, features: Features, tensor: str, count: int, width: int) -> str:
    """Nodes that make (batch, tokens, features) in float32.

    Args:
        w: writer.
        features: where they lie.
        tensor: the tensor's name in the graph that is written.
        count: number of tokens now.
        width: channels of the tensor.
    """
    along, batch = features.tokens.axes[0].along, features.tokens.batch
    x = tensor
    if along.axis == 0 and (batch is None or batch.axis == 1):
        x = w.one("Transpose", [x], "features/Transpose", perm=[1, 0, 2])
    elif along.axis == 0:
        x = w.reshape(x, [-1, count, width], "features/Reshape")
    columns = features.columns
    if (columns is not None and columns.size < width) or not _in_order(columns):
        assert columns is not None
        if np.array_equal(columns, np.arange(columns[0], columns[0] + columns.size)):
            x = w.slice(x, 2, int(columns[0]), int(columns[-1]) + 1, what="features/Slice")
        else:
            x = w.one("Gather", [x, w.numbers(columns.tolist(), "columns")], "features/Gather", axis=2)
    if features.heads > 1:
        x = w.mean(w.reshape(x, [0, 0, features.heads, -1], "features/by_head"), 2)
    return w.cast(x, onnx.TensorProto.FLOAT)


def write_weights(w: Writer, features: Features, size: str | None, count: int) -> str | None:
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
    mean = w.reshape(w.mean(w.cast(row, onnx.TensorProto.FLOAT), 1), [-1, count, 1], "attended")
    floor = w.edit.constant(f"{w.name}/attended/floor", np.asarray(FLOOR, np.float32))
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


def _in_order(columns: np.ndarray | None) -> bool:
    return columns is None or np.array_equal(columns, np.arange(columns.size))


def read_features(features: Features, array: np.ndarray, count: int) -> np.ndarray:
    """(batch, tokens, features) in float64, read from the tensor's value in the unmerged graph.

    Args:
        features: where they lie.
        array: value of the tensor.
        count: number of tokens of the unmerged graph.
    """
    along, batch = features.tokens.axes[0].along, features.tokens.batch
    x = array.astype(np.float64)
    if along.axis == 0:
        x = x.swapaxes(0, 1) if batch is None or batch.axis == 1 else x.reshape(-1, count, x.shape[-1])
    if features.columns is not None:
        x = x[..., features.columns]
    by_head: np.ndarray = x.reshape(*x.shape[:2], features.heads, -1)
    return np.asarray(by_head.mean(2))
