"""What measuring damages works with: statistics, samples, and the dense model's answers, in a folder of their own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError
from toast_onnx.importance.arithmetic import set_solver, solver
from toast_onnx.matching.span import span_of
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, model_files
from toast_onnx.planning.ratios import Ratios
from toast_onnx.planning.width_costs import TOKENS, Part
from toast_onnx_calibration.calibrating import ByOptions, CalibrationOptions, Progress
from toast_onnx_calibration.calibrating_shards import calibrate_on
from toast_onnx_calibration.executing import Alone, Executor, Find, Here, Pool, Report
from toast_onnx_calibration.forecast import Forecast, Spent, cost_behind
from toast_onnx_calibration.labels import Labels, open_labels
from toast_onnx_calibration.planning import statistics_for
from toast_onnx_calibration.room import check_room, drawn, trial_bytes
from toast_onnx_calibration.sensitivity_results import Trial
from toast_onnx_calibration.sensitivity_stream import Trials, chosen_output, read_samples
from toast_onnx_calibration.sensitivity_trials import Solver, identity_of, merged, merged_alone
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_calibration.stored import Samples

#: Pieces that trials are divided into for every worker, at least, so that all are busy to the end.
PIECES = 4


@dataclass(frozen=True)
class Merging:
    """Tokens merged, all widths dense; a task beside trials.

    Attributes:
        removed: block number -> tokens merged away behind its attention.
        batches: judge by the first so many batches of samples; None takes all.
    """

    removed: dict[int, int]
    batches: int | None


@dataclass(frozen=True)
class Narrowing:
    """What new weights are made with.

    Attributes:
        solver: makes them.
        statistics: of the dense model.
        sha256: hash of their file.
    """

    solver: Solver
    statistics: CalibratedStatistics
    sha256: str


@dataclass(frozen=True)
class Work:
    """What damages are measured with.

    Attributes:
        judge: runs whole plans, on all samples.
        trials: runs single parts and schedules of merging; on the first samples where those are to do.
        narrowing: what makes new weights; None where only tokens are merged.
        settings: how parts would be pruned.
        labels: class numbers, None without.
        pool: who measures; None for this process.
        forecast: learns how long trials take.
    """

    judge: Trials
    trials: Trials
    narrowing: Narrowing | None
    settings: Ratios
    labels: Labels | None = None
    pool: Pool | None = None
    forecast: Forecast = field(default_factory=Forecast)

    def damages(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, float]]]:
        """Measure trials, given block by block: every trial with its damage, in the order in which they are done."""
        pool = self.pool or Alone(self)
        pieces = _pieces(trials, pool.workers)
        for number, found in pool.do(pieces):
            for trial, (damage, spent) in zip(pieces[number], found, strict=True):
                self.forecast.spent.append(spent)
                yield trial, damage

    def left(self, trials: Iterable[Trial]) -> float | None:
        """Seconds that trials will take; None before the first was measured."""
        workers = 1 if self.pool is None else self.pool.workers
        return self.forecast.seconds([(t.part, self.cost(t)) for t in trials], workers=workers)

    @cached_property
    def _behind(self) -> Callable[[str | None], float]:
        return cost_behind(self.trials.study)

    def cost(self, trial: Trial) -> float:
        """Share of the dense model that runs for a trial."""
        return self._behind(None if trial.part == TOKENS else self.trials.start_of(trial.block))

    def merged(
        self, schedules: Sequence[Mapping[int, int]], batches: int | None = None
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Measure schedules of merging: number and damage of each, in the order in which they are done.

        Args:
            schedules: block number -> tokens merged away behind its attention.
            batches: judge by the first so many batches of samples; None takes all.
        """
        yield from (self.pool or Alone(self)).do([Merging(dict(removed), batches) for removed in schedules])

    def do(self, task: tuple[Trial, ...] | Merging, _report: Report) -> Any:
        """The damages of some trials and what they took, or the damage of a schedule of merging."""
        if isinstance(task, Merging):
            return self.trials.damage_of(merged(self.trials.study, self.settings, task.removed), task.batches)
        return [self._timed(trial) for trial in task]

    def _timed(self, trial: Trial) -> tuple[dict[str, float], Spent]:
        """A trial's damage, and what it took."""
        start, ran = time.perf_counter(), self.trials.running
        damage = self.damage(trial)
        running = self.trials.running - ran
        return damage, Spent(trial.part, self.cost(trial), time.perf_counter() - start - running, running)

    def order(self) -> WorkOrder:
        """What another process opens the same from."""
        trials, samples = self.judge, self.judge.samples
        feeds = {name: np.asarray(array) for name, array in samples.feeds.items()}
        path = trials.study.view.model.path.absolute()
        return WorkOrder(
            path,
            trials.study.given,
            None if self.narrowing is None else self.narrowing.statistics.file.path.absolute(),
            replace(samples, feeds=feeds),
            np.asarray(trials.dense),
            trials.output,
            self.labels,
            self.settings,
            trials.options.sent(path),
            len(self.trials.samples.rows),
            "cpu" if self.narrowing is None else solver(),
        )

    def identity(self) -> dict[str, Any]:
        """What results measured with this belong to."""
        statistics = None if self.narrowing is None else self.narrowing.statistics
        samples = len(self.judge.samples.rows)
        return identity_of(self.trials.study, self.trials, samples, self.settings, statistics)

    def damage(self, trial: Trial) -> dict[str, float]:
        """Make what a trial says and measure it: one part of one block smaller, or tokens merged behind it."""
        if trial.part == TOKENS:
            return self.trials.damage_of(
                merged_alone(self.trials.study, self.settings, trial.block, trial.kept[TOKENS])
            )
        assert self.narrowing is not None
        kept = cast(dict[Part, int], trial.kept)
        return self.trials.damage(self.narrowing.solver.weights({trial.block: kept}))


