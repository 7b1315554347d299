"""Kept counts within a budget: groups, costs and the message where nothing fits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from toast_onnx.errors import ConfigError
from toast_onnx.planning.search import PartChoice, aligned_widths, group_choices, search
from toast_onnx.planning.width_costs import WidthCost

COST = WidthCost(qk=10, vo=12, fc1=0, fc2=3, pair=1)
DENSE = {0: {"qk": 16, "vo": 16, "fc1": 24, "fc2": 32}, 1: {"qk": 16, "vo": 16, "fc1": 24, "fc2": 32}}
TOTAL = 5000.0


def choices(parts: tuple[str, ...], seed: int = 0) -> list[PartChoice]:
    """Damages that fall with the width, another scale for each part."""
    rng = np.random.default_rng(seed)
    found = []
    for block, widths in DENSE.items():
        for part in parts:
            offered = aligned_widths(widths[part], 8)
            scale = rng.uniform(0.1, 3)
            damages = tuple(float(scale * (1 - k / widths[part]) ** 2) for k in offered)
            found.append(PartChoice(block, part, offered, damages))  # type: ignore[arg-type]
    return found


def test_aligned_widths() -> None:
    assert aligned_widths(32, 8) == (8, 16, 24, 32)
    assert aligned_widths(30, 8) == (8, 16, 24, 30)
    assert aligned_widths(8, 8) == (8,)
    assert aligned_widths(5, 8) == (5,)


@pytest.mark.parametrize("parts", [("qk", "vo", "fc2"), ("fc1", "fc2"), ("qk",), ("fc1",)])
@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_the_search_is_exhaustive(parts: tuple[str, ...], share: float) -> None:
    offered = choices(parts)
    groups = group_choices(offered, {0: COST, 1: COST}, DENSE)  # type: ignore[arg-type]
    fixed = TOTAL - 2 * COST.at({"qk": 16, "vo": 16, "fc1": 24, "fc2": 32})
    best, least = None, np.inf
    for widths in product(*(c.widths for c in offered)):
        kept: dict[int, dict[str, int]] = {b: dict(w) for b, w in DENSE.items()}
        for c, k in zip(offered, widths, strict=True):
            kept[c.block][c.part] = k
        cost = fixed + sum(COST.at(w) for w in kept.values())  # type: ignore[arg-type]
        damage = sum(c.damages[c.widths.index(k)] for c, k in zip(offered, widths, strict=True))
        least = min(least, cost)
        if cost <= share * TOTAL + 1e-6:
            best = damage if best is None else min(best, damage)
    if best is None:
        with pytest.raises(ConfigError, match=f"still take {least / TOTAL:.3f}"):
            search(groups, share, TOTAL, "macs")
        return
    found = search(groups, share, TOTAL, "macs")
    assert found.damage == pytest.approx(best)
    assert found.cost <= share * TOTAL + 1e-6
    after = [COST.at({**DENSE[b], **kept}) for b, kept in found.kept.items()]  # type: ignore[dict-item]
    assert found.cost == pytest.approx(fixed + sum(after))


def test_heads_are_searched_with_their_dimensions() -> None:
    """Every combination by hand: heads scale what their dimensions cost, and what thinning them harms."""
    cost, dense = WidthCost(qk=10, vo=12, fc2=3, pair=1, heads=4), {0: {"heads": 4, "qk": 16, "vo": 16}}
    offered = [
        PartChoice(0, "qk", (8, 16), (0.3, 0.0)),
        PartChoice(0, "heads", (1, 2, 3, 4), (4.0, 1.5, 0.2, 0.0)),
        PartChoice(0, "vo", (8, 16), (1.0, 0.0)),
    ]
    (group,) = group_choices(offered, {0: cost}, dense)  # type: ignore[arg-type]
    assert group.parts == ("qk", "heads", "vo")
    total = cost.at(dense[0])  # type: ignore[arg-type]
    assert total == 10 * 16 + 12 * 16
    for share in (0.15, 0.4, 0.6, 0.8, 1.0):
        found = search([group], share, total, "macs")
        best = min(
            (dh + heads / 4 * (dq + dv), (10 * qk + 12 * vo) * heads / 4)
            for heads, dh in zip((1, 2, 3, 4), (4.0, 1.5, 0.2, 0.0), strict=True)
            for qk, dq in ((8, 0.3), (16, 0.0))
            for vo, dv in ((8, 1.0), (16, 0.0))
            if (10 * qk + 12 * vo) * heads / 4 <= share * total
        )
        assert (found.damage, found.cost) == pytest.approx(best)


@pytest.mark.parametrize("with_heads", [False, True])
def test_tied_parts_keep_the_same(with_heads: bool) -> None:
    cost, dense = WidthCost(qk=10, vo=12, fc2=3, pair=1, heads=4), {0: {"heads": 4, "qk": 16, "vo": 16}}
    damages = ((0.3, 0.1, 0.0), (1.0, 0.7, 0.0))
    parts = ("qk", "vo")
    offered = [PartChoice(0, p, (4, 8, 16), d, True) for p, d in zip(parts, damages, strict=True)]  # type: ignore[arg-type]
    if with_heads:
        offered.append(PartChoice(0, "heads", (2, 4), (0.2, 0.0)))
    (group,) = group_choices(offered, {0: cost}, dense)  # type: ignore[arg-type]
    found = {tuple(map(int, row)): float(d) for row, d in zip(group.widths, group.damages, strict=True)}
    expected = {}
    for kept, *pair in zip((4, 8, 16), *damages, strict=True):
        for heads, harm in ((2, 0.2), (4, 0.0)) if with_heads else ((4, 0.0),):
            expected[(kept, kept, heads)[: len(offered)]] = sum(pair) * heads / 4 + harm
    assert found == pytest.approx(expected)


def test_nothing_to_choose() -> None:
    with pytest.raises(ConfigError, match="no part"):
        search([], 0.5, 1.0, "macs")


def test_no_groups_are_not_called_unprunable() -> None:
    with pytest.raises(ConfigError, match="nothing to choose from"):
        search([], 0.5, TOTAL, "macs")
