"""The search for widths: one option from each group, least damage in total, cost within a budget.

This is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11),
solved by dynamic programming over the budget in small steps. Costs are rounded up to a step, so that the budget always
holds, and what the rounding leaves over is spent at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Steps of the budget for every group: rounding up costs at most 1/400 of the room between cheapest and budget.
STEPS_PER_GROUP = 400
LEAST_STEPS = 10_000


@dataclass(frozen=True)
class Allocation:
    """One option from each group.

    Attributes:
        chosen: index of each group's option.
        cost: sum of their costs.
        damage: sum of their damages.
    """

    chosen: tuple[int, ...]
    cost: float
    damage: float


def allocate(costs: Sequence[ArrayLike], damages: Sequence[ArrayLike], budget: float) -> Allocation | None:
    """The allocation of least total damage whose total cost is within the budget.

    Exact where all costs are whole numbers of which at most `LEAST_STEPS` fit into the room above the cheapest
    allocation; otherwise the best for costs rounded up by less than a step each.

    Args:
        costs: for each group the (options,) costs.
        damages: for each group the (options,) damages.
        budget: largest total cost.

    Returns:
        The allocation, or None where even the cheapest options exceed the budget.

    Raises:
        ValueError: a group without options, or costs and damages of different lengths.
    """
    groups = [_undominated(np.asarray(c, np.float64), np.asarray(d, np.float64)) for c, d in _pairs(costs, damages)]
    room = budget - sum(float(c[0]) for _, c, _ in groups)
    if room < -1e-9 * max(abs(budget), 1.0):
        return None
    steps = max(LEAST_STEPS, STEPS_PER_GROUP * len(groups))
    positions = _dynamic_program(groups, max(room, 0.0), steps)
    positions = _spend_rest(groups, positions, budget)
    return Allocation(
        tuple(int(index[p]) for (index, _, _), p in zip(groups, positions, strict=True)),
        sum(float(c[p]) for (_, c, _), p in zip(groups, positions, strict=True)),
        sum(float(d[p]) for (_, _, d), p in zip(groups, positions, strict=True)),
    )


Group = tuple[Indices, Array, Array]
"""Original indices, costs ascending, damages strictly descending."""


def _pairs(costs: Sequence[ArrayLike], damages: Sequence[ArrayLike]) -> list[tuple[ArrayLike, ArrayLike]]:
    pairs = list(zip(costs, damages, strict=True))
    for c, d in pairs:
        if np.shape(c) != np.shape(d) or np.size(c) == 0:
            raise ValueError(f"a group has {np.size(c)} costs and {np.size(d)} damages")
    return pairs


def _undominated(costs: Array, damages: Array) -> Group:
    """Options that no other one beats in both cost and damage: a width that brings no saving is not bought."""
    order = np.lexsort((damages, costs))
    best = np.minimum.accumulate(damages[order])
    keep = np.concatenate([[True], damages[order][1:] < best[:-1]])
    index = order[keep]
    return index.astype(np.int64), costs[index], damages[index]


def _dynamic_program(groups: Sequence[Group], room: float, steps: int) -> list[int]:
    """Positions of the best options, costs counted in steps of `room / steps` above each group's cheapest."""
    extras = [c - c[0] for _, c, _ in groups]
    step = _step(extras, room, steps)
    limit = int(room / step + 1e-9) if step else 0
    best = np.zeros(limit + 1)
    choices = []
    for extra, (_, _, damages) in zip(extras, groups, strict=True):
        weights = np.ceil(extra / step - 1e-9).astype(np.int64) if step else np.where(extra > 0, 1, 0)
        new = np.full(limit + 1, np.inf)
        choice = np.zeros(limit + 1, np.int32)
        for position, (weight, damage) in enumerate(zip(weights, damages, strict=True)):
            if weight > limit:
                break
            reached = best[: limit + 1 - weight] + damage
            better = reached < new[weight:]
            new[weight:][better] = reached[better]
            choice[weight:][better] = position
        choices.append((choice, weights))
        best = new
    positions, at = [], limit
    for choice, weights in reversed(choices):
        position = int(choice[at])
        positions.append(position)
        at -= int(weights[position])
    return positions[::-1]


def _step(extras: Sequence[Array], room: float, steps: int) -> float:
    """The greatest common divisor of whole costs where it needs no more steps than allowed, else `room / steps`."""
    every = np.concatenate(extras)
    if (every == np.round(every)).all():
        divisor = int(np.gcd.reduce(every.astype(np.int64)))
        if divisor and room / divisor <= steps:
            return float(divisor)
    return room / steps


def _spend_rest(groups: Sequence[Group], positions: list[int], budget: float) -> list[int]:
    """Spend what rounding left over: again and again the affordable change that lowers the damage most."""
    chosen = list(positions)
    left = budget - sum(float(c[p]) for (_, c, _), p in zip(groups, chosen, strict=True))
    while True:
        gain, group, position = 0.0, -1, -1
        for g, (_, costs, damages) in enumerate(groups):
            now = chosen[g]
            last = int(np.searchsorted(costs, costs[now] + left + 1e-9 * abs(budget), side="right")) - 1
            if last > now and damages[now] - damages[last] > gain:
                gain, group, position = float(damages[now] - damages[last]), g, last
        if group < 0:
            return chosen
        left -= float(groups[group][1][position] - groups[group][1][chosen[group]])
        chosen[group] = position
