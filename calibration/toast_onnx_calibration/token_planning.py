"""Which tokens to merge where: schedules measured whole, a surface through them, and its schedule of least damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import BudgetError, ConfigError
from toast_onnx.matching.study import Study
from toast_onnx.planning.cost_table import CostTable, MergedLine
from toast_onnx.planning.merged_macs import MergedMacs
from toast_onnx.planning.ratios import Ratios
from toast_onnx.planning.search import Found, Group, PartChoice, search
from toast_onnx.planning.surface import Surface, fit_surface, least_damage, within
from toast_onnx.planning.width_costs import dense_widths, width_cost, width_cost_at
from toast_onnx.tokens.points import TokenStudy, study_tokens
from toast_onnx_calibration.planning import BudgetKind, counted_groups, latency_groups
from toast_onnx_calibration.sensitivity_stream import Trials
from toast_onnx_calibration.sensitivity_trials import Progress

Array = NDArray[np.float64]
Schedules = Callable[[Sequence[Mapping[int, int]], int | None], Iterator[tuple[int, dict[str, float]]]]
"""Measures schedules (block number -> tokens that go) on the first so many batches, None for all: the number and the
damage of each, in whatever order they are done."""
#: Samples that schedules are judged on while they are looked for; the last ones are judged on all.
SAMPLES = 64
#: Schedules that are measured first: where merging starts, as a share of the blocks, and how much less the last merges
#: take than the first ones.
STARTS, DECAYS = (0.0, 1 / 12, 1 / 6, 1 / 4), (0.0, 0.8)
#: How far a plan of widths and tokens stays away from half of the tokens at every merge.
ROOM = 0.1
#: How much more a merge takes when what it costs is measured: this factor, or this much of the tokens if that is more.
FACTOR, MORE = 1.75, 0.06
#: Shares above this are made smaller instead: more than half of the tokens cannot go at once.
LARGE, SMALLER = 0.28, 0.6


@dataclass(frozen=True)
class Schedule:
    """Tokens that go at every merge.

    Attributes:
        removed: block number -> tokens merged away behind its attention.
        macs: multiply-accumulates of the whole model at dense widths.
        damage: at the output: the surface's, or measured.
    """

    removed: dict[int, int]
    macs: int
    damage: float


@dataclass
class TokenTrials:
    """Measures merged graphs of one model.

    Attributes:
        study: the dense model.
        tokens: where its tokens can be merged.
        settings: metric, and whether unread tokens are dropped.
        trials: what graphs are run on.
        macs: counts at any schedule.
        run: what runs them.
        measured: schedules and damages that the surface goes through, on the first samples.
        known: all that were ever run on them, for any budget.
    """

    study: Study
    tokens: TokenStudy
    settings: Ratios
    trials: Trials
    macs: MergedMacs
    run: Schedules
    measured: dict[tuple[tuple[int, int], ...], float] = field(default_factory=dict)
    known: dict[tuple[tuple[int, int], ...], float] = field(default_factory=dict)

    def afresh(self) -> TokenTrials:
        """The same for another budget: with a surface of its own, but nothing is run twice."""
        return replace(self, measured={})

    def measure(self, schedules: Sequence[Mapping[int, int]]) -> Iterator[int]:
        """Measure schedules on the first `SAMPLES` samples, those that were not run yet.

        Args:
            schedules: block number -> tokens.

        Yields:
            How many of them are done.
        """
        keys = [tuple(sorted((b, r) for b, r in removed.items() if r)) for removed in schedules]
        self.known.setdefault((), 0.0)
        left = [key for key in dict.fromkeys(keys) if key not in self.known]
        done = len(keys) - len(left)
        if done:
            yield done
        batches = max(1, SAMPLES // self.trials.samples.size)
        for number, found in self.run([dict(key) for key in left], batches):
            self.known[left[number]] = _adds_up(found)
            done += 1
            yield done
        self.measured |= {key: self.known[key] for key in keys}  # in one order, whichever was done first

    @property
    def towers(self) -> tuple[int, ...]:
        """Number of merges in each token sequence."""
        return tuple(len(t.points) for t in self.macs.towers)

    def surface(self) -> Surface:
        """The surface through everything that was measured."""
        known = {key: d for key, d in self.measured.items() if key}
        shares = np.stack([self.macs.shares(dict(key)) for key in known])
        return fit_surface(shares, np.array(list(known.values())), self.towers)


def _adds_up(damage: Mapping[str, float]) -> float:
    return damage["kl"] if "kl" in damage else damage["relative_error"] ** 2


def open_token_trials(study: Study, settings: Ratios, trials: Trials, run: Schedules) -> TokenTrials | None:
    """What measures merging in a model; None where no block can merge."""
    tokens = study_tokens(study)
    if not tokens.mergeable:
        return None
    macs = MergedMacs(study, tokens, settings.tokens.metric, settings.tokens.unread)
    return TokenTrials(study, tokens, settings, trials, macs, run) if macs.blocks else None


def trials_needed(trials: TokenTrials) -> int:
    """Graphs that `explore` measures at most."""
    return len(STARTS) * (len(DECAYS) + 1) + len(trials.macs.blocks) + 2


def explore(trials: TokenTrials, share: float, progress: Progress | None = None) -> Surface:
    """Measure schedules at a share of the multiply-accumulates and around the best one.

    First come schedules of simple shapes, at that share and half-way to the dense model; then, around the best schedule
    of the surface through them, each merge in turn takes more, or less where it takes much.

    Args:
        trials: what measures.
        share: of the dense model's multiply-accumulates that may be left.
        progress: called after every graph.

    Raises:
        ConfigError: merging alone cannot reach the share.
    """
    macs, done = trials.macs, 0

    def cost(shares: Array) -> float:
        return macs.smooth(shares) / macs.dense

    def measure(every: Sequence[Array]) -> None:
        nonlocal done
        for count in trials.measure([_some(macs, shares) for shares in every]):
            if progress is not None:
                progress(done + count, trials_needed(trials), f"tokens: schedule {done + count}", None)
        done += len(every)

    shapes = [(aim, start, decay) for aim, decays in ((share, DECAYS), ((1 + share) / 2, (0.0,)))
              for start in STARTS for decay in decays]  # fmt: skip
    simple = [within(_shape(trials.towers, start, decay), cost, aim) for aim, start, decay in shapes]
    measure([shares for shares in simple if shares is not None])
    if not trials.measured:
        raise ConfigError(_unreachable(macs, share))

    def best() -> Array:
        found = least_damage(trials.surface(), cost, share, _shape(trials.towers, 0.0, 0.0))
        if found is None:
            raise ConfigError(_unreachable(macs, share))
        return macs.shares(_some(macs, found))

    at = best()
    around = np.tile(at, (at.size, 1))
    np.fill_diagonal(around, np.where(at > LARGE, at * SMALLER, np.maximum(at * FACTOR, at + MORE)))
    measure([at])
    measure(list(around))
    measure([best()])
    return trials.surface()


def _some(macs: MergedMacs, shares: Array) -> dict[int, int]:
    """Whole tokens, one at least: that is what lets the last block drop what nothing reads."""
    return macs.whole(shares) or {macs.blocks[-1]: 1}


def _shape(towers: tuple[int, ...], start: float, decay: float) -> Array:
    """(merges,) shares that begin at some depth and fall off towards the end; any scale."""
    parts = []
    for count in towers:
        depth = np.arange(count) / count
        parts.append(np.where(depth >= start - 1e-9, 0.05 * (1 - decay * (depth - start) / (1 - start)), 0.0))
    return np.concatenate(parts)


def reachable(trials: TokenTrials) -> float:
    """The share of the multiply-accumulates that a plan lets merging alone come down to; widths do the rest."""
    least = trials.macs.least
    return least + ROOM * (1 - least)


def _unreachable(macs: MergedMacs, share: float) -> str:
    return f"merging tokens alone cannot reach {share:g} of the multiply-accumulates, only {macs.least:.3f}"


def schedule_at(trials: TokenTrials, surface: Surface, share: float) -> Schedule | None:
    """The best schedule of a surface at a share of the multiply-accumulates, in whole tokens; None if there is none."""
    macs = trials.macs
    aim = share
    for _ in range(20):
        shares = least_damage(surface, lambda x: macs.smooth(x) / macs.dense, aim, np.full(len(macs.blocks), 0.05))
        if shares is None:
            return None
        removed = _some(macs, shares)
        total = macs.total(removed)
        if total <= share * macs.dense:
            return Schedule(removed, total, surface.damage(macs.shares(removed)))
        aim -= total / macs.dense - share + 1e-4
    return None


#: Shares of the way from the budget to the dense model at which merging is tried; widths do the rest.
WAYS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
#: Plans that are measured; the best of them is taken.
FINALISTS = 3


@dataclass(frozen=True)
class Together:
    """Widths and tokens within one budget.

    Attributes:
        widths: kept counts, and their predicted damage.
        schedule: tokens that go; None where none do.
    """

    widths: Found
    schedule: Schedule | None

    @property
    def damage(self) -> float:
        """Predicted, added up."""
        return self.widths.damage + (self.schedule.damage if self.schedule else 0.0)


class Prices(Protocol):
    """What a budget counts, where tokens and widths share it."""

    @property
    def kind(self) -> BudgetKind:
        """Of the budget."""

    def macs(self, share: float) -> float:
        """Multiply-accumulates that merging alone may leave, of the dense model's, for a share of the budget's cost."""

    def share(self, macs: float) -> float:
        """What merging alone costs, of the dense model, at a share of its multiply-accumulates."""

    def groups(self, choices: Sequence[PartChoice], schedule: Schedule | None) -> tuple[list[Group], float, float]:
        """Groups for the search at a schedule's tokens, the cost at dense widths there, and the dense model's."""


@dataclass(frozen=True)
class CountedPrices:
    """A budget of multiply-accumulates, counted.

    Attributes:
        study: the dense model.
        merged: counts at any schedule.
    """

    study: Study
    merged: MergedMacs
    kind: BudgetKind = "macs"

    def macs(self, share: float) -> float:
        return share

    def share(self, macs: float) -> float:
        return macs

    def groups(self, choices: Sequence[PartChoice], schedule: Schedule | None) -> tuple[list[Group], float, float]:
        nodes = None if schedule is None else self.merged.nodes(schedule.removed)
        groups, dense = counted_groups(self.study, choices, "macs", nodes)
        return groups, dense if schedule is None else schedule.macs, dense


@dataclass(frozen=True)
class TimedPrices:
    """A budget of latency, by a table: widths save as much less as a block has fewer tokens.

    Attributes:
        study: the dense model.
        merged: counts at any schedule.
        table: measured costs.
        line: latency by multiply-accumulates of merged models.
    """

    study: Study
    merged: MergedMacs
    table: CostTable
    line: MergedLine
    kind: BudgetKind = "latency"

    def macs(self, share: float) -> float:
        return self.line.macs(share)

    def share(self, macs: float) -> float:
        return self.line.latency(macs)

    def groups(self, choices: Sequence[PartChoice], schedule: Schedule | None) -> tuple[list[Group], float, float]:
        if schedule is None:
            groups, dense = latency_groups(choices, self.table)
            return groups, dense, dense
        groups, dense = latency_groups(choices, self.table, self._left(schedule))
        return groups, self.share(schedule.macs / self.merged.dense) * dense, dense

    def _left(self, schedule: Schedule) -> dict[int, float]:
        """Block number -> multiply-accumulates of its prunable layers at a schedule, of those with every token."""
        view, nodes, found = self.study.view, self.merged.nodes(schedule.removed), {}
        for block in self.study.match.blocks:
            widths = dense_widths(block)
            before = width_cost(view, self.study.counted, block, "macs").at(widths)
            found[block.index] = width_cost_at(view, nodes, block, "macs").at(widths) / before if before else 1.0
        return found


def check_merging(trials: TokenTrials, share: float, prices: Prices) -> None:
    """Refuse a budget that merging alone cannot reach, before anything is measured.

    Raises:
        BudgetError: says what the least is.
    """
    least = prices.share(trials.macs.least)
    if share < least:
        raise BudgetError(f"merging tokens alone cannot reach {share:g} of the {prices.kind}, only {least:.3f}")


def plan_together(
    choices: Sequence[PartChoice], share: float, trials: TokenTrials, surface: Surface, prices: Prices
) -> list[Together]:
    """Plans within a budget, the one of least predicted damage first.

    Tokens and widths share the budget: for several shares that merging takes alone, the best schedule there is, and
    the best widths for what is left, at the numbers of tokens that schedule leaves.

    Args:
        choices: what the parts may keep; empty where widths stay.
        share: of the dense model's cost.
        trials: what measured merging.
        surface: damage of merging.
        prices: what costs what.

    Raises:
        ConfigError: the budget cannot be reached.
    """
    found, least = list[Together](), 1.0
    furthest = prices.share(reachable(trials))
    aims = sorted({max(share + (1 - share) * way, furthest) for way in WAYS}) if choices else [share]
    for aim in aims:
        schedule = schedule_at(trials, surface, prices.macs(aim))
        if schedule is None:
            continue
        groups, merged, dense = prices.groups(choices, schedule)
        if not choices:
            found.append(Together(Found({}, merged, 0.0), schedule))
            continue
        cheapest = merged - sum(float(g.costs.max() - g.costs.min()) for g in groups)
        least = min(least, cheapest / dense)
        if cheapest <= share * dense:
            found.append(Together(search(groups, share * dense / merged, merged, prices.kind), schedule))
    if choices:
        groups, _, dense = prices.groups(choices, None)
        try:
            found.append(Together(search(groups, share, dense, prices.kind), None))
        except ConfigError:
            if not found and least >= 1:
                raise
    if not found:
        raise ConfigError(
            f"a {prices.kind} budget of {share:g} cannot be reached: the cheapest widths and the most merging still "
            f"take {least:.3f} of the dense model's; ask for at least {np.ceil(least * 1000) / 1000:.3f}, lower the "
            "alignment, or plan more parts"
            if choices
            else _unreachable(trials.macs, prices.macs(share))
        )
    return sorted(found, key=lambda t: t.damage)
