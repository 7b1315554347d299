"""What measuring trials will take, foreseen from a few of them on a few samples."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import Ratios
from toast_onnx.planning.width_costs import TOKENS
from toast_onnx_calibration.calibrating import CalibrationOptions, Progress, pass_links
from toast_onnx_calibration.planning import statistics_for
from toast_onnx_calibration.room import drawn, spool_bytes
from toast_onnx_calibration.sensitivity_results import Trial
from toast_onnx_calibration.token_planning import FINALISTS, SAMPLES, open_token_trials, trials_needed
from toast_onnx_calibration.work import open_work, working_bytes


@dataclass(frozen=True)
class Foreseen:
    """What a run will take.

    Attributes:
        trials: models that are run on the samples.
        seconds: in one process, as busy as the machine is now.
        disk: bytes of working files at their most.
        samples: that are drawn.
        trial_samples: that single parts are run on.
        tried: samples that this was measured on.
    """

    trials: int
    seconds: float
    disk: int
    samples: int
    trial_samples: int
    tried: int


def foresee(
    dense: Study,
    data: str | Path,
    settings: Ratios,
    parts: Sequence[str],
    trials: Sequence[Trial],
    options: CalibrationOptions,
    statistics: Path | None = None,
    output: str | None = None,
    planned: bool = False,
    trial_samples: int | None = None,
) -> Foreseen:
    """Measure one trial of every part on one batch, and say what all trials on all samples will take.

    Args:
        dense: the model.
        data: samples.
        settings: how parts would be pruned.
        parts: heads, qk, vo, fc1, fc2, tokens.
        trials: what is to be measured.
        options: how samples are read and run.
        statistics: file of earlier measurements; None measures them first.
        output: as for `open_work`.
        planned: whether schedules of merging, and then whole plans, are run behind the trials.
        trial_samples: how many samples trials run on; None for all.

    Raises:
        ToastError: as for `open_work`.
    """
    count = drawn(data, options.samples)
    tried = min(options.batch, count or options.batch)
    longer = 1.0 if count is None else count / tried
    run = min(count or tried, max(tried, trial_samples or count or tried))
    running = 0.0

    @contextmanager
    def calibrating() -> Iterator[Progress]:
        nonlocal running
        last = time.perf_counter()

        def show(done: int, _total: int | None, _note: str) -> None:
            nonlocal last, running
            now = time.perf_counter()
            running += (now - last) if done else 0.0
            last = now

        yield show

    start = time.perf_counter()
    few = replace(options, samples=tried)
    with open_work(dense, data, settings, parts, few, statistics, None, output, calibrating) as work:
        opening = time.perf_counter() - start - running - work.trials.running
        seconds = opening + longer * (running + work.trials.running)
        first = {trial.part: trial for trial in reversed(trials)}
        for _ in work.damages(list(first.values())):
            pass
        ahead = [(trial.part, work.cost(trial) * run / (count or run)) for trial in trials]
        number = len(trials)
        tokens = open_token_trials(dense, settings, work.trials, work.merged) if planned and TOKENS in parts else None
        if tokens is not None:
            schedules = trials_needed(tokens)
            ahead += [(TOKENS, min(run, SAMPLES) / (count or run))] * schedules
            number += schedules
        if planned:
            whole = [(part, 0.0) for part in parts if part != TOKENS for _ in dense.match.blocks]
            ahead += [*whole, (TOKENS, 1.0)] * (FINALISTS if tokens is not None else 1)
            number += FINALISTS if tokens is not None else 1
        seconds += work.forecast.seconds(ahead, longer) or 0.0
    wanted = statistics_for(dense, settings, [p for p in parts if p != TOKENS])  # type: ignore[misc]
    measured = (count or 0) * (1 + options.views)
    spool = spool_bytes(dense, pass_links(dense, wanted, options), measured) if wanted and statistics is None else 0
    return Foreseen(
        number, seconds, max(spool, working_bytes(dense, count, output)), count or 0, min(run, count or 0), tried
    )
