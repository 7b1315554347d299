"""The nodes of a merge: which tokens are most alike, their size-weighted means, and the sizes that all else needs.

All counts are static. Matching is one product of normalized metrics and three TopK; tokens move by GatherND, and are
added up by a product with a one-hot matrix, so that nothing is scattered and nothing loops (ToMe, arXiv 2210.09461,
section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from toast_onnx.edit import PlaceWriter
from toast_onnx.tokens.follow import TokenSequence

#: Cosine that counts as no loss; above one, so that of equal pairs the smaller are merged first.
EQUAL = 1.0001


def rows(w: PlaceWriter, x: str, index: str, what: str) -> str:
    """x (batch, n, channels), index (batch, k) -> (batch, k, channels)."""
    return w.one("GatherND", [x, w.unsqueeze(index, [2], f"{what}/Unsqueeze")], what, batch_dims=1)


@dataclass(frozen=True)
class Merge:
    """Counts of one merge.

    Attributes:
        count: tokens before it.
        removed: tokens that go into others.
        front, back: tokens at either end that stay as they are.
    """

    count: int
    removed: int
    front: int
    back: int

    @property
    def sources(self) -> int:
        """Tokens that may go into others: the second, fourth and so on."""
        return (self.count - self.front - self.back) // 2

    @property
    def targets(self) -> int:
        """Tokens that others may go into: the first, third and so on."""
        return (self.count - self.front - self.back + 1) // 2

    @property
    def kept(self) -> int:
        """Sources that stay."""
        return self.sources - self.removed

    @property
    def left(self) -> int:
        """Tokens behind it."""
        return self.count - self.removed


@dataclass(frozen=True)
class Matched:
    """Tensors of one match.

    Attributes:
        gone: (batch, removed) which sources go, most alike first.
        stays: (batch, kept) which sources stay, in order; None where all go.
        into: (batch, removed) the target that each goes into.
    """

    gone: str
    stays: str | None
    into: str

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors."""
        return tuple(name for name in (self.gone, self.stays, self.into) if name is not None)


def write_match(w: PlaceWriter, metric: str, merge: Merge, weights: str | None) -> Matched:
    """The most alike pairs of two alternating sets.

    Args:
        w: writer.
        metric: (batch, tokens, features), float32.
        merge: counts.
        weights: (batch, tokens, 1) to weigh pairs by; None where they are alike by the cosine alone.
    """
    unit = w.one("LpNormalization", [metric], "unit", axis=-1, p=2)
    stop = merge.count - merge.back
    a = w.slice(unit, 1, merge.front + 1, stop, 2, "sources")
    b = w.slice(unit, 1, merge.front, stop, 2, "targets")
    turned = w.one("Transpose", [b], "targets/Transpose", perm=[0, 2, 1])
    cosine = w.one("MatMul", [a, turned], "cosine")
    if weights is not None:
        cosine = _weighed(w, cosine, weights, merge)
    best, nearest = w.node("TopK", [cosine, w.numbers([1], "one")], "nearest", 2, axis=-1)
    best = w.reshape(best, [-1, merge.sources], "best/Reshape")
    nearest = w.reshape(nearest, [-1, merge.sources], "nearest/Reshape")
    _, order = w.node("TopK", [best, w.numbers([merge.sources], "all")], "order", 2, axis=-1)
    gone = w.slice(order, 1, 0, merge.removed, what="gone")
    into = w.one("GatherElements", [nearest, gone], "into", axis=1)
    if not merge.kept:
        return Matched(gone, None, into)
    rest = w.cast(w.slice(order, 1, merge.removed, what="rest"), onnx.TensorProto.FLOAT)
    stays, _ = w.node("TopK", [rest, w.numbers([merge.kept], "kept")], "stays", 2, axis=-1, largest=0)
    return Matched(gone, w.cast(stays, onnx.TensorProto.INT64), into)


def _weighed(w: PlaceWriter, cosine: str, weights: str, merge: Merge) -> str:
    """(cosine - 1) a b / (a + b) for weights a and b; for sizes the growth of Ward's sum of squares, negative."""
    stop = merge.count - merge.back
    a = w.slice(weights, 1, merge.front + 1, stop, 2, "source_weights")
    b = w.reshape(
        w.slice(weights, 1, merge.front, stop, 2, "target_weights"), [-1, 1, merge.targets], "target_weights/Reshape"
    )
    harmonic = w.one("Div", [w.one("Mul", [a, b], "product"), w.one("Add", [a, b], "sum")], "harmonic")
    edge = w.constant(EQUAL, "edge", np.float32)
    return w.one("Mul", [w.one("Sub", [cosine, edge], "unlike"), harmonic], "weighed")


def write_ones(w: PlaceWriter, x: str, count: int) -> str:
    """Sizes (batch, tokens, 1) of tokens that stand for themselves alone."""
    batch = w.slice(w.one("Shape", [x], "Shape"), 0, 0, 1, what="batch")
    shape = w.one("Concat", [batch, w.numbers([count, 1], "shape")], "size/shape", axis=0)
    one = w.constant(np.ones((1, 1, 1), np.float32), "one")
    return w.one("Expand", [one, shape], "size")


