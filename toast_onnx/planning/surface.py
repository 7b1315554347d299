"""How much merging hurts as a surface over schedules, and the schedule of least damage on it.

Merging a share s_i of the tokens in front of merge i, of which a share l_i of all that enter is left there, is taken to
damage the output by w_i s_i^b l_i^-p, added up over merges: a token that stands for several carries their damage when
it is merged again. The weights w, one a merge, and the two powers are fitted to whole schedules that were measured.
Adding up damages of single merges instead finds schedules that merge far too much at the end (docs/tokens.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: Damages are compared by the logarithm of themselves plus this: a surface need not be right where nothing is lost.
LEAST = 0.003
#: Where the two powers lie without any measurement, how much that counts against one schedule, and their bounds.
POWERS, POWERS_PULL, POWERS_LOW, POWERS_HIGH = (1.75, 1.0), 0.1, (1.05, 0.0), (3.0, 3.0)
#: How smoothly weights change from merge to merge (second and first differences of their logarithms). Without it, few
#: schedules make some merge look free, and the search puts everything there.
BEND, SLOPE = 0.3, 0.06
#: Steps of the descent, and the power and the limits of a step.
STEPS, POWER, SMALLEST, LARGEST = 80, 0.3, 0.7, 1.4
#: Steps of the fit at most.
FIT_STEPS = 300
#: At most half of the tokens go at one merge.
MOST = 0.5


def tokens_left(shares: Array, towers: Sequence[int]) -> Array:
    """Share of the entering tokens in front of each merge.

    Args:
        shares: (..., merges) share of the tokens in front of each merge that go.
        towers: number of merges in each token sequence; they stand side by side in `shares`.
    """
    parts, start = [], 0
    for count in towers:
        kept = np.cumprod(1 - shares[..., start : start + count], axis=-1)
        parts.append(np.concatenate([np.ones_like(kept[..., :1]), kept[..., :-1]], axis=-1))
        start += count
    return np.concatenate(parts, axis=-1)


@dataclass(frozen=True)
class Surface:
    """Damage by schedule.

    Attributes:
        weights: (merges,) not negative.
        growth: power of the share that goes.
        compound: power of the share that is left, negative.
        towers: number of merges in each token sequence.
    """

    weights: Array
    growth: float
    compound: float
    towers: tuple[int, ...]

    def damage(self, shares: Array) -> float:
        """At (merges,) shares."""
        return float(self.terms(shares) @ self.weights)

    def terms(self, shares: Array) -> Array:
        """(..., merges) what the weights multiply."""
        return shares**self.growth / tokens_left(shares, self.towers) ** self.compound


def fit_surface(shares: Array, damages: Array, towers: Sequence[int]) -> Surface:
    """The surface of least relative error whose weights change smoothly along each token sequence.

    Args:
        shares: (schedules, merges) share of the tokens in front of each merge that go; some of them above 0.
        damages: (schedules,) measured.
        towers: number of merges in each token sequence.
    """
    merges, left = shares.shape[1], tokens_left(shares, towers)
    inside = np.split(np.arange(merges), np.cumsum(towers)[:-1])
    logs = np.log(np.maximum(damages, 0) + LEAST)

    def residuals(x: Array) -> Array:
        weights, growth, compound = np.exp(x[:merges]), x[-2], x[-1]
        made = (shares**growth / left**compound) @ weights
        bends = [BEND * np.diff(x[members], 2) for members in inside]
        slopes = [SLOPE * np.diff(x[members]) for members in inside]
        return np.concatenate([np.log(made + LEAST) - logs, *bends, *slopes, POWERS_PULL * (x[-2:] - POWERS)])

    low, high = np.r_[np.full(merges, -14.0), POWERS_LOW], np.r_[np.full(merges, 8.0), POWERS_HIGH]
    found = _least_squares(residuals, np.r_[np.zeros(merges), POWERS], low, high)
    return Surface(np.exp(found[:merges]), float(found[-2]), float(found[-1]), tuple(towers))


def _least_squares(residuals: Callable[[Array], Array], x: Array, low: Array, high: Array) -> Array:
    """Levenberg and Marquardt with steps held within bounds (Nocedal and Wright, Numerical Optimization, chapter 10.3).

    A dozen unknowns and a few dozen residuals are not worth SciPy among the core's dependencies; a test compares them.
    """
    damping, now = 1e-3, residuals(x)
    for _ in range(FIT_STEPS):
        slopes = np.stack([(residuals(x + h) - now) / 1e-6 for h in 1e-6 * np.eye(x.size)], axis=1)
        gradient, curvature = slopes.T @ now, slopes.T @ slopes
        # What a bound holds back takes no part in the step.
        free = ~(((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0)))
        step = np.zeros_like(x)
        inside = curvature[np.ix_(free, free)]
        step[free] = -np.linalg.solve(inside + damping * np.diag(np.diag(inside) + 1e-12), gradient[free])
        tried = np.clip(x + step, low, high)
        then = residuals(tried)
        if then @ then < now @ now:
            done = now @ now - then @ then < 1e-10 * (now @ now)
            x, now, damping = tried, then, damping / 3
            if done:
                break
        else:
            damping *= 4
            if damping > 1e8:
                break
    return x


def least_damage(surface: Surface, cost: Callable[[Array], float], budget: float, start: Array) -> Array | None:
    """Shares of least damage within a budget, by making all merges equally good bargains.

    At the optimum every merge costs the same damage for each unit saved; a merge that is a worse bargain than the
    geometric mean of all is made smaller, a better one larger, and all together are scaled into the budget.

    Args:
        surface: damage.
        cost: of (merges,) shares; falls with every one of them.
        budget: largest cost.
        start: (merges,) where to begin.

    Returns:
        (merges,) shares, or None where merging alone cannot reach the budget.
    """
    best: tuple[float, Array] | None = None
    shares = within(start, cost, budget)
    for _ in range(STEPS):
        if shares is None:
            return None if best is None else best[1]
        damage, spent = surface.damage(shares), cost(shares)
        if best is None or damage < best[0]:
            best = (damage, shares)
        bargains = np.empty_like(shares)
        for k in range(shares.size):
            more = shares.copy()
            more[k] = min(MOST, shares[k] + 1e-3)
            saved = max(spent - cost(more), 1e-12 * spent)
            bargains[k] = max(surface.damage(more) - damage, 1e-12) / saved
        step = np.clip((np.exp(np.log(bargains).mean()) / bargains) ** POWER, SMALLEST, LARGEST)
        shares = within(np.clip(np.maximum(shares, 1e-3) * step, 0, MOST), cost, budget)
    assert best is not None
    return best[1]


def within(shares: Array, cost: Callable[[Array], float], budget: float) -> Array | None:
    """Shares scaled alike, up or down, so that they just meet a budget; None where nothing does."""
    low, high = 0.0, MOST / max(float(shares[shares > 0].min(initial=MOST)), 1e-6)
    if cost(np.minimum(shares * high, MOST)) > budget:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(np.minimum(shares * middle, MOST)) > budget else (low, middle)
    return np.minimum(shares * high, MOST)
