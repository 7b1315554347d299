"""Following the tokens of a sequence through a graph, from where they may be merged to whatever reads them.

After merging, a token stands for several. Everything that acts on each token alone goes on as it was; every sum over
tokens (the weighted sum of an attention, a mean) has to count a token as often as it stands for others; whatever wants
a token's own place gets the tokens back (*unmerging*) in front of it. Where one of these cannot be done, the walk says
so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from toast_onnx.matching.facts import Facts, Probe, reduced_axes
from toast_onnx.matching.graph import attribute
from toast_onnx.matching.operators import (
    ELEMENTWISE,
    MEASURING,
    MOVEMENT,
    NORMS,
    REDUCTIONS,
    SCORE_TERMS,
    Effect,
    Trait,
    having,
    operators,
)
from toast_onnx.matching.probe import data_inputs
from toast_onnx.model import reads
from toast_onnx.reasons import Decline, Kind, Reason
from toast_onnx.tokens.along import Along, read_along, single_index
from toast_onnx.tokens.uniform import uniform_value

_ADDS, _SHARES = operators(Effect.ADDS_AND_NORMS), operators(Effect.SHARES)
_SCALES, _RESPELLS = having(Trait.SCALES), having(Trait.RESPELLS)


@dataclass(frozen=True)
class TokenAxis:
    """Tokens along one axis of a tensor.

    Attributes:
        along: where they lie, numbered as they were before any merging.
        stage: number of merges in front of the tensor.
        counted: whether merged tokens already count as many times as they stand for (probabilities do).
    """

    along: Along
    stage: int
    counted: bool = False


@dataclass(frozen=True)
class Tokens:
    """The tokens of a tensor.

    Attributes:
        batch: where the items of the batch lie; None where one item is all there is.
        axes: one entry for a sequence, two for attention scores.
    """

    batch: Along | None
    axes: tuple[TokenAxis, ...]

    @property
    def merged(self) -> bool:
        """Whether some of the tokens may be merged ones."""
        return any(a.stage for a in self.axes)

    def axis(self, axis: int) -> TokenAxis | None:
        """The tokens along an axis."""
        return next((a for a in self.axes if a.along.axis == axis), None)


@dataclass
class Flow:
    """What the walk found.

    Attributes:
        tokens: tensor -> its tokens.
        respell: nodes that only move data and hold numbers of tokens.
        uniform: (node, operand) -> the operand without an entry for every token, where all entries were the same.
        sized: softmax or fused attention nodes that must learn the tokens' sizes.
        weighted: reductions over tokens that must learn the sizes.
        unmerge: (tensor, reader) pairs; the reader -1 is the graph's output.
        refused: attention nodes that cannot take merged tokens, with the reason.
        reasons: (tensor, reader) -> why it is unmerged.
    """

    tokens: dict[str, Tokens] = field(default_factory=dict)
    respell: list[int] = field(default_factory=list)
    uniform: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    sized: list[int] = field(default_factory=list)
    weighted: list[int] = field(default_factory=list)
    unmerge: list[tuple[str, int]] = field(default_factory=list)
    refused: dict[int, Reason] = field(default_factory=dict)
    reasons: dict[tuple[str, int], Reason] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSequence:
    """A sequence of tokens.

    Attributes:
        start: tensor (batch, tokens, channels) where it is looked at first.
        count: number of tokens.
        front, back: tokens at either end that are never merged (class token, registers).
    """

    start: str
    count: int
    front: int
    back: int

    def is_special(self, along: Along) -> bool:
        """Whether all tokens of a range are never merged."""
        return along.stop <= self.front or along.first >= self.count - self.back

    def is_whole(self, along: Along) -> bool:
        """Whether a range holds every token that may be merged."""
        return along.first <= self.front and along.stop >= self.count - self.back


class Walker:
    """Walks a graph once, in order."""

    def __init__(
        self,
        probe: Probe,
        sequence: TokenSequence,
        merges: Mapping[str, int],
        cores: Sequence[tuple[int, ...]],
        refused: Mapping[int, Reason],
        drops: Mapping[tuple[str, int], int],
    ) -> None:
        """Prepare.

        Args:
            probe: the graph and its facts.
            sequence: the tokens.
            merges: tensor -> stage of what reads it, for tensors behind which tokens are merged.
            cores: nodes of every attention, from the score product to the weighted sum.
            refused: first node of attentions that are known to need all tokens, with the reason.
            drops: (tensor, reader) -> stage of what that reader sees: the special tokens alone.
        """
        self.view, self.facts = probe.view, probe.facts
        self.sequence, self.merges, self.drops = sequence, merges, drops
        self.core_of = {i: core[0] for core in cores for i in core}
        self.flow = Flow(refused=dict(refused))
        self.given_back = frozenset(refused)

    def walk(self) -> Flow:
        """The flow of all tokens behind the sequence's start."""
        shape = self.facts.shape(self.sequence.start)
        assert shape is not None
        batch = Along(0, 1, shape[0]) if shape[0] > 1 else None
        whole = Along(1, 1, self.sequence.count)
        first = self.merges.get(self.sequence.start, 0)
        self.flow.tokens[self.sequence.start] = Tokens(batch, (TokenAxis(whole, first),))
        start = self.view.producer.get(self.sequence.start, -1)
        for i in range(start + 1, len(self.view.nodes)):
            node = self.view.nodes[i]
            if any(name in self.flow.tokens for name in node.input):
                self._visit(i)
            inside = [n for n in reads(node) if n not in node.input and n in self.flow.tokens]
            if any(self.flow.tokens[n].merged for n in inside):
                reason = Kind.BODY.says("{node} reads tokens inside its body", node=self.view.label(i))
                self.flow.refused.setdefault(-1, reason)
        for name in self.view.outputs:
            tokens = self.flow.tokens.get(name)
            if tokens is None or not tokens.merged:
                continue
            if self._can_unmerge(name, tokens):
                self._unmerge(name, -1, Kind.OUTPUT.says("it is an output of the graph", tensor=name))
            else:
                core = self._core_before(self.view.producer[name])
                text = "the output '{tensor}' holds them in an order that they cannot be given back in"
                self.flow.refused.setdefault(-1 if core is None else core, Kind.OUTPUT.says(text, tensor=name))
        return self.flow

    def _visit(self, i: int) -> None:
        node = self.view.nodes[i]
        reason = self.flow.refused.get(self.core_of.get(i, -1))
        whole = {n: self.flow.tokens[n] for n in node.input if (n, i) in self.drops and n in self.flow.tokens}
        for name, tokens in whole.items():
            self.flow.tokens[name] = _at_stage(tokens, self.drops[(name, i)])
        try:
            self._enter(i, node, reason)
        finally:
            self.flow.tokens.update(whole)

    def _enter(self, i: int, node: onnx.NodeProto, reason: Reason | None) -> None:
        try:
            if reason is not None:
                raise Decline(reason)
            found = self._step(i, node)
        except Decline as e:
            self._leave(i, node, e.reason)
            return
        for name, tokens in found.items():
            stage = self.merges.get(name)
            if stage is not None:
                tokens = _at_stage(tokens, stage)
            self.flow.tokens[name] = tokens

    def _leave(self, i: int, node: onnx.NodeProto, reason: Reason) -> None:
        """Give a node all tokens back, or decline the attention it belongs to."""
        own = self.core_of.get(i)
        if own is not None and own not in self.given_back:
            if any(n in self.flow.tokens and self.flow.tokens[n].merged for n in node.input):
                self.flow.refused.setdefault(own, reason)
            return
        for name in dict.fromkeys(node.input):
            tokens = self.flow.tokens.get(name)
            if tokens is None or not tokens.merged or node.op_type in MEASURING:
                continue
            if not self._can_unmerge(name, tokens):
                core = self.core_of.get(i, self._core_before(i))
                self.flow.refused.setdefault(-1 if core is None else core, reason)
                return
            self._unmerge(name, i, reason)

    def _core_before(self, i: int) -> int | None:
        """The attention that a node with scores belongs to."""
        pending = [i]
        seen: set[int] = set()
        while pending:
            k = pending.pop()
            if k in self.core_of:
                return self.core_of[k]
            for name in self.view.nodes[k].input:
                producer = self.view.producer.get(name)
                if producer is not None and producer not in seen and name in self.flow.tokens:
                    seen.add(producer)
                    pending.append(producer)
        return None

    def _can_unmerge(self, name: str, tokens: Tokens) -> bool:
        if len(tokens.axes) > 1 or tokens.axes[0].counted:
            return False
        shape = self.facts.shape(name) or ()
        along, batch = tokens.axes[0].along, tokens.batch
        plain = along.inner == 1 and along.count == shape[along.axis]
        first = batch is None or (batch.axis == 0 and batch.inner == 1 and batch.count == shape[0])
        return plain and first and along.axis > 0 and (batch is not None or shape[0] == 1)

    def _unmerge(self, name: str, reader: int, reason: Reason) -> None:
        if (name, reader) not in self.flow.reasons:
            self.flow.unmerge.append((name, reader))
            self.flow.reasons[(name, reader)] = reason

    # One operator at a time: tensors with tokens in, tensors with tokens out.

    def _step(self, i: int, node: onnx.NodeProto) -> dict[str, Tokens]:
        op = node.op_type
        if op in MEASURING:
            return {}
        if op in ELEMENTWISE:
            return self._elementwise(i, node)
        if op in MOVEMENT:
            return self._movement(i, node)
        if op in NORMS:
            return self._norm(i, node)
        if op in ("MatMul", "Gemm", "FusedMatMul"):
            return self._product(i, node)
        if op in _SHARES:
            return self._softmax(i, node)
        if op in SCORE_TERMS and node.domain in ("", "ai.onnx", "com.microsoft"):
            return self._fused(i, node)
        if op in REDUCTIONS or op == "GlobalAveragePool":
            return self._reduce(i, node)
        if op == "BatchNormalization":
            return self._batch_norm(node)
        raise self.view.decline(i, Kind.ACROSS, "{node} acts on more than one token at a time")

    def _elementwise(self, i: int, node: onnx.NodeProto) -> dict[str, Tokens]:
        out = self.facts.known_shape(node.output[0])
        carrying = {n: self.flow.tokens[n] for n in node.input if n in self.flow.tokens}
        batch, merged = self._joined(i, carrying, len(out))
        counted = any(a.counted for a in merged.values())
        if counted and (node.op_type not in _SCALES or (node.op_type in ("Mul", "Div") and len(carrying) > 1)):
            raise self.view.decline(i, Kind.ACROSS, "{node} changes attention probabilities one by one")
        if any(a.stage for a in merged.values()):
            for k, name in enumerate(node.input):
                if name and name not in carrying:
                    self._operand(i, k, name, out, merged)
                elif name:
                    self._check_other_axes(i, name, carrying[name], out, merged)
        return {node.output[0]: Tokens(batch, tuple(merged[a] for a in sorted(merged)))}

    def _joined(self, i: int, carrying: Mapping[str, Tokens], rank: int) -> tuple[Along | None, dict[int, TokenAxis]]:
        """The batch and the tokens of a result of `rank` axes to which operands are broadcast; all must agree."""
        batch: Along | None = None
        merged: dict[int, TokenAxis] = {}
        for name, tokens in carrying.items():
            moved = _shifted(tokens, rank - len(self.facts.known_shape(name)))
            batch = moved.batch or batch
            for each in moved.axes:
                old = merged.setdefault(each.along.axis, each)
                if old.along != each.along or old.stage != each.stage:
                    raise self.view.decline(i, Kind.PLACES, "{node} joins tokens of different places in the network")
                if each.counted and not old.counted:
                    merged[each.along.axis] = each
        return batch, merged

    def _check_other_axes(
        self, i: int, name: str, tokens: Tokens, out: tuple[int, ...], axes: Mapping[int, TokenAxis]
    ) -> None:
        """An operand with tokens on one axis must not have an entry for every token on another."""
        shape = self.facts.known_shape(name)
        shift = len(out) - len(shape)
        for axis, each in axes.items():
            own = axis - shift
            if each.stage and own >= 0 and shape[own] != 1 and tokens.axis(own) is None:
                raise self.view.decline(
                    i, Kind.PER_TOKEN, "{node} has an operand ('{tensor}') with an entry for every token", tensor=name
                )

    def _operand(self, i: int, k: int, name: str, out: tuple[int, ...], axes: Mapping[int, TokenAxis]) -> None:
        """An operand without tokens must be the same for all of them."""
        shape = self.facts.known_shape(name)
        shift = len(out) - len(shape)
        wide = [a - shift for a, each in axes.items() if a >= shift and shape[a - shift] != 1 and each.stage]
        if not wide:
            return
        if self.facts.is_constant(name):
            value = self.facts.array(name)
            for axis in wide:
                if not (value == (one := np.take(value, [0], axis))).all():
                    raise self.view.decline(
                        i, Kind.PER_TOKEN, "{node} has a table ('{tensor}') with an entry for every token", tensor=name
                    )
                value = one
            self.flow.uniform[(i, k)] = value
        elif (single := uniform_value(self.view, self.facts, name)) is not None:
            self.flow.uniform[(i, k)] = single
        else:
            raise self.view.decline(
                i, Kind.PER_TOKEN, "{node} has an operand ('{tensor}') that depends on a token's place", tensor=name
            )

    def _movement(self, i: int, node: onnx.NodeProto) -> dict[str, Tokens]:
        data = self._moved_data(i)
        first = self.flow.tokens[data[0]]
        batches = self._moved(i, node, data, [self.flow.tokens[n].batch for n in data])
        ranges = [
            self._moved(i, node, data, [self.flow.tokens[n].axes[k].along for n in data])
            for k in range(len(first.axes))
        ]
        result: dict[str, Tokens] = {}
        for name in [n for n in node.output if n]:
            behind = [
                (each, self._range_behind(i, moved[name])) for each, moved in zip(first.axes, ranges, strict=True)
            ]
            axes = tuple(replace(each, along=along) for each, along in behind if along is not None)
            if axes:
                batch = batches[name]
                if first.batch is not None and not isinstance(batch, Along):
                    raise self.view.decline(i, Kind.BATCH, "{node} regroups the items of the batch")
                result[name] = Tokens(batch if isinstance(batch, Along) else None, axes)
        if first.merged:
            if node.op_type not in _RESPELLS:
                raise self.view.decline(i, Kind.UNKNOWN, "{node} is not understood behind merged tokens")
            self.flow.respell.append(i)
        return result

    def _moved_data(self, i: int) -> list[str]:
        """The inputs whose tokens a node moves: all of them, from one place in the network."""
        data = data_inputs(self.view, i)
        if not any(n in self.flow.tokens for n in data):
            raise self.view.decline(i, Kind.PER_TOKEN, "{node} picks by tokens")
        if not all(n in self.flow.tokens for n in data):
            raise self.view.decline(i, Kind.PLACES, "{node} joins the tokens with others")
        if len({tuple((a.stage, a.counted) for a in self.flow.tokens[n].axes) for n in data}) > 1:
            raise self.view.decline(i, Kind.PLACES, "{node} joins tokens of different places in the network")
        return data

    def _range_behind(self, i: int, moved: Along | int | None) -> Along | None:
        """Where tokens lie behind a movement; None where those are left alone that are never merged."""
        along = Along(0, 1, 1, moved) if isinstance(moved, int) else moved
        if along is None:
            raise self.view.decline(i, Kind.WINDOWS, "{node} regroups tokens (windows, pooling, a grid)")
        if self.sequence.is_special(along):
            return None
        if not self.sequence.is_whole(along):
            raise self.view.decline(i, Kind.WINDOWS, "{node} takes a part of the tokens")
        return along

    def _moved(
        self, i: int, node: onnx.NodeProto, data: Sequence[str], places: Sequence[Along | None]
    ) -> dict[str, Along | int | None]:
        """Where an index lies in the outputs of a movement: a range, one index, or None where neither."""
        if all(p is None for p in places):
            return dict.fromkeys(node.output)
        operands: list[np.ndarray | None] = []
        for name in node.input:
            if name in data:
                place = places[data.index(name)]
                shape = self.facts.known_shape(name)
                operands.append(np.zeros(shape, np.int64) if place is None else place.labels(shape).astype(np.int64))
            elif not name:
                operands.append(None)
            else:
                value = self.facts.value(name)
                if value is None:
                    raise self.view.decline(
                        i, Kind.CONTENTS, "an operand of {node} ('{tensor}') is not known", tensor=name
                    )
                operands.append(value)
        found: dict[str, Along | int | None] = {}
        for name, labels in zip(node.output, self.facts.evaluate(node, operands), strict=True):
            along = read_along(np.asarray(labels))
            found[name] = single_index(np.asarray(labels)) if along is None else along
        return found

    def _norm(self, i: int, node: onnx.NodeProto) -> dict[str, Tokens]:
        name = next(n for n in node.input if n in self.flow.tokens)
        tokens = self.flow.tokens[name]
        rank = len(self.facts.known_shape(name))
        axis = int(attribute(node, "axis", -1)) % rank  # type: ignore[call-overload]
        reduced = {axis} if node.op_type == "LpNormalization" else set(range(axis, rank))
        if any(a.along.axis in reduced or a.counted for a in tokens.axes):
            raise self.view.decline(i, Kind.ACROSS, "{node} normalizes over tokens")
        if node.op_type in _ADDS:
            both = [self.flow.tokens.get(n) for n in node.input[:2]]
            if both[0] != both[1]:
                raise self.view.decline(i, Kind.PLACES, "{node} joins tokens of different places in the network")
        full = [n for k, n in enumerate(node.output) if n and (k == 0 or node.op_type in _ADDS)]
        return dict.fromkeys(full, tokens)

    def _batch_norm(self, node: onnx.NodeProto) -> dict[str, Tokens]:
        tokens = self.flow.tokens[node.input[0]]
        if any(a.along.axis == 1 or a.counted for a in tokens.axes):
            raise Kind.PER_TOKEN.decline("a BatchNormalization has an entry for every token")
        return {node.output[0]: tokens}

    def _product(self, i: int, node: onnx.NodeProto) -> dict[str, Tokens]:
        a, b = node.input[0], node.input[1]
        left, right = self.flow.tokens.get(a), self.flow.tokens.get(b)
        self._check_operands(i, node, right)
        rank = len(self.facts.known_shape(node.output[0]))
        rows, columns = self._sides(node, a, b)
        batch: Along | None = None
        axes: list[TokenAxis] = []
        for tokens, name, inner in ((left, a, rows[1]), (right, b, columns[0])):
            if tokens is None:
                continue
            moved = _shifted(tokens, rank - len(self.facts.known_shape(name)))
            batch = moved.batch or batch
            for old, each in zip(tokens.axes, moved.axes, strict=True):
                last = name == b and old.along.axis == columns[1]
                if old.along.axis != inner:
                    axes.append(replace(each, along=replace(each.along, axis=rank - 1)) if last else each)
        self._check_sum(i, left, right, rows[1], columns[0], a, b)
        if len({x.along.axis for x in axes}) < len(axes):
            raise self.view.decline(i, Kind.ACROSS, "{node} pairs every token with itself")
        return {node.output[0]: Tokens(batch, tuple(sorted(axes, key=lambda x: x.along.axis)))} if axes else {}

    def _check_operands(self, i: int, node: onnx.NodeProto, right: Tokens | None) -> None:
        """Neither a transposed operand may hold tokens, nor Gemm's bias an entry for each."""
        gemm = node.op_type == "Gemm"
        if node.op_type != "MatMul" and (attribute(node, "transA", 0) or (right is not None and gemm)):
            raise self.view.decline(i, Kind.ACROSS, "{node} multiplies tokens with a transposed operand")
        bias = self.facts.known_shape(node.input[2]) if gemm and len(node.input) > 2 and node.input[2] else ()
        if len(bias) == 2 and bias[0] != 1:
            raise self.view.decline(i, Kind.PER_TOKEN, "{node} has a bias for every token")

    def _sides(self, node: onnx.NodeProto, a: str, b: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """(row axis, summed axis) of the first operand, (summed axis, column axis) of the second."""
        ra, rb = len(self.facts.known_shape(a)), len(self.facts.known_shape(b))
        if min(ra, rb) < 2:
            raise self.view.decline(self.view.producer[node.output[0]], Kind.UNKNOWN, "{node} multiplies with a vector")
        turned = bool(attribute(node, "transB", 0))
        return (ra - 2, ra - 1), ((rb - 1, rb - 2) if turned else (rb - 2, rb - 1))

    def _check_sum(
        self, i: int, left: Tokens | None, right: Tokens | None, inner_a: int, inner_b: int, a: str, b: str
    ) -> None:
        """A sum over tokens must count every merged token as often as it stands for others, once."""
        one = None if left is None else left.axis(inner_a)
        two = None if right is None else right.axis(inner_b)
        if one is None and two is None:
            return
        if one is None or two is None:
            present, what = (one, b) if one is not None else (two, a)
            if present is not None and present.stage:
                raise self.view.decline(
                    i, Kind.ACROSS, "{node} sums over tokens with weights of their own ('{tensor}')", tensor=what
                )
            return
        if one.stage != two.stage or (one.stage and one.counted == two.counted):
            raise self.view.decline(
                i, Kind.ACROSS, "{node} sums over tokens without a softmax in front (linear attention)"
            )

    def _softmax(self, i: int, node: onnx.NodeProto) -> dict[str, Tokens]:
        tokens = self.flow.tokens[node.input[0]]
        shape = self.facts.known_shape(node.input[0])
        rank = len(shape)
        default = -1 if self.view.model.opset >= 13 else 1
        axis = int(attribute(node, "axis", default)) % rank  # type: ignore[call-overload]
        over = tokens.axis(axis)
        if any(a.counted for a in tokens.axes) or (self.view.model.opset < 13 and axis != rank - 1):
            raise self.view.decline(i, Kind.ACROSS, "{node} runs over more than one axis")
        if over is None:
            return {node.output[0]: tokens}
        if node.op_type != "Softmax" or over.along.inner != 1 or over.along.count != shape[axis]:
            raise self.view.decline(i, Kind.ACROSS, "{node} runs over tokens and something else")
        if over.stage:
            self._check_broadcast(i, tokens, node.input[0])
            self.flow.sized.append(i)
        axes = tuple(replace(a, counted=True) if a is over else a for a in tokens.axes)
        return {node.output[0]: replace(tokens, axes=axes)}

    def _check_broadcast(self, i: int, tokens: Tokens, name: str) -> None:
        """The items of the batch must be found on one axis, outermost there, so that each gets its own sizes."""
        shape, batch = self.facts.known_shape(name), tokens.batch
        if batch is not None and (batch.axis != 0 or batch.inner * batch.count != shape[0]):
            raise self.view.decline(i, Kind.BATCH, "{node} has heads outside the batch on one axis")

    def _fused(self, i: int, node: onnx.NodeProto) -> dict[str, Tokens]:
        q, k, v = (self.flow.tokens.get(n) for n in [*node.input, "", ""][:3])
        if k is None or v is None or any(n in self.flow.tokens for n in node.input[3:]):
            raise self.view.decline(i, Kind.ACROSS, "{node} is no plain attention over the tokens")
        if attribute(node, "is_causal", 0) or attribute(node, "unidirectional", 0):
            raise self.view.decline(i, Kind.CAUSAL, "{node} is causal")
        if len(k.axes) != 1 or len(v.axes) != 1 or k.axes[0].stage != v.axes[0].stage or k.axes != v.axes:
            raise self.view.decline(i, Kind.PLACES, "{node} takes keys and values of different places in the network")
        if any(n for n in node.output[1:]):
            raise self.view.decline(i, Kind.OUTPUT, "{node} returns its keys, values or scores")
        if k.axes[0].stage:
            place = SCORE_TERMS[node.op_type]
            for j, name in enumerate(node.input):
                if j < 3 or not name:
                    continue
                if j != place or uniform_value(self.view, self.facts, name) is None:
                    raise self.view.decline(
                        i, Kind.PER_TOKEN, "{node} has a mask or position bias ('{tensor}')", tensor=name
                    )
            if k.batch is not None and (k.batch.axis != 0 or k.batch.inner != 1):
                raise self.view.decline(i, Kind.BATCH, "{node} has its batch on another axis")
            self.flow.sized.append(i)
        return {node.output[0]: q} if q is not None else {}

    def _reduce(self, i: int, node: onnx.NodeProto) -> dict[str, Tokens]:
        name = node.input[0]
        tokens, shape = self.flow.tokens[name], self.facts.known_shape(name)
        axes = averaged_axes(self.facts, node, len(shape))
        keep = node.op_type == "GlobalAveragePool" or bool(attribute(node, "keepdims", 1))
        inside = [a for a in tokens.axes if a.along.axis in axes]
        if any(a.counted for a in tokens.axes):
            raise self.view.decline(i, Kind.ACROSS, "{node} sums attention probabilities")
        if inside and inside[0].stage:
            self._check_mean(i, node, tokens, inside[0], shape)
        shift = {a: a - (0 if keep else sum(r < a for r in axes)) for a in range(len(shape))}
        left = [replace(a, along=replace(a.along, axis=shift[a.along.axis])) for a in tokens.axes if a not in inside]
        batch = tokens.batch
        if batch is not None:
            batch = None if batch.axis in axes else replace(batch, axis=shift[batch.axis])
        return {node.output[0]: Tokens(batch, tuple(left))} if left else {}

    def _check_mean(
        self, i: int, node: onnx.NodeProto, tokens: Tokens, over: TokenAxis, shape: tuple[int, ...]
    ) -> None:
        if node.op_type in ("ReduceMax", "ReduceMin"):
            return
        batch, along = tokens.batch, over.along
        plain = along.inner == 1 and along.count == shape[along.axis] and along.axis > 0
        if node.op_type not in ("ReduceMean", "ReduceSum", "GlobalAveragePool") or not plain or len(tokens.axes) > 1:
            raise self.view.decline(i, Kind.ACROSS, "{node} takes another statistic than a mean over the tokens")
        if batch is not None and (
            batch.axis != 0 or batch.inner != 1 or 0 in averaged_axes(self.facts, node, len(shape))
        ):
            raise self.view.decline(i, Kind.BATCH, "{node} has its batch on another axis")
        self.flow.weighted.append(i)


def averaged_axes(facts: Facts, node: onnx.NodeProto, rank: int) -> set[int]:
    """The axes that a reduction or a pooling over whole images runs over.

    Raises:
        Decline: they are not known.
    """
    axes = range(2, rank) if node.op_type == "GlobalAveragePool" else reduced_axes(facts, node, rank)
    if axes is None:
        raise Kind.CONTENTS.decline("the axes of a reduction are not known")
    return set(axes)


def _shifted(tokens: Tokens, by: int) -> Tokens:
    """Tokens of a tensor that gets `by` axes in front."""
    batch = tokens.batch and replace(tokens.batch, axis=tokens.batch.axis + by)
    return Tokens(batch, tuple(replace(a, along=replace(a.along, axis=a.along.axis + by)) for a in tokens.axes))


def _at_stage(tokens: Tokens, stage: int) -> Tokens:
    return replace(tokens, axes=tuple(replace(a, stage=stage) for a in tokens.axes))


def follow(
    probe: Probe,
    sequence: TokenSequence,
    merges: Mapping[str, int],
    cores: Sequence[tuple[int, ...]],
    drops: Mapping[tuple[str, int], int] | None = None,
) -> Flow:
    """Follow a sequence's tokens; attentions that cannot take merged tokens get all of them back.

    Returns:
        The flow; `refused` names the attentions that were given all tokens back, by their first node, -1 for what lies
        outside of every attention and cannot be given them.
    """
    refused: dict[int, Reason] = {}
    while True:
        flow = Walker(probe, sequence, merges, cores, refused, drops or {}).walk()
        if set(flow.refused) == set(refused):
            return flow
        refused = flow.refused
