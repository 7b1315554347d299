"""From predicted damage and costs of every width to kept counts within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import BudgetError, ConfigError
from toast_onnx.planning.allocation import allocate
from toast_onnx.planning.width_costs import Part, WidthCost

Array = NDArray[np.float64]
Kept = dict[int, dict[Part, int]]
"""Block number -> part -> kept count."""


@dataclass(frozen=True)
class PartChoice:
    """What one part of a block may keep.

    Attributes:
        block: number of the block.
        part: heads, qk, vo, fc1 or fc2.
        widths: kept counts to choose from, the dense width among them.
        damages: predicted damage at the output for each of them.
        tied: whether it keeps as many as the other tied part of its block.
    """

    block: int
    part: Part
    widths: tuple[int, ...]
    damages: tuple[float, ...]
    tied: bool = False

    @property
    def dense(self) -> int:
        """The width that is kept when nothing is removed."""
        return max(self.widths)


@dataclass(frozen=True)
class Group:
    """Parts whose costs depend on each other, all combinations of their widths: (options,) arrays.

    Attributes:
        block: number of the block.
        parts: the parts.
        widths: (options, parts) kept counts.
        costs: cost of each combination.
        damages: predicted damage of each.
    """

    block: int
    parts: tuple[Part, ...]
    widths: NDArray[np.int64]
    costs: Array
    damages: Array


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        kept: block number -> part -> kept count, for all parts that had a choice.
        cost: predicted cost of the whole model, in the unit of the budget.
        damage: predicted damage, the sum over parts.
    """

    kept: Kept
    cost: float
    damage: float


def aligned_widths(dense: int, align: int) -> tuple[int, ...]:
    """Kept counts a part may have: the multiples of `align` below the dense width, and that width itself."""
    return (*range(align, dense, align), dense)


def joined(choices: Sequence[PartChoice]) -> list[list[PartChoice]]:
    """Choices that depend on each other side by side: fc1 with fc2, heads with their dimensions, tied ones."""
    with_heads = {c.block for c in choices if c.part == "heads"}
    found: dict[tuple[int, str], list[PartChoice]] = {}
    for c in choices:
        room = "ffn" if c.part in ("fc1", "fc2") else "attention" if c.tied or c.block in with_heads else c.part
        found.setdefault((c.block, room), []).append(c)
    return list(found.values())


def combinations(members: Sequence[PartChoice]) -> tuple[NDArray[np.int64], Array]:
    """All combinations of what joined parts may keep; tied ones keep the same.

    Fewer dimensions harm the heads that stay, so that their damage counts for those alone.

    Returns:
        (options, parts) kept counts, and (options,) the damage of each: the sum over parts.
    """
    widths = np.array(list(product(*(m.widths for m in members))), np.int64)
    damages = np.array(list(product(*(m.damages for m in members))), np.float64)
    for k, member in enumerate(members):
        if member.part == "heads":
            others = np.arange(len(members)) != k
            damages[:, others] *= widths[:, k : k + 1] / member.dense
    tied = [k for k, member in enumerate(members) if member.tied]
    allowed = (widths[:, tied] == widths[:, tied[:1]]).all(axis=1) if tied else np.ones(len(widths), bool)
    return widths[allowed], damages[allowed].sum(axis=1)


def group_choices(
    choices: Sequence[PartChoice], costs: Mapping[int, WidthCost], dense: Mapping[int, Mapping[Part, int]]
) -> list[Group]:
    """Groups for the search, with costs that are counted.

    Args:
        choices: what every part may keep.
        costs: block number -> its cost.
        dense: block number -> widths of all its parts.
    """
    groups = []
    for members in joined(choices):
        block, parts = members[0].block, tuple(m.part for m in members)
        own = {"fc1", "fc2"} if parts[0] in ("fc1", "fc2") else {"heads", "qk", "vo"} if "heads" in parts else {*parts}
        others = {part: width for part, width in dense[block].items() if part in own}
        widths, damages = combinations(members)
        cost = [costs[block].at(others | dict(zip(parts, map(int, row), strict=True))) for row in widths]
        groups.append(Group(block, parts, widths, np.array(cost), damages))
    return groups


def search(groups: Sequence[Group], budget: float, total: float, what: str) -> Found:
    """The widths of least predicted damage within a budget.

    Args:
        groups: what there is to choose.
        budget: largest cost, as a fraction of `total`.
        total: cost of the dense model, in the groups' unit.
        what: name of the budget, for messages.

    Raises:
        BudgetError: no widths reach the budget; the message says what the least is.
        ConfigError: nothing can be chosen.
    """
    if not groups:
        raise ConfigError("there is nothing to choose from: no part is offered a width below its dense one")
    fixed = total - sum(float(g.costs[np.lexsort(g.widths.T)[-1]]) for g in groups)  # the widest option is dense
    found = allocate([g.costs for g in groups], [g.damages for g in groups], budget * total - fixed)
    if found is None:
        least = fixed + sum(float(g.costs.min()) for g in groups)
        raise BudgetError(
            f"a {what} budget of {budget:g} cannot be reached: the cheapest widths still take {least / total:.3f} of "
            f"the dense model's {what}; ask for at least {np.ceil(least / total * 1000) / 1000:.3f}, lower the "
            "alignment, or plan more parts"
        )
    kept: Kept = {}
    for group, index in zip(groups, found.chosen, strict=True):
        kept.setdefault(group.block, {}).update(zip(group.parts, map(int, group.widths[index]), strict=True))
    return Found(kept, fixed + found.cost, found.damage)