@dataclass(frozen=True)
class WorkOrder(ByOptions):
    """Work as it is sent to workers.

    Attributes:
        model: file of the dense model.
        given: the concrete shapes that were asked for.
        statistics: file of measurements, None where only tokens are merged.
        samples: what to run on.
        dense: (batches, *shape) outputs of the dense model.
        output: name of the output to measure at.
        labels: class numbers, None without.
        settings: how parts would be pruned.
        options: provider and threads.
        trial_samples: how many of the samples trials run on.
        solver: who makes new weights; `cpu` where only tokens are merged.
    """

    model: Path
    given: Mapping[str, Sequence[int]]
    statistics: Path | None
    samples: Samples
    dense: NDArray[Any]
    output: str
    labels: Labels | None
    settings: Ratios
    options: CalibrationOptions
    trial_samples: int
    solver: str

    @property
    def files(self) -> tuple[tuple[Path, ...], ...]:
        """The model, and statistics."""
        model = tuple(model_files(self.model))
        return (model,) if self.statistics is None else (model, (self.statistics,))

    @contextmanager
    def open(self, find: Find, folder: Path) -> Iterator[Work]:
        """The same work in a process of its own."""
        set_solver(self.solver)
        dense = study(load_model(find(self.model)), self.given)
        check_room(working_bytes(dense, len(self.samples.rows), self.output))
        judge = Trials(dense, self.samples, self.options, folder, self.output, self.labels, self.dense)
        narrowing = None
        if self.statistics is not None:
            narrowing = _narrowing(dense, self.settings, find(self.statistics), self.options.threads)
        yield Work(judge, judge.on_first(self.trial_samples), narrowing, self.settings, self.labels)


def working_bytes(dense: Study, samples: int | None, output: str | None = None) -> int:
    """Bytes that trials keep on the disk while they work; those of the model alone where samples are not counted."""
    fronts = {span.start for b in dense.match.blocks if (span := span_of(dense.view, dense.facts, b)) is not None}
    return trial_bytes(dense, samples or 0, fronts, chosen_output(dense, output))


def _narrowing(dense: Study, settings: Ratios, path: Path, threads: int | None) -> Narrowing:
    """What makes new weights from a file of statistics."""
    found = CalibratedStatistics(dense, path)
    return Narrowing(Solver(dense, settings, found, threads), found, hashlib.sha256(path.read_bytes()).hexdigest())


def _pieces(trials: Sequence[Trial], workers: int) -> list[tuple[Trial, ...]]:
    """Trials in pieces of one block each: where a block begins is computed once by whoever has a piece of it."""
    blocks = [list(each) for _, each in groupby(trials, lambda t: t.block)]
    if workers == 1 or not blocks:
        return [(trial,) for trial in trials]
    parts = -(-PIECES * workers // len(blocks))
    found = []
    for each in blocks:
        size = -(-len(each) // parts)
        found += [tuple(each[k : k + size]) for k in range(0, len(each), size)]
    return found


@contextmanager
def open_work(
    dense: Study,
    data: str | Path,
    settings: Ratios,
    parts: Sequence[str],
    options: CalibrationOptions,
    statistics: Path | None = None,
    labels: str | None = None,
    output: str | None = None,
    calibrating: Callable[[], AbstractContextManager[Progress | None]] = nullcontext,
    note: Callable[[str], object] = lambda _: None,
    executor: Executor | None = None,
    trial_samples: int | None = None,
) -> Iterator[Work]:
    """Statistics, samples and the dense model's answers, in a folder that is removed at the end.

    Args:
        dense: the model.
        data: samples.
        settings: how parts would be pruned.
        parts: heads, qk, vo, fc1, fc2, tokens.
        options: how samples are read and run.
        statistics: file of earlier measurements; None measures now.
        labels: as for `labels.open_labels`; None leaves top-1 out.
        output: name of the output to measure at; None leaves the choice to `sensitivity_stream.chosen_output`.
        calibrating: opens what is called after every batch of calibration.
        note: called with what the user should know of the samples.
        executor: who measures; None for this process.
        trial_samples: how many of the samples trials run on, in whole batches; None for all.

    Raises:
        ConfigError: nothing can be pruned.
        DataError: data, labels or statistics cannot be read.
    """
    narrow = [p for p in parts if p != TOKENS]
    wanted = statistics_for(dense, settings, cast(Sequence[Part], narrow))
    if narrow and not wanted:
        raise ConfigError(f"no block has a prunable part among {', '.join(narrow)}; see `toast-onnx inspect`")
    known = None if labels is None else open_labels(labels, str(data))
    check_room(working_bytes(dense, drawn(data, options.samples), output))
    with TemporaryDirectory(prefix="toast-planning-") as name:
        folder = Path(name)
        path = statistics
        if path is None and narrow:
            path = folder / "statistics.npz"
            with calibrating() as progress:
                calibrate_on(executor or Here(), dense, data, path, wanted, options, progress)
        samples = read_samples(dense, data, options, folder)
        for text in samples.notes:
            note(text)
        judge = Trials(dense, samples, options, folder, output, known)
        narrowing = _narrowing(dense, settings, path, options.threads) if path is not None and narrow else None
        work = Work(judge, judge.on_first(trial_samples), narrowing, settings, known)
        with (executor or Here()).open(work) as pool:
            yield replace(work, pool=pool)
