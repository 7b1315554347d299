"""Weights that several places share: the places are one, with pooled statistics, one choice and one new weight.

ALBERT applies one layer many times, matchers run two images through one network. Were every place to get weights of its
own, the pruned file would be larger than the dense one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from toast_onnx.choosing.blocks import Widths
from toast_onnx.errors import ConfigError, MatchError
from toast_onnx.importance.moments import Moments, merge
from toast_onnx.importance.statistics import Array, Statistics
from toast_onnx.importance.synthetic import AttentionStatistics
from toast_onnx.matching.blocks import Attention, Block
from toast_onnx.matching.linear import Linear, find_linears
from toast_onnx.matching.study import Study
from toast_onnx.reasons import Kind, Reason

ATTENTION, FFN = ("heads", "qk", "vo"), ("fc1", "fc2")


@dataclass(frozen=True)
class Sharing:
    """Which blocks share the weights of their attention, or of their network.

    Attributes:
        attention: block number -> all blocks with the same attention weights, itself included; only where several are.
        ffn: the same for feed-forward networks.
        reasons: (block number, attention or ffn) -> why the places that share weights cannot have one choice.
    """

    attention: Mapping[int, tuple[int, ...]]
    ffn: Mapping[int, tuple[int, ...]]
    reasons: Mapping[tuple[int, str], Reason]

    def leader(self, block: int, kind: str) -> int:
        """The first block with the same weights."""
        return (self.attention if kind == "attention" else self.ffn).get(block, (block,))[0]

    def __bool__(self) -> bool:
        return bool(self.attention or self.ffn)


def find_sharing(study: Study) -> Sharing:
    """Blocks whose layers read the same initializers."""
    users: dict[str, set[str]] = {}
    for linear in find_linears(study.view, study.facts).values():
        users.setdefault(_root(study, linear.weight), set()).add(linear.output)
    found: dict[str, dict[int, tuple[int, ...]]] = {"attention": {}, "ffn": {}}
    reasons: dict[tuple[int, str], Reason] = {}
    for kind, groups in found.items():
        roles = {b.index: _roles(b, kind) for b in study.match.blocks}
        by_weights: dict[tuple[str, ...], list[int]] = {}
        for index, linears in roles.items():
            if linears:
                by_weights.setdefault(tuple(_root(study, each.weight) for each in linears), []).append(index)
        for names, members in by_weights.items():
            outputs = {each.output for index in members for each in roles[index]}
            outside = {user for name in names for user in users[name]} - outputs
            reason = _why_apart(study, kind, names, members, roles, outside)
            if reason is not None:
                reasons.update({(index, kind): reason for index in members})
            elif len(members) > 1:
                groups.update(dict.fromkeys(members, tuple(members)))
    return Sharing(found["attention"], found["ffn"], reasons)


def _why_apart(
    study: Study,
    kind: str,
    names: Sequence[str],
    members: Sequence[int],
    roles: Mapping[int, Sequence[Linear]],
    outside: set[str],
) -> Reason | None:
    """Why places with the same weights cannot have one choice; None where they can."""
    if outside:
        node = study.view.label(study.view.producer[min(outside, key=study.view.producer.__getitem__)])
        return Kind.SHARED.says("its weights are shared with {node}, which is another kind of place", node=node)
    if any(_reused(roles[index], names) for index in members):
        return Kind.SHARED.says("one weight has two parts in it")
    if len(members) > 1 and not _alike(study, members, kind):
        text = "its weights are shared by blocks {blocks}, whose biases, heads or norms differ"
        return Kind.SHARED.says(text, blocks=_listed(members))
    return None


def agreed_widths(
    study: Study, widths: Sequence[Widths], sharing: Sharing, skip_unprunable: bool
) -> tuple[tuple[Widths, ...], tuple[str, ...]]:
    """Kept counts on which all places that share weights agree; a part that one of them must keep stays in all.

    Args:
        study: the model.
        widths: kept counts of every block.
        sharing: who shares.
        skip_unprunable: leave parts alone that cannot be pruned.

    Returns:
        The counts, and what to say of parts that stay although some of the places would lose them.

    Raises:
        ConfigError: the ratios differ among places that share weights.
        MatchError: places that share weights cannot have one choice.
    """
    found, notes = list(widths), list[str]()
    for (index, kind), reason in sharing.reasons.items():
        for part in ATTENTION if kind == "attention" else FFN:
            if getattr(found[index], part) is None:
                continue
            if not skip_unprunable:
                raise MatchError(
                    f"block {index} ({study.match.blocks[index].name}): {part} cannot be pruned: {reason}; set its "
                    "ratio to 0, use --skip-unprunable, or give every place a copy of its own with --split-shared"
                )
            found[index] = replace(found[index], **{part: None})
    for groups, parts in ((sharing.attention, ATTENTION), (sharing.ffn, FFN)):
        for members in dict.fromkeys(groups.values()):
            for part in parts:
                counts = {getattr(found[index], part) for index in members}
                if len(counts - {None}) > 1:
                    raise ConfigError(
                        f"blocks {_listed(members)} share their weights, so {part} takes one ratio in all of them; or "
                        "give every place a copy of its own with --split-shared"
                    )
                if len(counts) > 1:
                    keepers = [index for index in members if getattr(found[index], part) is None]
                    notes.append(
                        f"{part} of blocks {_listed(members)} stays whole: they share its weights, and "
                        f"{'blocks' if len(keepers) > 1 else 'block'} {_listed(keepers)} must keep them"
                    )
                    found = [replace(w, **{part: None}) if k in members else w for k, w in enumerate(found)]
    return tuple(found), tuple(notes)


def sharing_notes(sharing: Sharing) -> tuple[str, ...]:
    """What to say of places that share weights."""
    groups = dict.fromkeys((*sharing.attention.values(), *sharing.ffn.values()))
    return tuple(
        f"blocks {_listed(members)} share weights: one choice from the statistics of all, one new weight"
        for members in groups
    )


class Pooled:
    """Statistics pooled over the places that share weights (implements `Statistics`)."""

    def __init__(self, statistics: Statistics, sharing: Sharing) -> None:
        self._statistics, self._sharing = statistics, sharing

    @property
    def source(self) -> str:
        """Where the statistics come from."""
        return self._statistics.source

    def attention(self, block: int) -> AttentionStatistics:
        """Those of all places, each counting as much as it was measured."""
        parts = [self._statistics.attention(index) for index in self._sharing.attention.get(block, (block,))]
        if len(parts) == 1:
            return parts[0]
        measured = [each.tokens for each in parts]
        share = np.ones(len(parts)) if not np.isfinite(measured).all() else np.asarray(measured)
        share = share / share.sum()
        return AttentionStatistics(
            np.tensordot(share, np.stack([each.s_qq for each in parts]), 1),
            np.tensordot(share, np.stack([each.s_kk for each in parts]), 1),
            merge(each.context for each in parts),
            float(sum(measured)),
        )

    def hidden(self, block: int) -> Moments:
        """Those of all places."""
        return merge(self._statistics.hidden(index) for index in self._sharing.ffn.get(block, (block,)))

    def inputs(self, block: int) -> Moments:
        """Those of all places."""
        return merge(self._statistics.inputs(index) for index in self._sharing.ffn.get(block, (block,)))

    def metric(self, block: int) -> Array:
        """The mean of all places."""
        members = self._sharing.ffn.get(block, (block,))
        return np.asarray(np.mean([self._statistics.metric(index) for index in members], axis=0))

    def activation_scores(self, block: int, part: str) -> object:
        """The mean of all places."""
        members = self._sharing.ffn.get(block, (block,))
        return np.mean([np.asarray(self._statistics.activation_scores(index, part)) for index in members], axis=0)


def _roles(block: Block, kind: str) -> list[Linear]:
    """The layers of a block's attention or network, in a fixed order."""
    if kind == "ffn":
        return [] if block.ffn is None else list(block.ffn.linears)
    return [] if block.attention is None else [branch.linear for branch in block.attention.branches.values()]


