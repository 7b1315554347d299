"""What measuring damages works with: statistics, samples, and the dense model's answers, in a folder of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from toast_onnx.errors import ConfigError
from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import Ratios
from toast_onnx.planning.width_costs import TOKENS, Part
from toast_onnx_calibration.calibrating import CalibrationOptions, Progress, calibrate
from toast_onnx_calibration.labels import open_labels
from toast_onnx_calibration.planning import statistics_for
from toast_onnx_calibration.sensitivity_stream import Trials, read_samples
from toast_onnx_calibration.sensitivity_trials import Solver, Trial, identity_of, merged_alone
from toast_onnx_calibration.statistics import CalibratedStatistics


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
        trials: runs new weights.
        narrowing: what makes new weights; None where only tokens are merged.
        settings: how parts would be pruned.
    """

    trials: Trials
    narrowing: Narrowing | None
    settings: Ratios

    def identity(self) -> dict[str, Any]:
        """What results measured with this belong to."""
        statistics = None if self.narrowing is None else self.narrowing.statistics
        return identity_of(self.trials.study, self.trials, self.settings, statistics)

    def damage(self, trial: Trial) -> dict[str, float]:
        """Make what a trial says and measure it: one part of one block smaller, or tokens merged behind it."""
        if trial.part == TOKENS:
            return self.trials.damage_of(
                merged_alone(self.trials.study, self.settings, trial.block, trial.kept[TOKENS])
            )
        assert self.narrowing is not None
        kept = cast(dict[Part, int], trial.kept)
        return self.trials.damage(self.narrowing.solver.weights({trial.block: kept}))


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

    Raises:
        ConfigError: nothing can be pruned.
        DataError: data, labels or statistics cannot be read.
    """
    narrow = [p for p in parts if p != TOKENS]
    wanted = statistics_for(dense, settings, cast(Sequence[Part], narrow))
    if narrow and not wanted:
        raise ConfigError(f"no block has a prunable part among {', '.join(narrow)}; see `toast-onnx inspect`")
    known = None if labels is None else open_labels(labels, str(data))
    with TemporaryDirectory(prefix="toast-planning-") as name:
        folder = Path(name)
        path = statistics
        if path is None and narrow:
            path = folder / "statistics.npz"
            with calibrating() as progress:
                calibrate(dense, data, path, wanted, options, progress)
        found = CalibratedStatistics(dense, path) if path is not None and narrow else None
        samples = read_samples(dense, data, options, folder)
        for text in samples.notes:
            note(text)
        trials = Trials(dense, samples, options, folder, output, known)
        if path is None or found is None:
            yield Work(trials, None, settings)
            return
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        yield Work(trials, Narrowing(Solver(dense, settings, found), found, digest), settings)
