"""How many tokens go at which merge: shares of a ratios file to counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal

from toast_onnx.errors import MatchError
from toast_onnx.tokens.nodes import Merge
from toast_onnx.tokens.points import TokenStudy


def removed_counts(
    tokens: TokenStudy,
    merge: Decimal | Sequence[Decimal],
    own: Mapping[int, Decimal] | None = None,
    skip_unprunable: bool = False,
) -> dict[int, int]:
    """Tokens merged away behind each block's attention.

    Args:
        tokens: where tokens can be merged.
        merge: share of the tokens that enter the network, one number for every block that can merge, or one for each
            block. Rounded to the nearest whole token, ties up; at most half of those that may still be merged.
        own: block number -> share of a block that has one of its own.
        skip_unprunable: leave blocks alone that are named but cannot merge.

    Returns:
        Block number -> tokens, for blocks that merge any.

    Raises:
        MatchError: a block is asked to merge and cannot, or none of them can; the list has another length.
    """
    own = own or {}
    alike = isinstance(merge, Decimal)
    shares = [merge] * len(tokens.points) if isinstance(merge, Decimal) else list(merge)
    if len(shares) != len(tokens.points):
        raise MatchError(f"tokens.merge lists {len(shares)} entries, but the model has {len(tokens.points)} blocks")
    shares = [own.get(point.block, share) for point, share in zip(tokens.points, shares, strict=True)]
    if not any(shares):
        return {}
    if alike and not tokens.mergeable and not skip_unprunable:
        reasons = dict.fromkeys(p.reason for p in tokens.points if p.reason)
        raise MatchError(f"tokens cannot be merged in this model: {next(iter(reasons), 'it has no blocks')}")
    counts: dict[int, int] = {}
    left = [s.count for s in tokens.sequences]
    for point, share in zip(tokens.points, shares, strict=True):
        if not share:
            continue
        if point.reason is not None:
            if skip_unprunable or (alike and point.block not in own):
                continue
            raise MatchError(f"tokens cannot be merged behind block {point.block}: {point.reason}")
        sequence = tokens.sequences[point.sequence]
        wanted = int((share * sequence.count).to_integral_value(ROUND_HALF_UP))
        now = Merge(left[point.sequence], 0, sequence.front, sequence.back)
        counts[point.block] = min(wanted, now.sources)
        left[point.sequence] -= counts[point.block]
    return {block: count for block, count in counts.items() if count}


def exact_shares(tokens: TokenStudy, removed: Mapping[int, int]) -> tuple[Decimal, ...]:
    """For each block the shortest share for which `removed_counts` merges exactly so many tokens.

    Args:
        tokens: where tokens can be merged.
        removed: block number -> tokens merged away behind its attention; what is missing merges none.
    """
    found = []
    for point in tokens.points:
        count = removed.get(point.block, 0)
        found.append(_share(count, tokens.sequences[point.sequence].count) if count else Decimal(0))
    return tuple(found)


def _share(removed: int, count: int) -> Decimal:
    exact = Decimal(removed) / Decimal(count)
    digits = 2
    while int((exact.quantize(Decimal(1).scaleb(-digits)) * count).to_integral_value(ROUND_HALF_UP)) != removed:
        digits += 1
    return exact.quantize(Decimal(1).scaleb(-digits)).normalize()
