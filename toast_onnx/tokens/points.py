"""Where tokens may be merged: after which attention, and for every other one the reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention, Block
from toast_onnx.matching.cores import Core, find_cores
from toast_onnx.matching.facts import Facts, Probe
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.span import residual_sum
from toast_onnx.matching.study import Study
from toast_onnx.matching.walks import downstream
from toast_onnx.reasons import Decline, Kind, Reason
from toast_onnx.tokens.follow import Flow, TokenSequence, follow
from toast_onnx.tokens.special import learned_tokens

#: First opset with every operator that merging is written with.
OPSET = 13


@dataclass(frozen=True)
class MergePoint:
    """One block's place for merging: its attention's sum with the residual stream.

    Attributes:
        block: number of the block.
        tensor: that sum, (batch, tokens, channels); None where there is none.
        sequence: number of the token sequence it belongs to; -1 where there is none.
        reason: why tokens cannot be merged there, None when they can.
        drops: (tensor, reader) pairs behind which only special tokens are read: the queries of the attention and the
            stream that its output is added to. Dropping the others there changes no output. Empty where all count.
    """

    block: int
    tensor: str | None
    sequence: int
    reason: Reason | None
    drops: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class TokenStudy:
    """Token merging in a model.

    Attributes:
        points: one entry a block.
        sequences: the token sequences of the model (one for each tower).
    """

    points: tuple[MergePoint, ...]
    sequences: tuple[TokenSequence, ...]

    @property
    def mergeable(self) -> tuple[int, ...]:
        """Numbers of the blocks where tokens can be merged."""
        return tuple(p.block for p in self.points if p.reason is None)


def study_tokens(study: Study) -> TokenStudy:
    """Find out where tokens can be merged.

    Args:
        study: the model.
    """
    view, facts = study.view, study.facts
    cores = find_cores(view, facts)[0]
    sequences: list[TokenSequence] = []
    found: list[tuple[Block, str | None, int, Reason | None]] = []
    flows: list[Flow] = []
    for block in study.match.blocks:
        try:
            tensor, skip = _sum(view, facts, block)
            number = _sequence_of(flows, tensor)
            if number is None:
                sequence = _new_sequence(study, skip)
                flow = follow(study, sequence, {}, _nodes(cores))
                if not _holds(flow, tensor):
                    raise Kind.ALL.decline("its tokens are not those that enter it")
                sequences.append(sequence)
                flows.append(flow)
                number = len(flows) - 1
            found.append((block, tensor, number, None))
        except Decline as e:
            found.append((block, None, -1, e.reason))
    points: dict[int, MergePoint] = {
        block.index: MergePoint(block.index, tensor, number, reason) for block, tensor, number, reason in found
    }
    for number, sequence in enumerate(sequences):
        members = [(b, t) for b, t, n, _ in found if n == number and t is not None]
        # As if everything from the start on were merged: what refuses merged tokens shows at once.
        flow = follow(study, sequence, {sequence.start: 1}, _nodes(cores))
        last = max(members, key=lambda m: view.producer[m[1]])
        for block, tensor in members:
            reason = _reason(study, sequence, flow, block, tensor, cores)
            final = reason is None and tensor == last[1]
            drops = _unread(study, sequence, block, tensor, cores) if final else ()
            points[block.index] = MergePoint(block.index, tensor, number, reason, drops)
    _leave_out_lost(study, points, sequences, cores)
    return TokenStudy(tuple(points[b.index] for b in study.match.blocks), tuple(sequences))


def _leave_out_lost(
    study: Study, points: dict[int, MergePoint], sequences: Sequence[TokenSequence], cores: Sequence[Core]
) -> None:
    """Decline blocks that tokens do not reach once all others merge: a long skip joins what was merged otherwise."""
    for number, sequence in enumerate(sequences):
        chosen = [p for p in points.values() if p.sequence == number and p.reason is None and p.tensor is not None]
        chosen.sort(key=lambda p: study.view.producer[p.tensor or ""])
        stages = {p.tensor or "": k + 1 for k, p in enumerate(chosen)}
        flow = follow(study, sequence, stages, _nodes(cores))
        for p in chosen:
            if p.tensor not in flow.tokens:
                reason = Kind.PLACES.says("a sum in front of it joins tokens of different places in the network")
                points[p.block] = replace(p, reason=reason, drops=())


def _nodes(cores: Sequence[Core]) -> list[tuple[int, ...]]:
    return [core.nodes for core in cores]


def _sum(view: GraphView, facts: Facts, block: Block) -> tuple[str, str]:
    """(the attention's sum with the residual stream, the stream before it)."""
    attention = block.attention
    if attention is None:
        raise Kind.NO_PART.decline("it has no attention")
    if attention.proj is None:
        raise Decline(attention.vo_reason or Kind.NO_LAYER.says("its output projection was not found"))
    if view.model.opset < OPSET:
        raise Kind.OPSET.decline("the graph's opset {opset} is older than {least}", opset=view.model.opset, least=OPSET)
    try:
        tensor = residual_sum(view, facts, attention.proj.linear)
    except MatchError as e:
        raise Kind.NO_PART.decline("{error}", error=e) from e
    shape = facts.shape(tensor)
    if shape is None or len(shape) != 3:
        raise Kind.WINDOWS.decline("its tokens lie on a grid (windows), not in one sequence")
    node = view.nodes[view.producer[tensor]]
    behind = _follows(view, facts, attention, node.input[0])
    return tensor, node.input[1] if behind else node.input[0]


def _follows(view: GraphView, facts: Facts, attention: Attention, tensor: str) -> bool:
    """Whether a tensor is computed from the attention's output projection."""
    assert attention.proj is not None
    wanted, pending, seen = attention.proj.linear.output, [tensor], set[str]()
    floor = attention.proj.linear.node
    while pending:
        name = pending.pop()
        if name == wanted:
            return True
        i = view.producer.get(name, -1)
        if i < floor or name in seen:
            continue
        seen.add(name)
        pending.extend(n for n in view.nodes[i].input if n and not facts.is_constant(n))
    return False


def _sequence_of(flows: Sequence[Flow], tensor: str) -> int | None:
    return next((k for k, flow in enumerate(flows) if _holds(flow, tensor)), None)


def _holds(flow: Flow, tensor: str) -> bool:
    tokens = flow.tokens.get(tensor)
    return tokens is not None and len(tokens.axes) == 1 and tokens.axes[0].along.axis == 1


def _new_sequence(probe: Probe, tensor: str) -> TokenSequence:
    view, facts, other = probe.view, probe.facts, probe.other
    shape, elsewhere = facts.shape(tensor), other.shape(tensor)
    if shape is None or elsewhere is None or len(shape) != 3:
        raise Kind.WINDOWS.decline("its tokens lie on a grid (windows), not in one sequence")
    if shape[1] != elsewhere[1]:
        raise Kind.DYNAMIC.decline("the number of its tokens changes with the input's size; export with a fixed size")
    if facts.is_constant(tensor):
        raise Kind.CONSTANT.decline("its tokens are learned queries, not made of the input")
    learned = learned_tokens(view, facts, tensor)
    if learned.all():
        raise Kind.CONSTANT.decline("its tokens are learned queries, not made of the input")
    front = int(np.argmin(learned))
    back = int(np.argmin(learned[::-1]))
    if learned[front : learned.size - back].any():
        raise Kind.AMONG.decline("learned tokens stand among those of the image")
    return TokenSequence(tensor, shape[1], front, back)


def _reason(
    study: Study, sequence: TokenSequence, flow: Flow, block: Block, tensor: str, cores: Sequence[Core]
) -> Reason | None:
    """Why tokens cannot be merged behind a block's attention; None when they can."""
    view = study.view
    if sequence.count - sequence.front - sequence.back < 2:
        return Kind.FEW.says("there are no two tokens to merge")
    if -1 in flow.refused:
        return flow.refused[-1]
    assert block.attention is not None
    own = flow.refused.get(block.attention.core.qk)
    if own is not None:
        return own.within("its own attention needs every token: {}", own.part)
    if tensor not in flow.tokens:
        return Kind.ALL.says("something in front of it needs every token")
    at = view.producer[tensor]
    behind = [c for c in cores if c.qk > at and any(n in flow.tokens for n in (c.q, c.k, c.v))]
    if behind:
        return flow.refused.get(behind[0].qk)
    for name, reader in flow.unmerge:
        if reader > at and _reaches_core(view, reader, cores):
            return flow.reasons[(name, reader)]
    return None


def _unread(
    study: Study, sequence: TokenSequence, block: Block, tensor: str, cores: Sequence[Core]
) -> tuple[tuple[str, int], ...]:
    """Where the tokens that nothing reads behind the last block can be dropped; nothing where all of them count."""
    if sequence.front + sequence.back == 0 or block.attention is None:
        return ()
    core, stream = block.attention.core, _sum(study.view, study.facts, block)[1]
    drops = ((core.q, core.qk), (stream, study.view.producer[tensor]))
    flow = follow(study, sequence, {}, _nodes(cores), dict.fromkeys(drops, 1))
    queries = flow.tokens.get(core.q)
    if queries is None or len(queries.axes) != 1 or queries.axes[0].along.inner != 1 or tensor not in flow.tokens:
        return ()
    attends = any(flow.tokens[n].merged for c in cores if c != core for n in (c.q, c.k, c.v) if n in flow.tokens)
    asked = flow.unmerge or flow.weighted or flow.sized or flow.refused or attends
    return () if asked else drops


def _reaches_core(view: GraphView, start: int, cores: Sequence[Core]) -> bool:
    """Whether an attention follows from a node."""
    wanted = {i for core in cores for i in core.nodes}
    behind = downstream(view, view.nodes[start].output, lambda i: True)
    return start in wanted or any(i in wanted for i, _ in behind)
