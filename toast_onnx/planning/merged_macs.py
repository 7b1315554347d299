"""Multiply-accumulates of a graph with merged tokens, counted without writing it.

A node that acts on tokens costs as many as there are at its place; attention costs queries times keys. What the merges
themselves cost (the product of features that matches, the product that adds up) is counted, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import MatchError
from toast_onnx.matching.cores import find_cores
from toast_onnx.matching.study import Study
from toast_onnx.planning.macs import graph_macs, macs_at, node_macs
from toast_onnx.planning.surface import MOST
from toast_onnx.tokens.follow import Flow, TokenAxis, TokenSequence, follow
from toast_onnx.tokens.metrics import candidates, find_features
from toast_onnx.tokens.nodes import Merge, TokenCounts
from toast_onnx.tokens.points import MergePoint, TokenStudy


@dataclass(frozen=True)
class _Tower:
    """One token sequence with a stage behind each of its merge points.

    Attributes:
        sequence: the tokens.
        points: where they may merge, in order; without the last where only special tokens are read behind it.
        last: that last point, None where all tokens are read.
        flow: where tokens are, as if all points merged.
        features: number of features that tokens are compared by at each point.
        channels: channels of the stream.
        items: items of the batch.
    """

    sequence: TokenSequence
    points: tuple[MergePoint, ...]
    last: MergePoint | None
    flow: Flow
    features: tuple[int, ...]
    channels: int
    items: int

    def counted(self, study: Study) -> list[tuple[int, int | None]]:
        """(node, stage of the tokens it acts on) of every node with tokens; None where only special ones are left."""
        found: list[tuple[int, int | None]] = []
        for i, node in enumerate(study.view.nodes):
            names = [n for n in (*node.input, *node.output[:1]) if n in self.flow.tokens]
            if not names or study.counted.is_constant(node.output[0]):
                continue
            stages = {a.stage for n in names for a in self.flow.tokens[n].axes}
            present = [s for s in stages if s <= len(self.points)]
            found.append((i, max(present) if present else None))
        return found

    def counts(self, removed: Mapping[int, int]) -> TokenCounts:
        """Numbers of tokens at every stage."""
        merged = [removed.get(p.block, 0) for p in self.points]
        spare = self.sequence.count - sum(merged) - self.sequence.front - self.sequence.back
        return TokenCounts(self.sequence, (*merged, spare))


class MergedMacs:
    """Counts multiply-accumulates at any schedule."""

    def __init__(self, study: Study, tokens: TokenStudy, metric: str, drop_unread: bool = True) -> None:
        """Follow the tokens once.

        Args:
            study: the unmerged model.
            tokens: where tokens can be merged.
            metric: a name of `METRICS`, or `auto`.
            drop_unread: whether tokens that nothing reads behind the last block are dropped.
        """
        self.study, self.tokens, self.metric = study, tokens, metric
        self.towers = [t for k in range(len(tokens.sequences)) if (t := self._tower(k, drop_unread)) is not None]

    @cached_property
    def dense(self) -> int:
        """Of the unmerged model."""
        return graph_macs(self.study.view, self.study.counted)

    @cached_property
    def least(self) -> float:
        """The share of `dense` that is left where everything merges that can."""
        return self.smooth(np.full(len(self.blocks), MOST)) / self.dense

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks at which a schedule may merge, tower by tower."""
        return tuple(p.block for t in self.towers for p in t.points)

    def total(self, removed: Mapping[int, int]) -> int:
        """Of the whole merged graph.

        Args:
            removed: block number -> tokens merged away behind its attention.
        """
        nodes = self.nodes(removed)
        merging = sum(self._merging(t, removed) for t in self._merged(removed))
        return merging + sum(nodes(i) for i in range(len(self.study.view.nodes)))

    def nodes(self, removed: Mapping[int, int]) -> _Nodes:
        """Of each node of the unmerged graph, at the number of tokens it has in the merged one."""
        return _Nodes(self.study, [(t, t.counts(removed)) for t in self._merged(removed)])

    def smooth(self, shares: NDArray[np.float64]) -> float:
        """As `total`, for shares of the tokens in front of each merge, as if tokens could be parted.

        Args:
            shares: (merges,) in the order of `blocks`.
        """
        total, start = self._rest, 0
        for tower, stages in zip(self.towers, self._stages, strict=True):
            left = float(tower.sequence.count)
            total += float(np.polyval(stages[0], left))
            special = tower.sequence.front + tower.sequence.back
            for k, features in enumerate(tower.features):
                r, half = shares[start + k] * left, (left - special) / 2
                total += tower.items * half * (half * features + r * (tower.channels + 1))
                left -= r
                total += float(np.polyval(stages[k + 1], left))
            start += len(tower.points)
        return total

    def shares(self, removed: Mapping[int, int]) -> NDArray[np.float64]:
        """(merges,) share of the tokens in front of each merge that go, in the order of `blocks`."""
        found = []
        for tower in self.towers:
            counts = tower.counts(removed)
            found += [removed.get(p.block, 0) / counts.left(stage) for stage, p in enumerate(tower.points)]
        return np.array(found)

    def whole(self, shares: NDArray[np.float64]) -> dict[int, int]:
        """Block number -> whole tokens for (merges,) shares, at most half of those that may go at once."""
        found: dict[int, int] = {}
        given = dict(zip(self.blocks, shares, strict=True))
        for tower in self.towers:
            left = tower.sequence.count
            for point in tower.points:
                merge = Merge(left, 0, tower.sequence.front, tower.sequence.back)
                found[point.block] = min(round(float(given[point.block]) * left), merge.sources)
                left -= found[point.block]
        return {block: r for block, r in found.items() if r}

    @cached_property
    def _rest(self) -> float:
        """Of what no number of tokens changes, once something is merged."""
        every = {p.block: 1 for t in self.towers for p in t.points[:1]}
        nodes = self.nodes(every)
        inside = {i for t in self.towers for i, _ in t.counted(self.study)}
        dropped = sum(nodes(i) for t in self.towers for i, stage in t.counted(self.study) if stage is None)
        return float(dropped + sum(nodes(i) for i in range(len(self.study.view.nodes)) if i not in inside))

    @cached_property
    def _stages(self) -> list[NDArray[np.float64]]:
        """For each tower (stages, 3): polynomials of the number of tokens at every stage."""
        found = []
        for tower in self.towers:
            stages = np.zeros((len(tower.points) + 1, 3))
            count, members = tower.sequence.count, tower.counted(self.study)
            special = tower.sequence.front + tower.sequence.back
            tried = [count, (2 * count + special) // 3, (count + 2 * special) // 3]
            idle = (0,) * (len(tower.points) - 1)
            removed = [(count - n, *idle, n - special) for n in tried]
            behind = [_Nodes(self.study, [(tower, TokenCounts(tower.sequence, r))]) for r in removed]
            for i, stage in members:
                if stage == 0:
                    stages[0, 2] += node_macs(self.study.view, self.study.counted, i)
                elif stage is not None:
                    stages[stage] += np.linalg.solve(
                        np.vander(np.array(tried, float), 3), [nodes(i) for nodes in behind]
                    )
            found.append(stages)
        return found

    def _merged(self, removed: Mapping[int, int]) -> list[_Tower]:
        """Towers in which anything is merged."""
        return [t for t in self.towers if any(removed.get(p.block, 0) for p in t.points)]

    def _merging(self, tower: _Tower, removed: Mapping[int, int]) -> int:
        total, counts = 0, tower.counts(removed)
        for stage, (point, features) in enumerate(zip(tower.points, tower.features, strict=True)):
            if r := removed.get(point.block, 0):
                merge = Merge(counts.left(stage), r, tower.sequence.front, tower.sequence.back)
                total += tower.items * merge.targets * (merge.sources * features + r * (tower.channels + 1))
        return total

    def _tower(self, number: int, drop_unread: bool) -> _Tower | None:
        study, sequence = self.study, self.tokens.sequences[number]
        points = [p for p in self.tokens.points if p.sequence == number and p.tensor is not None and p.reason is None]
        points.sort(key=lambda p: study.view.producer[p.tensor or ""])
        last = next((p for p in points if p.drops), None) if drop_unread else None
        merging = tuple(p for p in points if p is not last)
        if not merging:
            return None
        cores = [core.nodes for core in find_cores(study.view, study.facts)[0]]
        stages = {p.tensor or "": k + 1 for k, p in enumerate(merging)}
        drops = {} if last is None else dict.fromkeys(last.drops, len(merging) + 1)
        flow = follow(study, sequence, stages, cores, drops)
        shape = study.counted.shape(merging[0].tensor or "") or (1, 1, 0)
        features = tuple(self._features(p, sequence, flow) for p in merging)
        return _Tower(sequence, merging, last, flow, features, shape[-1], shape[0])

    def _features(self, point: MergePoint, sequence: TokenSequence, flow: Flow) -> int:
        study, attention = self.study, self.study.match.blocks[point.block].attention
        assert attention is not None
        wanted = candidates(self.metric)
        for metric in wanted:
            try:
                found = find_features(
                    metric, point.tensor or "", attention, flow.tokens, sequence, study.view, study.facts
                )
            except MatchError:
                if metric is wanted[-1]:
                    raise
                continue
            shape = study.facts.shape(found.tensor) or ()
            shape = (shape[0] // found.folded, found.folded, *shape[1:]) if found.folded > 1 else shape
            extents = [shape[a] for a in found.order[2:]]
            return extents[-1] if metric.average else prod(extents)
        raise MatchError(f"tokens.metric: {self.metric} names no metric")


class _Nodes:
    """Multiply-accumulates of each node at the numbers of tokens of some merged towers."""

    def __init__(self, study: Study, merged: Sequence[tuple[_Tower, TokenCounts]]) -> None:
        self.study, self.merged = study, merged
        self.whole = {(n, i) for t, _ in merged for n, i in t.flow.unmerge}
        self.drops = {(n, i): len(t.points) + 1 for t, _ in merged if t.last is not None for n, i in t.last.drops}

    def __call__(self, i: int) -> int:
        view, facts = self.study.view, self.study.counted
        node = view.nodes[i]
        names = [*node.input, *node.output[:1]]
        if not any(name in t.flow.tokens for t, _ in self.merged for name in names):
            return node_macs(view, facts, i)
        if facts.is_constant(node.output[0]):
            return 0
        return macs_at(node, [self._shape(n, i) if n else None for n in node.input], self._shape(node.output[0], None))

    def _shape(self, name: str, reader: int | None) -> tuple[int, ...] | None:
        """A tensor's shape as a node reads it, or, without a reader, as it is made."""
        shape = self.study.counted.shape(name)
        if shape is None or (name, reader) in self.whole:
            return shape
        for tower, counts in self.merged:
            tokens = tower.flow.tokens.get(name)
            if tokens is not None:
                now = list(shape)
                for each in tokens.axes:
                    stage = self.drops.get((name, -1 if reader is None else reader), each.stage)
                    now[each.along.axis] = _extent(shape, each, stage, counts)
                return tuple(now)
        return shape


def _extent(shape: Sequence[int], each: TokenAxis, stage: int, counts: TokenCounts) -> int:
    along = each.along
    return shape[along.axis] // along.count * (counts.moved(along.stop, stage) - counts.moved(along.first, stage))
