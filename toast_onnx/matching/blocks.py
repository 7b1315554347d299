"""What is found in a graph: transformer blocks with their attention and feed-forward parts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from toast_onnx.matching.cores import Core
from toast_onnx.matching.dims import DimRegion
from toast_onnx.matching.head_norms import HeadNorm
from toast_onnx.matching.head_region import HeadRegion
from toast_onnx.matching.layout import Layout
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.probe import Walk
from toast_onnx.reasons import Reason


@dataclass(frozen=True)
class Branch:
    """One of Q, K, V or the output projection of an attention.

    Attributes:
        walk: the way between the linear layer and the core.
        layout: where the layer's channels lie in the core's operand. For the output projection the same description
            runs from the layer's *input* to the core's output.
        repeats: what repeats the heads of keys or values for several queries each, on the way to the core.
    """

    walk: Walk
    layout: Layout
    repeats: DimRegion | None = None

    @property
    def linear(self) -> Linear:
        """The linear layer."""
        return self.walk.linear


@dataclass(frozen=True)
class ValueSide:
    """What else reads the values: nodes that act on each channel alone, their result added to the weighted sum.

    Attributes:
        enter: positions of the data movement from V's layer to `start`.
        start: what the first of the nodes reads, channels on axis 1.
        nodes: positions of the nodes that act on each channel alone, in graph order.
        end: what the last of them makes, channels on axis 1.
        leave: positions of the data movement from `end` to the sum.
        layout: where the channels of V's layer lie in `start`.
        exit: where the channels of `end` lie in the output projection's input.
    """

    enter: tuple[int, ...]
    start: str
    nodes: tuple[int, ...]
    end: str
    leave: tuple[int, ...]
    layout: Layout
    exit: Layout


@dataclass(frozen=True)
class Attention:
    """A matched attention.

    Attributes:
        core: the scores, softmax and weighted sum.
        q, k, v, proj: its linear layers; None where the walk to it was declined.
        num_heads: number of heads.
        qk_dim: dimensions of a head's queries and keys.
        vo_dim: dimensions of a head's values.
        qk_reason: why queries and keys cannot be pruned, None when they can.
        vo_reason: why values and output projection cannot be pruned, None when they can.
        divisions: for cosine attention, the (Expand or None, Div) positions that do so.
        regions: what acts on single dimensions or pairs of queries and keys before the scores: rotary embedding, tables
            of relative positions. All heads share it, so all heads keep the same dimensions.
        units: (qk_dim,) which dimensions stay or go together where there are regions; None where there are none.
        heads_reason: why whole heads cannot be dropped, None when they can.
        head_region: what handles all heads between the layers; None where heads cannot be dropped.
        side: what is made of the values beside the weighted sum and added to it; None where nothing is.
        norms: of queries and of keys over the dimensions of each head (q/k norm); empty where there are none. The
            regions then lie between them and the scores.
        qk_groups: (num_heads,) head of the keys that each head of the queries meets; None where each has its own.
        vo_groups: (num_heads,) head of the values that each head weighs; None where each has its own.
    """

    core: Core
    q: Branch | None
    k: Branch | None
    v: Branch | None
    proj: Branch | None
    num_heads: int
    qk_dim: int
    vo_dim: int
    qk_reason: Reason | None
    vo_reason: Reason | None
    divisions: tuple[tuple[int | None, int], ...] = ()
    regions: tuple[DimRegion, ...] = ()
    units: np.ndarray | None = None
    heads_reason: Reason | None = None
    head_region: HeadRegion | None = None
    side: ValueSide | None = None
    norms: tuple[HeadNorm, ...] = ()
    qk_groups: np.ndarray | None = None
    vo_groups: np.ndarray | None = None

    @property
    def branches(self) -> dict[str, Branch]:
        """The layers that were found, by their names: `q`, `k`, `v`, `proj`."""
        named = {"q": self.q, "k": self.k, "v": self.v, "proj": self.proj}
        return {name: branch for name, branch in named.items() if branch is not None}

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The different layers that were found; a packed one makes several of Q, K and V."""
        return tuple({b.linear.output: b.linear for b in self.branches.values()}.values())

    @property
    def grouped(self) -> bool:
        """Whether several queries share keys or values."""
        return self.qk_groups is not None or self.vo_groups is not None

    @property
    def pairs(self) -> np.ndarray | None:
        """(qk_dim / 2, 2) dimensions that are turned into each other by rotary embedding; None where none are."""
        if self.units is None or int(self.units.max()) + 1 == self.units.size:
            return None
        return np.argsort(self.units, kind="stable").reshape(-1, 2)

    @property
    def folds(self) -> bool:
        """Whether keys may make up for removed queries: not where something between them and the scores would see."""
        return not self.cosine and all(region.plain for region in self.regions)

    @property
    def own_keys(self) -> bool:
        """Whether queries and keys are of the same tokens: what hides keys hides tokens of the block's stream, then."""
        return self.q is not None and self.k is not None and self.q.linear.input == self.k.linear.input

    @property
    def cosine(self) -> bool:
        """Whether queries and keys are divided by their lengths before the scores."""
        return bool(self.divisions)


@dataclass(frozen=True)
class Ffn:
    """A matched feed-forward network: fc1 (one entry, or several when gated), nodes acting on each channel alone, fc2.

    Attributes:
        entries: the linear layers at the entrance (two for unpacked gated forms).
        fc2: the linear layer at the exit.
        nodes: positions of the nodes between them, in graph order.
        units: for every entry (width, parts) its output channels that make up each hidden unit.
        channel_axes: tensor name -> axis of the hidden channels, for the tensors between.
        unit_of: tensor name -> (extent of that axis,) hidden unit each position belongs to.
        activation: name of the activation.
        fc1_reason: why fc1's inputs cannot be pruned, None when they can.
        fc2_reason: why the hidden width cannot be pruned, None when it can.
        selects_at_exit: whether hidden units can only be picked right before fc2, because a norm between runs over all
            of them: fc2 shrinks and fc1 does not.
    """

    entries: tuple[Linear, ...]
    fc2: Linear
    nodes: tuple[int, ...]
    units: tuple[np.ndarray, ...]
    channel_axes: dict[str, int]
    unit_of: dict[str, np.ndarray]
    activation: str
    fc1_reason: Reason | None
    fc2_reason: Reason | None
    selects_at_exit: bool = False

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its layers, fc2 last."""
        return (*self.entries, self.fc2)

    @property
    def in_features(self) -> int:
        """Number of fc1's inputs."""
        return self.entries[0].in_features

    @property
    def width(self) -> int:
        """Number of hidden units (fc2's inputs)."""
        return self.fc2.in_features

    @property
    def gated(self) -> bool:
        """Whether two channels of fc1 make one hidden unit."""
        return sum(e.out_features for e in self.entries) > self.width


@dataclass(frozen=True)
class Block:
    """One transformer block: an attention, a feed-forward network, or both.

    Attributes:
        index: number of the block, from 0.
        name: what its nodes' names have in common.
        node_names: names of its nodes, for addressing it by pattern.
        attention: its attention, None when it has none.
        ffn: its feed-forward network, None when it has none.
    """

    index: int
    name: str
    node_names: tuple[str, ...]
    attention: Attention | None
    ffn: Ffn | None


@dataclass(frozen=True)
class Match:
    """Everything found in a graph.

    Attributes:
        blocks: the blocks, in graph order.
        declined: node label -> reason, for what looks like a block and is none.
    """

    blocks: tuple[Block, ...]
    declined: dict[str, Reason] = field(default_factory=dict)
