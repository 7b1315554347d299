"""New weights of a block, as the solvers give them and the rewriting takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class HeadWeights:
    """New weights of a layer on the heads' side: Q, K or V.

    Attributes:
        weight: (in_features, num_heads, kept).
        bias: (num_heads, kept).
        slots: (num_heads, kept) old dimension of the head that each new one takes the place of in the padded twin.
        is_basis: whether the new dimensions are mixtures of old ones, the slots then being the first `kept`.
        heads: (num_heads,) old heads that these are, ascending; None where all stay.
        energy: share of the sum of squares that these dimensions hold, where a norm over them follows.
    """

    weight: np.ndarray
    bias: np.ndarray
    slots: np.ndarray
    is_basis: bool = False
    heads: np.ndarray | None = None
    energy: float = 1.0

    @property
    def kept(self) -> int:
        """New number of dimensions per head."""
        return int(self.weight.shape[2])

    def only(self, heads: np.ndarray | None) -> HeadWeights:
        """Some of the heads (kept,) of weights that hold all of them."""
        if heads is None:
            return self
        return replace(self, weight=self.weight[:, heads], bias=self.bias[heads], slots=self.slots[heads], heads=heads)

    def channels(self, every: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """(num_heads, kept) channels of the old layer, of all (old heads, old dimensions), that these take.

        With `groups` (heads,) channels of a layer with more heads, each of which has one of these.
        """
        slots = self.slots if groups is None else self.slots[groups]
        return np.take_along_axis(every if self.heads is None else every[self.heads], slots, axis=1)


@dataclass(frozen=True)
class ProjWeights:
    """New weights of the output projection.

    Attributes:
        weight: (num_heads, kept, out_features).
        bias: (out_features,).
    """

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class AttentionWeights:
    """New weights of an attention; None where a pair stays as it is. Q goes with K, V with the projection."""

    q: HeadWeights | None = None
    k: HeadWeights | None = None
    v: HeadWeights | None = None
    proj: ProjWeights | None = None

    @property
    def heads(self) -> dict[str, HeadWeights]:
        """What is new on the heads' side, by name: `q`, `k`, `v`."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def drops_heads(self) -> bool:
        """Whether whole heads are missing; then all four layers are new."""
        return self.v is not None and self.v.heads is not None

    def of_all_heads(self) -> AttentionWeights:
        """The same weights for a graph that has no other heads."""
        q, k, v = (None if part is None else replace(part, heads=None) for part in (self.q, self.k, self.v))
        return AttentionWeights(q, k, v, self.proj)


@dataclass(frozen=True)
class FfnWeights:
    """New weights of a feed-forward network.

    Attributes:
        inputs: (kept_in,) indices of fc1's inputs that stay, ascending; None when all stay.
        entries: for every entry its (weight (kept_in, out_features), bias (out_features,)) before units are removed;
            None when fc1 stays as it is but for removed units.
        units: (kept,) hidden units that stay, ascending; None when all stay.
        fc2: (weight (kept, out_features), bias (out_features,)); None when fc2 stays as it is.
    """

    inputs: np.ndarray | None = None
    entries: tuple[tuple[np.ndarray, np.ndarray], ...] | None = None
    units: np.ndarray | None = None
    fc2: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class BlockWeights:
    """New weights of one block."""

    attention: AttentionWeights | None = None
    ffn: FfnWeights | None = None
