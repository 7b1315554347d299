"""What makes plans, for every command that needs one: measurements opened once, any number of budgets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from toast_onnx.errors import ConfigError
from toast_onnx.matching.study import Study
from toast_onnx.model import file_hash
from toast_onnx.planning.cost_table import CostTable, read_table, write_table
from toast_onnx.planning.width_costs import TOKENS
from toast_onnx.tokens.points import study_tokens
from toast_onnx_cli.console import progress, say_note
from toast_onnx_cli.planning_options import Counted, Planning, counted, open_trials

if TYPE_CHECKING:
    from toast_onnx_calibration.costs import Runtime
    from toast_onnx_calibration.plans import Planner

#: What may shrink, and the ratios that are measured, where nothing else is said.
PARTS, POINTS = (TOKENS, "qk", "vo", "fc2", "heads"), (0.25, 0.6)


@contextmanager
def open_planner(
    dense: Study,
    planning: Planning,
    parts: tuple[str, ...] = PARTS,
    points: tuple[float, ...] = POINTS,
    results: Path | None = None,
    kind: str = "macs",
    costs: Path | None = None,
    no_timing: bool = False,
    trial_samples: int | None = None,
) -> Iterator[Planner]:
    """What plans for budgets of a kind; statistics, samples and the dense model's answers are taken here, once.

    Args:
        dense: the model.
        planning: samples, and how parts would be pruned.
        parts: what may shrink.
        points: ratios that are measured.
        results: file of sensitivity results to start from and to add to.
        kind: macs, params or latency.
        costs: latency table, read or written.
        no_timing: trust the table.
        trial_samples: how many samples are run for what is measured, as for `trial_samples_for`.
    """
    from toast_onnx_calibration.plans import Planner

    table, runtime = _costs(dense, planning, parts, costs, no_timing) if kind == "latency" else (None, None)
    if table is not None:
        parts = _timed(dense, table, parts)
    with open_trials(dense, planning, parts, trial_samples_for(trial_samples, results)) as work:
        yield Planner(dense, planning.settings, parts, points, results, table, runtime, work, _measuring)


def trial_samples_for(asked: int | None, results: Path | None) -> int:
    """How many samples trials run on: what was asked for, else what those of a results file ran on, else the default.

    Raises:
        DataError: the file is damaged, or no results file.
    """
    from toast_onnx_calibration.planning import TRIAL_SAMPLES
    from toast_onnx_calibration.sensitivity_results import trial_samples_of

    return asked or trial_samples_of(results) or TRIAL_SAMPLES


def _costs(
    dense: Study, planning: Planning, parts: tuple[str, ...], path: Path | None, no_timing: bool
) -> tuple[CostTable, Runtime | None]:
    """The table, and what the planned model is timed with; a table that is not there yet is measured and written."""
    from toast_onnx_calibration.costs import measure_costs, onnxruntime_runtime

    table = None
    if path is not None and path.exists():
        table = read_table(path, dense, file_hash(dense.view.model.path))
        if table.runtime.get("program") != "onnxruntime" and not no_timing:
            raise ConfigError(
                f"{path} was measured with {table.runtime.get('program')}; add --no-timing, because a planned model "
                "can be timed with onnxruntime only"
            )
    elif no_timing:
        raise ConfigError(f"{path} does not exist; `toast-onnx costs` writes a cost table")
    if no_timing:
        assert table is not None
        return table, None
    batch = table.batch if table is not None else 1
    running = planning.calibration
    runtime = onnxruntime_runtime(batch, running.threads, running.provider, shapes=planning.shapes)
    if table is None:
        with progress("timing widths") as advance:
            table = measure_costs(dense, runtime, parts, planning.settings.align, progress=counted(advance))
        if path is not None:
            write_table(table, path)
    return table, runtime


def _timed(study: Study, table: CostTable, parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts that a table has times for, or all where it has none; says what is left out."""
    if TOKENS in parts and table.merged and table.merged_line() is None:
        say_note("by the cost table merging tokens makes nothing faster here, so tokens stay")
        parts = tuple(p for p in parts if p != TOKENS)
    known = tuple(p for p in parts if any(t.part == p for t in table.parts) or (p == TOKENS and table.merged))
    lacking = [p for p in parts if p not in known and (p != TOKENS or study_tokens(study).mergeable)]
    if known and lacking:
        say_note(
            f"the cost table has no times for {', '.join(lacking)}, which stay as they are; `toast-onnx costs` "
            "measures them into a new table"
        )
    return known or parts


@contextmanager
def _measuring(trials: int) -> Iterator[Counted]:
    with progress("measuring", trials) as advance:
        yield counted(advance)
