"""Writing token merging into a graph.

A last pass, over a graph whose widths are done. Nodes behind a merge stay as they are but for numbers of tokens they
hold; attentions learn the tokens' sizes, means over tokens too, and what wants every token gets it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import GraphEdit, OldShape, PlaceWriter, drop_attributes
from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention
from toast_onnx.matching.cores import find_cores
from toast_onnx.matching.facts import slice_operands
from toast_onnx.matching.graph import attribute
from toast_onnx.matching.operators import MEASURING, SCORE_TERMS
from toast_onnx.matching.study import Study
from toast_onnx.model import Model
from toast_onnx.nodes import END
from toast_onnx.rewriting.fusing import fuse_again
from toast_onnx.rewriting.learned import fold_learned, put_back
from toast_onnx.rewriting.shapes import settle_shapes
from toast_onnx.tokens.follow import Flow, TokenAxis, TokenSequence, averaged_axes, follow
from toast_onnx.tokens.metrics import Features, candidates, find_features, write_features, write_weights
from toast_onnx.tokens.nodes import (
    Matched,
    Merge,
    TokenCounts,
    rows,
    write_match,
    write_merge,
    write_ones,
    write_places,
)
from toast_onnx.tokens.points import MergePoint, TokenStudy


@dataclass(frozen=True)
class WrittenMerge:
    """One merge as it stands in a graph.

    Attributes:
        block: the block whose attention it follows.
        tensor: the sum that it merges, by its name in the unmerged graph.
        merged: the same, merged, in the merged graph.
        counts: its counts.
        matched: tensors that say what goes into what; None where unread tokens are dropped.
        features: what the tokens were compared by; None where nothing is compared.
        sequence: its token sequence.
    """

    block: int
    tensor: str
    merged: str
    counts: Merge
    matched: Matched | None
    features: Features | None
    sequence: TokenSequence


def write_merging(
    study: Study, tokens: TokenStudy, removed: Mapping[int, int], metric: str, drop_unread: bool = True
) -> tuple[Model, tuple[WrittenMerge, ...]]:
    """Merge tokens in a graph.

    Args:
        study: the model.
        tokens: where its tokens can be merged.
        removed: block number -> tokens that are merged away behind its attention.
        metric: what tokens are compared by, a name of `METRICS`, or `auto`.
        drop_unread: also drop what nothing reads any more behind the last attention; that changes no output.

    Returns:
        The merged model (the very same one where nothing is merged), and what was written.

    Raises:
        MatchError: a block cannot merge, or its metric cannot be made.
    """
    removed = {b: r for b, r in removed.items() if r}
    if not removed:
        return study.source, ()
    for point in tokens.points:
        if point.block in removed and point.reason is not None:
            raise MatchError(f"tokens cannot be merged behind block {point.block}: {point.reason}")
    work = _Work(study)
    for number, sequence in enumerate(tokens.sequences):
        points = [p for p in tokens.points if p.sequence == number and p.tensor is not None and p.reason is None]
        chosen = {p.tensor: (p.block, removed[p.block]) for p in points if p.block in removed and p.tensor}
        if not chosen:
            continue
        last = next((p for p in points if p.drops), None) if drop_unread else None
        if last is not None:
            chosen.pop(last.tensor or "", None)
        _Sequence(work, sequence, chosen, last, metric).write()
    model = work.apply()
    return model, tuple(work.written)


class _Work:
    """One graph being edited: nodes changed in place, nodes around them."""

    def __init__(self, study: Study) -> None:
        self.study, self.view = study, study.view
        self.edit = GraphEdit(study.view)
        self.nodes: dict[int, onnx.NodeProto] = {}
        self.written: list[WrittenMerge] = []
        self.cores = [core.nodes for core in find_cores(study.view, study.facts)[0]]

    def copy(self, i: int) -> onnx.NodeProto:
        """A copy of a node that may be changed; it takes the node's place."""
        if i in self.nodes:
            raise MatchError(
                f"{self.view.label(i)} joins two sequences of tokens, which cannot both be merged; give tokens.merge "
                "as a list that merges in one of them"
            )
        self.nodes[i] = self.edit.copy(i)
        return self.nodes[i]

    def apply(self) -> Model:
        put_back(self.edit, self.view, self.study.learned)
        model = self.edit.apply()
        settle_shapes(model, self.edit, self.study)
        return fuse_again(fold_learned(model), self.study.spelled_out)