def _root(study: Study, name: str) -> str:
    """The initializer that a weight is made of, and which part of it."""
    part = ""
    while (node := study.view.producer_of(name)) is not None and node.input:
        source = max(node.input, key=lambda each: int(np.prod(study.facts.shape(each) or (0,))) if each else -1)
        if node.op_type in ("Slice", "Split", "Gather"):
            operands = [study.facts.value(each) for each in node.input if each != source]
            numbers = [None if value is None else value.reshape(-1).tolist() for value in operands]
            part += f" {node.op_type} {list(node.output).index(name)} {numbers}"
            part += "".join(sorted(str(a) for a in node.attribute))
        name = source
    return name + part


def _reused(linears: Sequence[Linear], names: Sequence[str]) -> bool:
    """Whether one weight serves two different layers of a block."""
    return len({each.output for each in linears}) > len(set(names))


def _alike(study: Study, members: Sequence[int], kind: str) -> bool:
    """Whether blocks with the same weights have the same biases, heads and units."""
    first, *others = (study.match.blocks[index] for index in members)
    formed = _ffns_alike if kind == "ffn" else _attentions_alike
    return all(formed(first, other) and _biased_alike(study, first, other, kind) for other in others)


def _biased_alike(study: Study, one: Block, two: Block, kind: str) -> bool:
    def values(block: Block) -> list[list[float]]:
        biases = [each.bias for each in _roles(block, kind)]
        return [[] if bias is None else study.facts.array(bias).reshape(-1).tolist() for bias in biases]

    return values(one) == values(two)


def _ffns_alike(one: Block, two: Block) -> bool:
    assert one.ffn is not None
    assert two.ffn is not None
    pairs = zip(one.ffn.units, two.ffn.units, strict=True)
    return one.ffn.selects_at_exit == two.ffn.selects_at_exit and all(np.array_equal(a, b) for a, b in pairs)


def _attentions_alike(one: Block, two: Block) -> bool:
    assert one.attention is not None
    assert two.attention is not None
    mine, theirs = one.attention.branches, two.attention.branches
    if mine.keys() != theirs.keys() or one.attention.cosine != two.attention.cosine:
        return False
    same = all(np.array_equal(mine[name].layout.channels, theirs[name].layout.channels) for name in mine)
    return same and _normed_alike(one.attention, two.attention)


def _normed_alike(one: Attention, two: Attention) -> bool:
    """Whether norms of queries and keys leave the same choice: the mean taken off or not, gains and biases."""
    if len(one.norms) != len(two.norms):
        return False
    pairs = zip(one.norms, two.norms, strict=True)
    return all(
        a.centred == b.centred and np.array_equal(a.gain, b.gain) and np.array_equal(a.bias, b.bias) for a, b in pairs
    )


def _listed(members: Sequence[int]) -> str:
    return ", ".join(map(str, members))
