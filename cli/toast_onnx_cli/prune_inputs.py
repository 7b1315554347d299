"""What `prune` reads besides the model: statistics, and samples to correct weights and to prove on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ConfigError
from toast_onnx.finetune.local import LocalResult, LocalSettings
from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import Ratios
from toast_onnx.pruning import Refine
from toast_onnx.solving.weights import BlockWeights
from toast_onnx_cli.calibration_options import sample_progress
from toast_onnx_cli.console import Advance, say_notes

if TYPE_CHECKING:
    from toast_onnx_calibration.calibrating import CalibrationOptions
    from toast_onnx_calibration.recorded import Recording
    from toast_onnx_calibration.sequential import SequentialStatistics
    from toast_onnx_calibration.statistics import CalibratedStatistics


def samples_to_refine(
    dense: Study, ratios: Ratios, data: str | None, statistics: Path | None, options: CalibrationOptions
) -> str | None:
    """Where the samples are that blocks are corrected on, one after the other; None without such correction.

    `compensation: local` needs samples, also beside a statistics file; `ridge` uses them where they are at hand anyway.

    Args:
        dense: the model.
        ratios: the ratios file; its `calibration: data:` counts where `data` is None.
        data: what was given on the command line.
        statistics: file of earlier measurements.
        options: how samples are read.

    Raises:
        ConfigError: there are no samples; or no classes for views of them.
        DataError: views are asked for, and the first samples cannot be read, or have no gradient.
        BackendError: PyTorch is not installed.
        ModelError: views are asked for, and an operator of the model has no counterpart in PyTorch.
    """
    if ratios.compensation.kind == "ridge":
        return data or (ratios.calibration.data if statistics is None else None)
    if ratios.compensation.kind != "local":
        return None
    samples = data or ratios.calibration.data
    if samples is None:
        raise ConfigError(
            "compensation: local trains blocks on calibration samples: give them with --data, or choose kind: ridge"
        )
    from toast_onnx.finetune.local import require_torch

    require_torch()
    if ratios.compensation.views:
        from toast_onnx_calibration.local import shared_classes

        shared_classes(dense, samples, options)
    return samples


def idle_settings(ratios: Ratios) -> list[str]:
    """What a ratios file asks for in vain, for notes."""
    kind = ratios.compensation.kind
    if kind == "local":
        return []
    idle = (key for key in ("compensation.steps", "compensation.views") if ratios.given(key))
    return [f"{key} does nothing with kind: {kind}; kind: local trains" for key in idle]


def local_settings(ratios: Ratios, options: CalibrationOptions) -> LocalSettings:
    """How blocks are corrected: trained where `compensation: local` is asked for, refitted otherwise."""
    chosen = ratios.compensation
    trains = chosen.kind == "local"
    steps, views = (chosen.steps, chosen.views) if trains else (0, 0)
    return LocalSettings(steps, class_weight=options.class_weight, seed=options.seed, views=views)


def refinement(
    dense: Study,
    settings: LocalSettings,
    samples: str | None,
    options: CalibrationOptions,
    advance: Advance,
    recording: Recording | None,
) -> Refine | None:
    """What corrects the new weights on samples, None where there are none.

    Args:
        dense: the model.
        settings: how blocks are corrected.
        samples: as `samples_to_refine` found them.
        options: how to read and run them.
        advance: called `local.refining_steps` times.
        recording: what statistics of the same samples left, if anything.
    """
    if samples is None:
        return None
    from toast_onnx_calibration.local import refine_locally

    def refine(new: Mapping[int, BlockWeights]) -> tuple[dict[int, BlockWeights], tuple[LocalResult, ...]]:
        return refine_locally(dense, new, samples, options, settings, lambda note: advance(1, note), recording)

    return refine


def proof_samples(
    dense: Study, ratios: Ratios, data: str | None, statistics: Path | None, options: CalibrationOptions
) -> Sequence[Mapping[str, np.ndarray]]:
    """Samples that the proof runs on besides what it makes up; none without data.

    Args:
        dense: the model.
        ratios: the ratios file; its `calibration: data:` counts where neither of the next two is given.
        data: where samples are.
        statistics: file of earlier measurements.
        options: how to read them.
    """
    data = data or (ratios.calibration.data if statistics is None else None)
    if data is None:
        return ()
    from toast_onnx_calibration.calibrating import first_samples

    return first_samples(dense, data, options)


@contextmanager
def kept_outputs(dense: Study, ratios: Ratios, samples: str | None) -> Iterator[Recording | None]:
    """What keeps the outputs of a model's blocks for the correction of blocks; None where nobody will ask for them.

    Args:
        dense: the model.
        ratios: the ratios file.
        samples: that are measured and corrected on; None where it is not both.
    """
    if samples is None or ratios.compensation.statistics == "sequential":
        yield None
        return
    from toast_onnx_calibration.needs import needed
    from toast_onnx_calibration.recorded import Recording

    with tempfile.TemporaryDirectory(prefix="toast-outputs-") as folder:
        yield Recording(dense, needed(dense, ratios).keys(), Path(folder))


@contextmanager
def find_statistics(
    dense: Study,
    ratios: Ratios,
    data: str | None,
    statistics: Path | None,
    options: CalibrationOptions,
    recording: Recording | None = None,
) -> Iterator[SyntheticStatistics | CalibratedStatistics | SequentialStatistics]:
    """Statistics for a run: of a file, measured now (for sequential ones, block by block), or made up without data.

    Args:
        dense: the model.
        ratios: what will be asked for; its `calibration: data:` counts where neither of the next two is given.
        data: where to measure.
        statistics: file of earlier measurements.
        options: how to measure.
        recording: what keeps outputs of the model's blocks meanwhile.

    Raises:
        ConfigError: the ratios do not fit the model.
        DataError: the data or the file do not fit the model.
    """
    data = data or (ratios.calibration.data if statistics is None else None)
    if data is None and statistics is None:
        yield SyntheticStatistics(dense, options.seed)
        return
    from toast_onnx_calibration.calibrating import calibrate
    from toast_onnx_calibration.needs import needed
    from toast_onnx_calibration.sequential import SequentialStatistics
    from toast_onnx_calibration.statistics import CalibratedStatistics

    if statistics is not None:
        yield CalibratedStatistics(dense, statistics)
        return
    assert data is not None
    wanted = needed(dense, ratios)
    if not wanted:  # nothing is removed, or by weights alone
        yield SyntheticStatistics(dense, options.seed)
        return
    with tempfile.TemporaryDirectory(prefix="toast-statistics-") as folder:
        if ratios.compensation.statistics == "sequential":
            behind = SequentialStatistics(dense, data, wanted, options, Path(folder))
            yield behind
            say_notes(behind.notes)
            return
        path = Path(folder) / "statistics.npz"
        with sample_progress("calibrating") as show:
            header = calibrate(dense, data, path, wanted, options, show, recording=recording)
        say_notes(header.notes)
        yield CalibratedStatistics(dense, path)
