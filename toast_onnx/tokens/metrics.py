"""What tokens are compared by. A metric is one entry of the table: its name, its sentence, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention
from toast_onnx.tokens.follow import Tokens
from toast_onnx.tokens.nodes import Writer


@dataclass(frozen=True)
class Metric:
    """A way to compare tokens, by the cosine of features.

    Attributes:
        name: what ratios files call it.
        sentence: its description in the docs.
        part: where the features come from: keys or values of the attention in front, or the stream itself.
        average: whether heads are averaged; otherwise they stand side by side.
        by_size: whether pairs are weighed by what merging them loses (Ward), not by the cosine alone.
    """

    name: str
    sentence: str
    part: Literal["k", "v", "stream"]
    average: bool = False
    by_size: bool = True


METRICS = {
    m.name: m
    for m in (
        Metric("keys", "keys averaged over heads, as ToMe compares them", "k", average=True, by_size=False),
        Metric("keys-by-head", "keys of all heads side by side, which need no axes in common", "k", by_size=False),
        Metric("values", "values of all heads side by side", "v"),
        Metric("tokens", "the tokens themselves, after the attention", "stream"),
    )
}


#: What measured best of those that every attention offers (benchmarks/tokens.py).
DEFAULT_METRIC = "keys-by-head"


@dataclass(frozen=True)
class Features:
    """Where a metric's features lie.

    Attributes:
        tensor: the tensor, by its name in the unmerged graph.
        tokens: where its tokens lie.
        columns: (features,) its channels that are compared; None for all.
        heads: number of heads that are averaged, 1 for none.
        by_size: whether pairs are weighed by their sizes.
    """

    tensor: str
    tokens: Tokens
    columns: np.ndarray | None
    heads: int
    by_size: bool


def find_features(metric: Metric, stream: str, attention: Attention, tokens: Mapping[str, Tokens]) -> Features:
    """Where the features of a metric lie at one merge.

    Args:
        metric: the metric.
        stream: the tokens to merge, (batch, tokens, channels).
        attention: the attention in front of the merge.
        tokens: tensor -> where its tokens lie.

    Raises:
        MatchError: the attention has no such part, or its tokens lie in another order.
    """
    if metric.part == "stream":
        return Features(stream, tokens[stream], None, 1, metric.by_size)
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
    return Features(branch.linear.output, found, columns, heads, metric.by_size)


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
