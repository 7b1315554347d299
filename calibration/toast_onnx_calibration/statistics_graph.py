"""The measuring graph: nodes behind a model's activations that reduce them to the sums the solvers need.

Only d x d matrices leave the session. Everything that leaves is a sum over samples, so batches, shards and repetitions
add up; `shift` alone is not, it says around what a batch's moments were taken (`sums.unshift` takes it out).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, pairwise

import numpy as np
import onnx

from toast_onnx.matching.blocks import Attention, Block, Branch
from toast_onnx.matching.class_token import ClassToken, class_token
from toast_onnx.matching.layout import HEAD, Factor
from toast_onnx.matching.study import Study
from toast_onnx.model import reads
from toast_onnx_calibration.graph_writer import GraphWriter
from toast_onnx_calibration.padding import Padding, padding_of, token_weights
from toast_onnx_calibration.tokens import Tokens, as_float, as_tokens

#: What can be asked for of one block.
PARTS = ("qk", "context", "hidden", "inputs", "fc1", "fc2")

#: Channels of a panel of a Gram matrix, at least; products of narrower ones are slower than they are fewer.
PANEL = 192


@dataclass(frozen=True)
class TokenSettings:
    """Which tokens count.

    Attributes:
        fraction: of the tokens to sample for context, hidden and input moments; 1 takes all.
        class_weight: of the class token, where the output is shown to read nothing else.
        seed: of the sample.
    """

    fraction: float = 1.0
    class_weight: float = 20.0
    seed: int = 0


@dataclass
class MeasuringGraph:
    """A model whose outputs are sums.

    Attributes:
        proto: the model.
        outputs: key of a sum, such as `3.hidden.gram` -> tensor that holds it.
        watched: tensors that the measuring nodes read, the model's and their own.
        notes: what the user should know.
        class_token: whether the class token was weighted.
    """

    proto: onnx.ModelProto
    outputs: dict[str, str]
    watched: frozenset[str]
    notes: list[str] = field(default_factory=list)
    class_token: bool = False


def measuring_graph(study: Study, wanted: Mapping[int, Iterable[str]], settings: TokenSettings) -> MeasuringGraph:
    """Append to a copy of the model what measures the wanted parts of its blocks.

    Args:
        study: the model.
        wanted: block number -> parts, of `PARTS`.
        settings: which tokens count.
    """
    build = _Build(study, settings)
    for index, parts in sorted(wanted.items()):
        build.block(study.match.blocks[index], frozenset(parts))
    proto, outputs = build.writer.finish()
    watched = frozenset(name for node in proto.graph.node[len(study.view.nodes) :] for name in reads(node))
    return MeasuringGraph(proto, outputs, watched, list(dict.fromkeys(build.notes)), build.weighted)


class _Build:
    def __init__(self, study: Study, settings: TokenSettings) -> None:
        self.study = study
        self.settings = settings
        self.writer = GraphWriter(study.view.model)
        self.cls: ClassToken | None = class_token(study.view, study.facts)
        self.notes: list[str] = []
        self.weighted = False

    def block(self, block: Block, parts: frozenset[str]) -> None:
        """Measure one block."""
        attention, ffn, key = block.attention, block.ffn, str(block.index)
        keys = self._padding(attention) if attention is not None else None
        padding = keys if attention is not None and attention.own_keys else None
        if attention is not None and "qk" in parts and attention.q is not None and attention.k is not None:
            self._queries(attention, attention.q, padding, key)
            self._keys(attention, attention.k, keys, key)
        if attention is not None and "context" in parts and attention.proj is not None:
            linear = attention.proj.linear
            self._moments(self._see(linear.input, linear.channel_axis), padding, f"{key}.context")
        if ffn is None:
            return
        if parts & {"hidden", "fc2"}:
            hidden = self._see(ffn.fc2.input, ffn.fc2.channel_axis)
            if "hidden" in parts:
                self._moments(hidden, padding, f"{key}.hidden")
            if "fc2" in parts:
                self._magnitudes(hidden, padding, attention, f"{key}.fc2")
        if parts & {"inputs", "fc1"}:
            inputs = self._see(ffn.entries[0].input, ffn.entries[0].channel_axis)
            if "inputs" in parts:
                self._moments(inputs, padding, f"{key}.inputs")
            if "fc1" in parts:
                self._magnitudes(inputs, padding, attention, f"{key}.fc1")

    def _see(self, tensor: str, channel_axis: int) -> Tokens:
        return as_tokens(self.writer, self.study, tensor, channel_axis)

    # --- padding ---

    def _padding(self, attention: Attention) -> Padding | None:
        """The keys that count, over all masks of an attention; None where all do."""
        found, strange = padding_of(self.writer, self.study, attention)
        if strange:
            self._note("a mask of an unusual shape was found: padded tokens count in the statistics")
        return found

    def _note(self, text: str) -> None:
        self.notes.append(text)

    def _weights(self, tokens: Tokens, padding: Padding | None) -> str | None:
        """(batch, tokens, 1) weights for a tensor, in the order of its axes; None where all its tokens count."""
        if padding is None:
            return None
        found = token_weights(self.writer, tokens, padding)
        if found is None:
            self._note("padded tokens could not be told apart in some layers and count in their statistics")
        return found

    # --- moments ---

    def _moments(self, tokens: Tokens, padding: Padding | None, key: str) -> None:
        """Count, sum and Gram matrix of tokens minus `shift`: each alpha * (sampled tokens) + beta * (class token).

        The shift is the batch's own mean. In float32 the raw Gram matrix of activations with a mean far from zero would
        lose their covariance to rounding.
        """
        w, weights = self.writer, self._weights(tokens, padding)
        shift = w.reduce("ReduceMean", tokens.tensor, list(range(tokens.rank - 1)))
        x = w.one("Sub", [tokens.tensor, shift])
        if weights is not None:
            x = w.one("Mul", [x, weights])
        chosen, alpha, beta = self._chosen(tokens)
        total_c = count_c = ""
        first = None
        if beta:
            assert tokens.axis is not None
            first = w.gather(x, 0, tokens.axis)  # (batch, channels)
            total_c = w.scaled(w.reduce("ReduceSum", first, [0]), beta)
            count_c = w.scaled(self._count(first, weights and w.gather(weights, 0, tokens.axis)), beta)
        if chosen is not None:
            assert tokens.axis is not None
            x = w.gather(x, chosen, tokens.axis)
            weights = weights and w.gather(weights, chosen, tokens.axis)
        flat = w.reshape(x, [-1, tokens.channels])
        flat_weights = weights and w.reshape(weights, [-1, 1])
        self._gram(key, flat, first, tokens.channels, alpha, float(beta or 1))
        total = w.scaled(w.reduce("ReduceSum", flat, [0]), alpha)
        count = w.scaled(self._count(flat, flat_weights), alpha)
        w.output(f"{key}.total", w.one("Add", [total, total_c]) if beta else total)
        w.output(f"{key}.count", w.one("Add", [count, count_c]) if beta else count)
        w.output(f"{key}.shift", shift)

    def _gram(self, key: str, x: str, first: str | None, width: int, alpha: float, beta: float) -> None:
        """`gram`: alpha * x^T x + beta * first^T first of matrices (rows, width); of wide ones its panels `gram/i/j`.

        Panels below the diagonal are left out: `sums.joined` mirrors those above it. Joined in the graph, they
        would take half as much memory again (DeiT-B, batches of 16).
        """
        w, panels = self.writer, min(4, max(1, width // PANEL))
        edges = [round(k * width / panels) for k in range(panels + 1)]

        def parted(matrix: str) -> list[str]:
            return [w.slice(matrix, 1, a, b) for a, b in pairwise(edges)] if panels > 1 else [matrix]

        rows, tokens = parted(x), None if first is None else parted(first)
        for i, j in combinations_with_replacement(range(panels), 2):
            added = [] if tokens is None else [w.one("Gemm", [tokens[i], tokens[j]], transA=1)]
            product = w.one("Gemm", [rows[i], rows[j], *added], transA=1, alpha=alpha, beta=beta)
            w.output(f"{key}.gram" if panels == 1 else f"{key}.gram/{i}/{j}", product)

    def _count(self, flat: str, weights: str | None) -> str:
        """Number of rows of a 2-D tensor, or the sum of their weights (rows, 1); shape (1,)."""
        w = self.writer
        return w.extent(flat, 0) if not weights else w.reshape(w.reduce("ReduceSum", weights, [0]), [1])

    def _chosen(self, tokens: Tokens) -> tuple[np.ndarray | None, float, float]:
        """Sampled token numbers (None: all), and the factors alpha and beta of sampled tokens and class token."""
        boosted = self._has_class(tokens)
        fraction = self.settings.fraction
        if fraction >= 1 or tokens.axis is None or not tokens.fixed:
            if fraction < 1:
                self._note("tokens of a varying number, or in flattened rows, were all taken, none sampled")
            return None, 1.0, (self.settings.class_weight - 1) if boosted else 0.0
        start = 1 if boosted else 0
        number = max(1, round((tokens.count - start) * fraction))
        draw = np.random.default_rng(self.settings.seed).choice(tokens.count - start, number, replace=False)
        chosen = np.sort(draw) + start
        # The class token's weight is relative to all patches, sampled or not.
        return (chosen, (tokens.count - 1) / number, self.settings.class_weight) if boosted else (chosen, 1.0, 0.0)

    def _has_class(self, tokens: Tokens) -> bool:
        if self.cls is None or self.settings.class_weight == 1:
            return False
        found = tokens.axis is not None and tokens.count == self.cls.tokens
        self.weighted |= found
        return found

    # --- queries and keys ---

    def _operands(self, attention: Attention) -> tuple[tuple[str, int], tuple[str, int]]:
        """Queries and keys as the scores see them: (tensor, axis of the head's dimensions) of each.

        Pooled queries are taken before their tokens are pooled, in the layout that is known of them.
        """
        core, nodes = attention.core, self.study.view.nodes
        if attention.cosine:  # divided by their lengths, in the layout that they had before
            (_, q), (_, k) = attention.divisions
            return (nodes[q].output[0], -1), (nodes[k].output[0], -1)
        pooled = next((region.start for region in attention.regions if region.pools), core.q)
        return (pooled, -1), (core.k, core.k_dim_axis)

    def _queries(self, attention: Attention, q: Branch, padding: Padding | None, key: str) -> None:
        """`qq`: sum of q q^T for every head, and its `count`."""
        w, (operand, dim) = self.writer, self._operands(attention)[0]
        x = as_float(w, self.study, operand)
        weights = self._operand_padding(operand, padding, -2)
        if weights is not None:
            x = w.one("Mul", [x, weights])
        gram = self._product(x, dim, q)
        shape = self.study.facts.shape(operand) or ()
        rank = len(shape)
        count = self._positions(x, rank, attention, weights)
        if self.cls is not None and shape[-2] == self.cls.tokens and self.settings.class_weight != 1:
            first = w.gather(x, [0], rank - 2)
            extra = w.scaled(self._product(first, dim, q), self.settings.class_weight - 1)
            gram = w.one("Add", [gram, extra])
            ones = weights and w.gather(weights, [0], 2)
            more = self._positions(first, rank, attention, ones)
            count = w.one("Add", [count, w.scaled(more, self.settings.class_weight - 1)])
            self.weighted = True
        w.output(f"{key}.qq.gram", gram)
        w.output(f"{key}.qq.count", count)

    def _keys(self, attention: Attention, k: Branch, padding: Padding | None, key: str) -> None:
        """`kk`: covariance of the keys of one image or window, summed for every head, and its `count`.

        Where the probabilities are to be had, it is taken around the mean that each query sees, weighted by the
        attention it gives: the second-order expansion of the attention's own Kullback-Leibler divergence. Elsewhere
        all tokens count equally. Cosine attention shares no shift between its keys, so they are not centred.
        """
        w, (operand, dim) = self.writer, self._operands(attention)[1]
        if attention.qk_groups is not None and attention.core.kind == "matmul":
            assert attention.q is not None
            k = attention.q  # repeated for each of them, keys lie in the product as queries do
        x = as_float(w, self.study, operand)
        rank = len(self.study.facts.shape(operand) or ())
        axis = rank - (2 if dim == -1 else 1)  # of the tokens
        weights = self._operand_padding(operand, padding, axis - rank)
        heads = k.layout.num_heads if attention.grouped else None
        count = self._positions(x, rank, attention, weights, heads)
        if attention.cosine:
            gram = self._product(x if weights is None else w.one("Mul", [x, weights]), dim, k)
        else:
            centred = self._centred(x, axis, weights)
            gram = self._seen_by_queries(attention, k, centred, dim, padding) or self._product(centred, dim, k)
        w.output(f"{key}.kk.gram", gram)
        w.output(f"{key}.kk.count", count)

    def _centred(self, x: str, axis: int, weights: str | None) -> str:
        """Keys around their mean over the tokens that count; the others zero."""
        w = self.writer
        if weights is None:
            return w.one("Sub", [x, w.reduce("ReduceMean", x, [axis], keep=True)])
        total = w.reduce("ReduceSum", w.one("Mul", [x, weights]), [axis], keep=True)
        number = w.one("Max", [w.reduce("ReduceSum", weights, [axis], keep=True), w.constant(1.0, dtype=np.float32)])
        return w.one("Mul", [w.one("Sub", [x, w.one("Div", [total, number])]), weights])

    def _seen_by_queries(
        self, attention: Attention, k: Branch, centred: str, dim: int, padding: Padding | None
    ) -> str | None:
        """Sum over queries i of sum_j p_ij (k_j - m_i)(k_j - m_i)^T with m_i = sum_j p_ij k_j; None without p."""
        w, core, facts = self.writer, attention.core, self.study.facts
        if core.kind != "matmul" or core.mixed:
            return None
        probabilities = self.study.view.nodes[core.softmax].output[0]
        shape, keys = facts.shape(probabilities), facts.shape(core.k)
        if shape is None or keys is None or shape[:-2] != keys[:-2] or len(shape) < 3:
            return None
        rank = len(shape)
        p = as_float(w, self.study, probabilities)
        if padding is not None and attention.own_keys:
            queries = self._operand_padding(core.q, padding, -2)
            if queries is None or rank != 4:
                return None
            p = w.one("Mul", [p, queries])
        swap = [*range(rank - 2), rank - 1, rank - 2]
        flipped = w.one("Transpose", [centred], perm=swap)
        tall, flat = (centred, flipped) if dim == -1 else (flipped, centred)  # (..., tokens, d) and (..., d, tokens)
        received = w.reduce("ReduceSum", p, [rank - 2], keep=True)  # (..., 1, tokens)
        squares = w.one("MatMul", [w.one("Mul", [flat, received]), tall])
        means = w.one("MatMul", [p, tall])  # (..., queries, d)
        between = w.one("MatMul", [w.one("Transpose", [means], perm=swap), means])
        return self._by_head(w.one("Sub", [squares, between]), k.layout.axes[: rank - 2], k)

    def _operand_padding(self, operand: str, padding: Padding | None, axis: int) -> str | None:
        """Padding weights broadcast against an operand of the core whose tokens lie on `axis` (negative)."""
        if padding is None:
            return None
        shape = self.study.facts.shape(operand) or ()
        heads_apart = len(shape) == 4
        usual = len(shape) == 4 or (len(shape) == 3 and axis == -2)
        if not usual or not padding.fits(shape[0], shape[axis]):
            self._note("padded tokens could not be told apart in some queries or keys and count in their statistics")
            return None
        axes = {(True, -2): [1, 3], (True, -1): [1, 2], (False, -2): [2]}[(heads_apart, axis)]
        return self.writer.unsqueeze(padding.tensor, axes)

    def _product(self, x: str, dim: int, branch: Branch) -> str:
        """x x^T over tokens, summed over all that is no head: (heads, d, d), or (heads * d, heads * d) where joined."""
        w, axes = self.writer, branch.layout.axes
        rank = len(axes)
        swap = [*range(rank - 2), rank - 1, rank - 2]
        flipped = w.one("Transpose", [x], perm=swap)
        gram = w.one("MatMul", [flipped, x] if dim == -1 else [x, flipped])
        if any(f.source == HEAD for f in axes[dim]):
            return w.reduce("ReduceSum", gram, list(range(rank - 2))) if rank > 2 else gram
        return self._by_head(gram, axes[: rank - 2], branch)

    def _by_head(self, gram: str, leading: tuple[tuple[Factor, ...], ...], branch: Branch) -> str:
        w, (heads, d) = self.writer, branch.layout.channels.shape
        at = next((k for k, factors in enumerate(leading) if any(f.source == HEAD for f in factors)), None)
        rest = [k for k in range(len(leading)) if k != at]
        if rest:
            gram = w.reduce("ReduceSum", gram, rest)
        if at is None:
            return w.reshape(gram, [1, d, d])
        sources = [f.source for f in leading[at]]
        if len(sources) == 1:
            return gram
        after = leading[at][sources.index(HEAD) + 1 :]
        if any(f.dynamic for f in after):  # then what comes before the heads is fixed
            before = int(np.prod([f.size for f in leading[at][: sources.index(HEAD)]], dtype=np.int64))
            gram = w.reshape(gram, [before, heads, -1, d, d])
        else:
            gram = w.reshape(gram, [-1, heads, int(np.prod([f.size for f in after], dtype=np.int64)), d, d])
        return w.reduce("ReduceSum", gram, [0, 2])

    def _positions(self, x: str, rank: int, attention: Attention, weights: str | None, heads: int | None = None) -> str:
        """Number of tokens in an operand of so many heads, the attention's own by default, over all items, (1,)."""
        w = self.writer
        if weights is not None:  # (batch, 1, tokens, 1), or 1 for the batch
            each = w.reduce("ReduceSum", weights, list(range(1, rank)))  # (batch or 1,)
            items = w.one("Shape", [x])
            return w.reshape(w.reduce("ReduceSum", w.one("Expand", [each, w.gather(items, [0], 0)]), [0]), [1])
        width = (heads or attention.num_heads) * attention.qk_dim
        size = w.one("Cast", [w.one("Size", [x])], to=onnx.TensorProto.FLOAT)
        return w.reshape(w.one("Div", [size, w.constant(width, dtype=np.float32)]), [1])

    # --- magnitudes, for the paper's token channel selection ---

    def _magnitudes(self, tokens: Tokens, padding: Padding | None, attention: Attention | None, key: str) -> None:
        """`magnitude`: sum of |x| for every position, `images`, and the class token's `attention` to positions."""
        w = self.writer
        if tokens.axis is None or not tokens.fixed:
            flat = w.reshape(tokens.tensor, [1, -1, tokens.channels])
            total = w.reduce("ReduceSum", w.one("Abs", [flat]), [1])
            w.output(f"{key}.magnitude", total)  # (1, channels): positions cannot be told apart
            w.output(f"{key}.images", w.extent(w.reshape(tokens.tensor, [-1, tokens.channels]), 0))
            return
        x, weights = w.one("Abs", [tokens.tensor]), self._weights(tokens, padding)
        if weights is not None:
            x = w.one("Mul", [x, weights])
        w.output(f"{key}.magnitude", w.reduce("ReduceSum", x, [1 - tokens.axis]))  # (tokens, channels)
        w.output(f"{key}.images", w.extent(x, 1 - tokens.axis))
        if self.cls is not None and attention is not None and tokens.count == self.cls.tokens:
            row = self._class_attention(attention)
            if row is not None:
                w.output(f"{key}.attention", row)

    def _class_attention(self, attention: Attention) -> str | None:
        """Attention of the class token to every token, averaged over heads and summed over items, (tokens,)."""
        w, core = self.writer, attention.core
        if core.kind != "matmul":
            self._note("a fused attention node hides its probabilities: patches are not weighted by attention")
            return None
        if core.mixed:
            self._note("heads are mixed after their softmax: patches are not weighted by attention")
            return None
        probabilities = self.study.view.nodes[core.softmax].output[0]
        rank = len(self.study.facts.shape(probabilities) or ())
        x = w.gather(as_float(w, self.study, probabilities), 0, rank - 2)
        return w.scaled(w.reduce("ReduceSum", x, list(range(rank - 2))), 1 / attention.num_heads)