def write_merge(w: PlaceWriter, x: str, size: str, matched: Matched, merge: Merge) -> tuple[str, str]:
    """Merge tokens into the size-weighted means of those they are most like.

    Args:
        w: writer.
        x: (batch, tokens, channels), float32.
        size: (batch, tokens, 1), how many tokens each stands for.
        matched: what goes into what.
        merge: counts.

    Returns:
        Merged tokens and sizes: front ones, sources that stay, targets, back ones.
    """
    total = w.one("Concat", [w.one("Mul", [x, size], "times_size"), size], "totals", axis=-1)
    merged = write_sums(w, total, matched, merge)
    sizes = w.slice(merged, 2, -1, what="sizes")
    return w.one("Div", [w.slice(merged, 2, 0, -1, what="sums"), sizes], "means"), sizes


def write_sums(w: PlaceWriter, total: str, matched: Matched, merge: Merge) -> str:
    """Add up what tokens hold that become one.

    Args:
        w: writer.
        total: (batch, tokens, channels), float32.
        matched: what goes into what.
        merge: counts.

    Returns:
        (batch, tokens left, channels): front ones, sources that stay, targets, back ones.
    """
    stop = merge.count - merge.back
    a = w.slice(total, 1, merge.front + 1, stop, 2, "source_totals")
    b = w.slice(total, 1, merge.front, stop, 2, "target_totals")
    moving = rows(w, a, matched.gone, "moving")
    target = w.constant(np.arange(merge.targets, dtype=np.int64).reshape(1, -1, 1), "targets")
    same = w.one("Equal", [w.reshape(matched.into, [-1, 1, merge.removed], "into/Reshape"), target], "same")
    chosen = w.cast(same, onnx.TensorProto.FLOAT)  # (batch, targets, removed)
    grown = w.one("Add", [b, w.one("MatMul", [chosen, moving], "arriving")], "grown")
    parts = [w.slice(total, 1, 0, merge.front, what="front")] if merge.front else []
    parts += [rows(w, a, matched.stays, "staying")] if matched.stays is not None else []
    parts += [grown]
    parts += [w.slice(total, 1, merge.count - merge.back, what="back")] if merge.back else []
    return w.one("Concat", parts, "merged_totals", axis=1)


def write_places(w: PlaceWriter, matched: Matched, merge: Merge, before: str | None) -> str:
    """Where every original token is found after a merge.

    Args:
        w: writer.
        matched: what goes into what.
        merge: counts.
        before: (batch, original tokens) where they were before it; None for the first merge.

    Returns:
        (batch, original tokens), int64.
    """
    first = merge.front + merge.kept
    number = w.constant(np.arange(merge.sources, dtype=np.int64).reshape(1, -1, 1), "sources")
    offset = w.constant(first, "first_target", np.int64)
    arriving = w.reshape(w.one("Add", [matched.into, offset], "arriving_at"), [-1, 1, merge.removed])
    place = _chosen(w, matched.gone, number, arriving, merge.removed, "gone")
    if matched.stays is not None:
        ranks = w.constant(np.arange(merge.front, first, dtype=np.int64).reshape(1, 1, -1), "ranks")
        staying = _chosen(w, matched.stays, number, ranks, merge.kept, "staying")
        place = w.one("Add", [place, staying], "place_of_sources")
    # The others have fixed places; only their batch must be made.
    zero = w.one("Mul", [w.slice(place, 1, 0, 1), w.constant(0, "zero", np.int64)], "no_place")
    stop = merge.count - merge.removed
    fixed = [*range(merge.front), *range(first, first + merge.targets), *range(stop - merge.back, stop)]
    others = w.one("Add", [zero, w.constant([fixed], "fixed", np.int64)], "fixed_places")
    whole = w.one("Concat", [place, others], "places", axis=1)
    middle = np.arange(merge.front, merge.count - merge.back)
    back = np.arange(merge.count - merge.back, merge.count)
    original = np.argsort(np.concatenate([middle[1::2], np.arange(merge.front), middle[0::2], back]))
    new = w.one("Gather", [whole, w.numbers(original.tolist(), "order")], "places/Gather", axis=1)
    return new if before is None else w.one("GatherElements", [new, before], "places_now", axis=1)


def _chosen(w: PlaceWriter, chosen: str, number: str, values: str, count: int, what: str) -> str:
    """(batch, sources) the value of the entry that names each source, 0 where none does; in whole numbers throughout.

    A product with a one-hot matrix would round where a later step converts the graph to half precision or TF32.
    """
    same = w.one("Equal", [w.reshape(chosen, [-1, 1, count]), number], f"is_{what}")
    nothing = w.constant(0, "nothing", np.int64)
    picked = w.one("Where", [same, values, nothing], f"place_of_{what}/each")
    return w.reduce("ReduceSum", picked, [2], what=f"place_of_{what}")


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens behind so many merges of a sequence.

    Attributes:
        sequence: the tokens.
        removed: tokens that go at every merge in turn.
    """

    sequence: TokenSequence
    removed: tuple[int, ...]

    @property
    def merges(self) -> list[Merge]:
        """Counts of every merge in turn."""
        front, back = self.sequence.front, self.sequence.back
        return [Merge(self.left(k), r, front, back) for k, r in enumerate(self.removed)]

    def left(self, stage: int) -> int:
        """Number of tokens behind so many merges."""
        return self.sequence.count - sum(self.removed[:stage])

    def moved(self, index: int, stage: int) -> int:
        """Where a token that is never merged, or the end of those that are, lies behind so many merges."""
        return index if index <= self.sequence.front else index - (self.sequence.count - self.left(stage))