class _Sequence:
    """Writes the merges of one token sequence."""

    def __init__(
        self,
        work: _Work,
        sequence: TokenSequence,
        chosen: Mapping[str, tuple[int, int]],
        last: MergePoint | None,
        metric: str,
    ) -> None:
        self.work, self.view, self.edit = work, work.view, work.edit
        self.facts, self.other = work.study.facts, work.study.other
        self.sequence, self.metric, self.last = sequence, metric, last
        self.order = sorted(chosen, key=lambda name: self.view.producer[name])
        self.blocks = [chosen[name][0] for name in self.order]
        counts = [chosen[name][1] for name in self.order]
        spare = sequence.count - sum(counts) - sequence.front - sequence.back
        self.counts = TokenCounts(sequence, (*counts, spare))
        self.merges = self.counts.merges
        self.dropped = len(counts) + 1  # the stage of what sees special tokens alone
        for block, merge in zip(self.blocks, self.merges, strict=False):
            if not 0 < merge.removed <= min(merge.sources, merge.targets):
                raise MatchError(
                    f"block {block} cannot merge {merge.removed} of {merge.count} tokens: at most "
                    f"{min(merge.sources, merge.targets)} are left to merge there"
                )
        stages = {name: k + 1 for k, name in enumerate(self.order)}
        self.drops = {} if last is None else dict.fromkeys(last.drops, self.dropped)
        self.flow: Flow = follow(work.study, sequence, stages, work.cores, self.drops)
        lost = [b for b, n in zip(self.blocks, self.order, strict=True) if n not in self.flow.tokens]
        if lost:
            raise MatchError(f"tokens cannot be merged behind block {lost[0]} together with those before it")
        if -1 in self.flow.refused:
            raise MatchError(f"tokens cannot be merged: {self.flow.refused[-1]}")
        self.sizes: list[str | None] = [None]
        self.places: list[str | None] = [None]
        self.restored: dict[str, str] = {}
        self.renamed: dict[str, str] = {}

    def write(self) -> None:
        """Change every node that has to change, in order."""
        flow = self.flow
        changed = {*flow.respell, *flow.sized, *flow.weighted, *(i for i, _ in flow.uniform)}
        changed |= {i for _, i in (*flow.unmerge, *self.drops)}
        outputs = {name for name, reader in flow.unmerge if reader == -1}
        end = None if self.last is None else self.last.tensor
        for i, node in enumerate(self.view.nodes):
            made = [n for n in node.output if n in self.order or n in outputs]
            reads_shape = node.op_type in MEASURING
            if made or i in changed or (not reads_shape and any(n in self.renamed for n in node.input)):
                self._change(i, node, made)
            if self.last is not None and end is not None and end in node.output:
                counts = self.merges[-1]
                self.work.written.append(WrittenMerge(self.last.block, end, end, counts, None, None, self.sequence))
            self._note(node)

    def _change(self, i: int, node: onnx.NodeProto, made: Sequence[str]) -> None:
        """Write one node anew, with what must stand in front of it and behind."""
        copy = self.work.copy(i)
        for name, new in self._read_instead(i, node):
            _substitute(copy, name, new)
        for k in [k for reader, k in self.flow.uniform if reader == i]:
            copy.input[k] = self.edit.constant(f"{node.input[k]}/of_any_token", self.flow.uniform[(i, k)])
        if i in self.flow.respell:
            self._respell(i, copy)
        if i in self.flow.sized:
            self._sized(i, copy)
        if i in self.flow.weighted:
            self._weighted(i, copy)
        for name in made:
            inner = self.edit.fresh(f"{name}/all_tokens" if name in self.order else f"{name}/merged")
            copy.output[list(copy.output).index(name)] = inner
            self.renamed[name] = inner
        self.edit.replace(i, copy)
        for name in made:
            if name in self.order:
                self._merge(i, name, self.renamed[name])
            if (name, -1) in self.flow.unmerge:
                self.edit.emit(i, "Identity", [self._unmerged(i, name)], name, f"{name}/unmerged")

    def _read_instead(self, i: int, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
        """Tensors that a node reads, with those that it has to read now."""
        yield from ((name, self._unmerged(i, name)) for name, reader in self.flow.unmerge if reader == i)
        yield from ((name, self._special(i, name)) for name, reader in self.drops if reader == i)
        yield from ((name, self.renamed[name]) for name in node.input if name in self.renamed)

    def _note(self, node: onnx.NodeProto) -> None:
        """Remember where the old extents of merged tensors can be read, for what computes with them."""
        for name in node.output:
            tokens = self.flow.tokens.get(name)
            if tokens is not None and tokens.merged:
                source, origins = self._origins(name)
                self.edit.changed[name] = OldShape(source, origins)

    def _origins(self, name: str) -> tuple[str, tuple[int | tuple[int, int], ...]]:
        """The old extents of a tensor, dynamic ones as multiples of an axis of a graph input."""
        shape, elsewhere = self.facts.shape(name) or (), self.other.shape(name) or ()
        inputs = [i.name for i in self.view.model.proto.graph.input if i.name not in self.view.initializers]
        for source in inputs:
            own, theirs = self.facts.shape(source) or (), self.other.shape(source) or ()
            origins: list[int | tuple[int, int]] = []
            for a, b in zip(shape, elsewhere, strict=True):
                fits = [(k, a // m) for k, (m, n) in enumerate(zip(own, theirs, strict=True)) if m != n and a % m == 0
                        and a // m * n == b]  # fmt: skip
                if a == b:
                    origins.append(a)
                elif fits:
                    origins.append(fits[0])
            if len(origins) == len(shape):
                return source, tuple(origins)
        if self.view.readers(name) != self.view.consumers.get(name, []):
            raise MatchError(
                f"the shape of '{name}' is read behind merged tokens, and no input has its dynamic extents"
            )
        return name, tuple(shape)

    def _writer(self, i: int, name: str) -> PlaceWriter:
        return PlaceWriter(self.edit, i, name, numbered=True)

    def _name(self, i: int) -> str:
        return self.view.nodes[i].name or str(self.view.nodes[i].output[0])

    # What a merge adds.

    def _merge(self, i: int, name: str, raw: str) -> None:
        k = self.order.index(name)
        merge, block = self.merges[k], self.blocks[k]
        w = self._writer(i, f"{self.work.study.match.blocks[block].name}/merge")
        merged = self.edit.fresh(f"{name}/merged")
        attention = self.work.study.match.blocks[block].attention
        assert attention is not None
        features = self._features(name, attention)
        tensor = raw if features.tensor == name else self.renamed.get(features.tensor, features.tensor)
        compared = write_features(w, features, tensor, self.facts.shape(features.tensor) or (), merge.count)
        weigh = write_weights(w, features, self.sizes[-1], merge.count)
        matched = write_match(w, compared, merge, weigh)
        elem = self.facts.elem_type(name)
        x = raw if elem == onnx.TensorProto.FLOAT else w.cast(raw, onnx.TensorProto.FLOAT)
        size = self.sizes[-1] or write_ones(w, x, merge.count)
        means, sizes = write_merge(w, x, size, matched, merge)
        self.edit.emit(i, "Cast", [means], merged, f"{w.name}/tokens", to=elem)
        self.sizes.append(sizes)
        self.places.append(write_places(w, matched, merge, self.places[-1]) if self.flow.unmerge else None)
        self.work.written.append(WrittenMerge(block, name, merged, merge, matched, features, self.sequence))
        self.renamed[name] = merged

    def _features(self, name: str, attention: Attention) -> Features:
        """What the tokens of one merge are compared by: the first metric that this attention has the parts for."""
        wanted = candidates(self.metric)
        for metric in wanted:
            try:
                return find_features(metric, name, attention, self.flow.tokens, self.sequence, self.view, self.facts)
            except MatchError:
                if metric is wanted[-1]:
                    raise
        raise MatchError(f"tokens.metric: {self.metric} names no metric")

    def _special(self, i: int, name: str) -> str:
        """The special tokens of a tensor alone."""
        each = self.flow.tokens[name].axes[0]
        axis, x, left = each.along.axis, self.renamed.get(name, name), self._extent(each)
        w = self._writer(i, f"{name}/special")
        parts = [w.slice(x, axis, 0, self.sequence.front, what="front")] if self.sequence.front else []
        parts += [w.slice(x, axis, left - self.sequence.back, what="back")] if self.sequence.back else []
        return parts[0] if len(parts) == 1 else w.one("Concat", parts, "Concat", axis=axis)

    def _unmerged(self, i: int, name: str) -> str:
        """A tensor with a token for every original place."""
        if name not in self.restored:
            each = self.flow.tokens[name].axes[0]
            w = self._writer(i, f"{name}/unmerge")
            place = self.places[each.stage]
            if place is None:
                raise MatchError(f"the tensor '{name}' is read behind tokens that were dropped")
            along, x = each.along, self.renamed.get(name, name)
            rank = len(self.facts.shape(name) or ())
            turn = [0, along.axis, *(a for a in range(1, rank) if a != along.axis)]
            if along.axis != 1:
                x = w.one("Transpose", [x], "tokens_first", perm=turn)
            if along.first or along.count != self.sequence.count:
                place = w.slice(place, 1, along.first, along.stop, what="places")
                if along.first:
                    place = w.one("Sub", [place, w.numbers([along.first], "first")], "places_from_first")
            x = rows(w, x, place, "tokens")
            if along.axis != 1:
                x = w.one("Transpose", [x], "tokens_back", perm=[int(v) for v in np.argsort(turn)])
            self.restored[name] = x
        return self.restored[name]

    def _size(self, w: PlaceWriter, each: TokenAxis, log: bool) -> str:
        """(batch, tokens) sizes of a range of tokens, or their logarithms."""
        size = self.sizes[each.stage]
        if size is None:
            raise MatchError("an attention follows tokens that were dropped")
        count = self.counts.left(each.stage)
        flat = w.reshape(size, [-1, count], "sizes/Reshape")
        if each.along.first or each.along.count != self.sequence.count:
            start, stop = (
                self.counts.moved(each.along.first, each.stage),
                self.counts.moved(each.along.stop, each.stage),
            )
            flat = w.slice(flat, 1, start, stop, what="sizes/range")
        return w.one("Log", [flat], "log_size") if log else flat

    def _as(self, w: PlaceWriter, x: str, like: str) -> str:
        """A float32 tensor in the precision of one of the original graph."""
        elem = self.facts.elem_type(like)
        return x if elem == onnx.TensorProto.FLOAT else w.cast(x, elem)

    def _sized(self, i: int, node: onnx.NodeProto) -> None:
        """Proportional attention: log(size) on the scores of every key."""
        if node.op_type in SCORE_TERMS:
            self._sized_fused(i, node)
            return
        name = self.view.nodes[i].input[0]
        tokens, shape = self.flow.tokens[name], self.facts.shape(name) or ()
        axis = int(attribute(node, "axis", -1)) % len(shape)  # type: ignore[call-overload]
        over = tokens.axis(axis)
        assert over is not None
        w = self._writer(i, f"{self._name(i)}/sizes")
        term = self._size(w, over, log=True)
        target = [1] * len(shape)
        target[axis] = self._extent(over)
        if tokens.batch is not None:
            target[0] = 0
            if tokens.batch.inner > 1:
                line = w.reshape(term, [0, 1, target[axis]], "by_item")
                heads = w.numbers([1, tokens.batch.inner, 1], "heads")
                term = w.one("Expand", [line, heads], "by_head")
                target[0] = -1
        term = self._as(w, w.reshape(term, target, "on_keys"), name)
        node.input[0] = w.one("Add", [node.input[0], term], "Add")

    def _sized_fused(self, i: int, node: onnx.NodeProto) -> None:
        old = self.view.nodes[i]
        tokens = self.flow.tokens[old.input[1]]
        w = self._writer(i, f"{self._name(i)}/sizes")
        term = w.reshape(self._size(w, tokens.axes[0], log=True), [-1, 1, 1, self._extent(tokens.axes[0])], "on_keys")
        queries = self.flow.tokens.get(old.input[0])
        q_shape = self.facts.shape(old.input[0]) or ()
        rows = q_shape[-2] if queries is None else self._extent(queries.axes[0])
        if (old.input[0], i) in self.drops:
            rows = self.sequence.front + self.sequence.back
        term = w.one("Expand", [term, w.numbers([1, 1, rows, 1], "queries")], "for_queries")
        place = SCORE_TERMS[node.op_type]
        _pad_inputs(node, place + 1)
        node.input[place] = self._as(w, term, old.input[0])

    def _weighted(self, i: int, node: onnx.NodeProto) -> None:
        """A mean over tokens counts each as often as it stands for others."""
        old = self.view.nodes[i]
        name = old.input[0]
        tokens, shape = self.flow.tokens[name], self.facts.shape(name) or ()
        each = tokens.axes[0]
        w = self._writer(i, f"{self._name(i)}/sizes")
        size = self._size(w, each, log=False)
        axes = sorted(averaged_axes(self.facts, old, len(shape)))
        if old.op_type != "ReduceSum":
            total = w.constant(np.prod([shape[a] for a in axes]), "count", np.float32)
            size = w.one("Div", [size, total], "share")
        target = [1] * len(shape)
        target[0] = 0 if tokens.batch is not None else 1
        target[each.along.axis] = self._extent(each)
        size = self._as(w, w.reshape(size, target, "share/Reshape"), name)
        product = w.one("Mul", [node.input[0], size], "Mul")
        keep = 1 if old.op_type == "GlobalAveragePool" else int(attribute(old, "keepdims", 1))  # type: ignore[call-overload]
        node.CopyFrom(
            onnx.helper.make_node(
                "ReduceSum", [product, w.numbers(axes, "axes")], [node.output[0]], name=node.name, keepdims=keep
            )
        )

    # Numbers of tokens in nodes that move data.

    def _extent(self, each: TokenAxis) -> int:
        """Number of tokens of a range now."""
        return self.counts.moved(each.along.stop, each.stage) - self.counts.moved(each.along.first, each.stage)

    def _respell(self, i: int, node: onnx.NodeProto) -> None:
        old = self.view.nodes[i]
        w = self._writer(i, f"{self._name(i)}/merged")
        if old.op_type in ("Reshape", "Expand"):
            node.input[1] = w.numbers(self._target(i), "shape")
            drop_attributes(node, "allowzero")
            return
        if old.op_type == "Slice":
            self._respell_slice(i, node, w)
            return
        axis = int(attribute(old, "axis", 0)) % len(self.facts.shape(old.input[0]) or ())  # type: ignore[call-overload]
        each = self.flow.tokens[old.input[0]].axis(axis)
        if old.op_type == "Split" and each is not None:
            sizes = [(self.facts.shape(n) or ())[axis] for n in old.output]
            ends = np.cumsum([0, *sizes]) + each.along.first
            moved = [self.counts.moved(int(p), each.stage) for p in ends]
            _pad_inputs(node, 2)
            node.input[1] = w.numbers(np.diff(moved).tolist(), "split")
            drop_attributes(node, "num_outputs")
        elif old.op_type == "Gather" and each is not None:
            index = np.asarray(self.facts.value(old.input[1]))
            node.input[1] = w.constant(_renumbered(self.counts, index, each), "indices")

    def _target(self, i: int) -> list[int]:
        """Target of a Reshape or Expand: numbers of tokens as they are now, dynamic extents copied or left over."""
        old = self.view.nodes[i]
        source, made = old.input[0], old.output[0]
        shape, elsewhere = self.facts.shape(made) or (), self.other.shape(made) or ()
        before, before_elsewhere = self.facts.shape(source) or (), self.other.shape(source) or ()
        tokens = self.flow.tokens.get(made)
        target: list[int] = []
        for axis, extent in enumerate(shape):
            each = None if tokens is None else tokens.axis(axis)
            now = extent if each is None else extent // each.along.count * self._extent(each)
            if extent == elsewhere[axis]:
                target.append(now)
            elif axis < len(before) and (before[axis], before_elsewhere[axis]) == (extent, elsewhere[axis]):
                target.append(1 if old.op_type == "Expand" else 0)
            else:
                target.append(-1)
        if target.count(-1) > (0 if old.op_type == "Expand" else 1):
            raise MatchError(f"{self.view.label(i)} has several dynamic extents behind merged tokens")
        return target

    def _respell_slice(self, i: int, node: onnx.NodeProto, w: PlaceWriter) -> None:
        old = self.view.nodes[i]
        shape = self.facts.shape(old.input[0]) or ()
        source = self.flow.tokens[old.input[0]]
        starts, ends, axes, _ = slice_operands(self.facts, old)
        new_starts, new_ends, changed = starts.astype(np.int64), ends.astype(np.int64), False
        for k, axis in enumerate(axes):
            each = source.axis(int(axis) % len(shape))
            if each is None or each.along.inner != 1:
                continue
            extent = shape[each.along.axis]
            start, stop, _ = slice(int(starts[k]), int(ends[k])).indices(extent)
            base = self.counts.moved(each.along.first, each.stage)
            new_starts[k] = self.counts.moved(start + each.along.first, each.stage) - base
            new_ends[k] = END if stop == extent else self.counts.moved(stop + each.along.first, each.stage) - base
            changed = True
        if changed:
            node.input[1], node.input[2] = (
                w.numbers(new_starts.tolist(), "starts"),
                w.numbers(new_ends.tolist(), "ends"),
            )
            _pad_inputs(node, 4)
            node.input[3] = w.numbers([int(a) for a in axes], "axes")


def _renumbered(counts: TokenCounts, index: np.ndarray, each: TokenAxis) -> np.ndarray:
    """What indices into a range of tokens are behind the merges.

    An index names a token, its end names where it stops: those at the back are counted from there.
    """
    known = np.where(index < 0, index + each.along.count, index) + each.along.first
    base = counts.moved(each.along.first, each.stage)
    places = [counts.moved(int(p) + 1, each.stage) - 1 - base for p in known.reshape(-1)]
    return np.asarray(places, np.int64).reshape(known.shape)


def _pad_inputs(node: onnx.NodeProto, count: int) -> None:
    node.input.extend([""] * (count - len(node.input)))


def _substitute(node: onnx.NodeProto, name: str, new: str) -> None:
    for k, old in enumerate(node.input):
        if old == name:
            node.input[k] = new
