"""Measuring from Python: `calibrate`, `plan` and `sensitivity` of a loaded model on data; results show themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from toast_onnx.errors import ConfigError
from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import Ratios
from toast_onnx_calibration import calibrating
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.needs import needed
from toast_onnx_calibration.planning import POINTS, TRIAL_SAMPLES, Budget, check_settings
from toast_onnx_calibration.plans import Plan, Planner
from toast_onnx_calibration.sensitivity_results import Sensitivity, resume
from toast_onnx_calibration.sensitivity_trials import measure, trial_grid
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_calibration.work import open_work

#: Samples that are read unless told otherwise, as the commands do.
SAMPLES = 256


def calibrate(
    model: Study,
    data: str | Path,
    *,
    ratios: Ratios | None = None,
    preprocess: str | None = None,
    samples: int | None = SAMPLES,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> CalibratedStatistics:
    """Measure a model's activations on samples, for `toast_onnx.prune`.

    Args:
        model: what `toast_onnx.load` gave.
        data: a folder of images, a .npy or .npz file, or `module:function`.
        ratios: measure only what pruning with these needs; None measures what the defaults of pruning need.
        preprocess: name or file of a recipe; None looks beside the model, then takes imagenet.
        samples: how many to draw; None takes all.
        seed: of that draw.
        out: file to write the statistics to; None keeps them in a temporary file for as long as they are used.
        options: more fields of `CalibrationOptions`.

    Raises:
        ToastError: its children say what is wrong with the data, an option, or the model.
    """
    chosen = CalibrationOptions(preprocess=preprocess, samples=samples, seed=seed, **options)
    wanted = None if ratios is None else needed(model, ratios)
    if out is not None:
        calibrating.calibrate(model, data, Path(out), wanted, chosen)
        return CalibratedStatistics(model, out)
    folder = TemporaryDirectory(prefix="toast-statistics-")
    path = Path(folder.name) / "statistics.npz"
    calibrating.calibrate(model, data, path, wanted, chosen)
    return CalibratedStatistics(model, path, folder)


def plan(
    model: Study,
    data: str | Path,
    *,
    macs: float | None = None,
    params: float | None = None,
    settings: Ratios | None = None,
    parts: Sequence[str] = ("tokens", "heads", "qk", "vo", "fc2"),
    points: Sequence[float] = POINTS,
    trial_samples: int | None = TRIAL_SAMPLES,
    preprocess: str | None = None,
    samples: int | None = SAMPLES,
    seed: int = 0,
    **options: Any,
) -> Plan:
    """Find the ratios that fit a budget and hurt the output least; `toast_onnx.prune` takes the plan as it is.

    Args:
        model: what `toast_onnx.load` gave.
        data: as for `calibrate`.
        macs: multiply-accumulates to keep, as a fraction of the whole model's; give this or `params`.
        params: parameters to keep, as a fraction of the whole model's.
        settings: selection, scores, compensation and alignment; its ratios do not count.
        parts: what may shrink; `tokens` merges tokens where they can be merged and `macs` is the budget.
        points: ratios that are measured.
        trial_samples: how many of the samples are run for each; None for all.
        preprocess: as for `calibrate`.
        samples: as for `calibrate`.
        seed: as for `calibrate`.
        options: more fields of `CalibrationOptions`.

    Raises:
        ConfigError: not exactly one budget, a budget that cannot be reached, or settings that no plan can speak of.
        DataError: the data cannot be read.
    """
    budgets = [Budget("macs", macs)] if macs is not None else []
    budgets += [Budget("params", params)] if params is not None else []
    if len(budgets) != 1 or not 0 < budgets[0].share < 1:
        raise ConfigError("a plan has one budget: give macs or params, a fraction above 0 and below 1")
    settings = settings or Ratios()
    check_settings(settings)
    chosen = CalibrationOptions(preprocess=preprocess, samples=samples, seed=seed, **options)
    with open_work(model, data, settings, parts, chosen, trial_samples=trial_samples) as work:
        return Planner(model, settings, tuple(parts), tuple(points), None, None, None, work).plan(budgets[0])


def sensitivity(
    model: Study,
    data: str | Path,
    *,
    settings: Ratios | None = None,
    parts: Sequence[str] = ("tokens", "qk", "vo", "fc1", "fc2"),
    ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    blocks: Sequence[int] | None = None,
    preprocess: str | None = None,
    samples: int | None = SAMPLES,
    seed: int = 0,
    **options: Any,
) -> Sensitivity:
    """Prune one part of one block at a time, or merge tokens behind it, and measure what it does to the output.

    Args:
        model: what `toast_onnx.load` gave.
        data: as for `calibrate`.
        settings: selection, scores, compensation and alignment.
        parts: what to prune in turn.
        ratios: fractions removed.
        blocks: numbers of blocks; None takes all.
        preprocess: as for `calibrate`.
        samples: as for `calibrate`.
        seed: as for `calibrate`.
        options: more fields of `CalibrationOptions`.

    Raises:
        ConfigError: nothing can be tried.
        DataError: the data cannot be read.
    """
    settings = settings or Ratios()
    check_settings(settings)
    grid = trial_grid(model, settings, parts, ratios, blocks)
    if not grid:
        raise ConfigError("nothing to try: no block has a prunable part that these ratios would make smaller")
    single = tuple(dict.fromkeys(p for t in grid for p in t.kept))
    chosen = CalibrationOptions(preprocess=preprocess, samples=samples, seed=seed, **options)
    with open_work(model, data, settings, single, chosen) as work:
        metric = "kl" if work.trials.classes else "relative_error"
        return measure(work.damages, grid, resume(None, work.identity(), metric, None))
