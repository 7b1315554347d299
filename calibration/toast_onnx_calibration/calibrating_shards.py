"""Calibration in shards: every worker measures one, and their sums are added up in the shards' order."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, scratch_folder
from toast_onnx_calibration.calibrating import (
    ByOptions,
    CalibrationOptions,
    Progress,
    calibrate,
    open_measured,
    whole_batch,
)
from toast_onnx_calibration.executing import Executor, Find, Report
from toast_onnx_calibration.executing_files import found_recipe, placed, reading_files
from toast_onnx_calibration.needs import GRADIENT, Wanted, everything, passes
from toast_onnx_calibration.sessions import graph_inputs, held_inputs
from toast_onnx_calibration.sources import shares_of
from toast_onnx_calibration.store import Header, merge_statistics

#: Name of the file that shows a worker whether it sees the folder that results go to.
_SIGN = "sign"


@dataclass(frozen=True)
class Shard:
    """A shard to measure.

    Attributes:
        number: from 1 on.
        of: how many there are.
        folder: where its file goes, if the worker sees it: the sign in it is this one.
        sign: as it stands in the folder.
    """

    number: int
    of: int
    folder: Path
    sign: str

    @property
    def path(self) -> Path:
        """Its file."""
        return self.folder / f"{self.number}.npz"

    def is_seen(self) -> bool:
        """Whether the folder is the one that was meant."""
        try:
            return (self.folder / _SIGN).read_text() == self.sign
        except OSError:
            return False


@dataclass(frozen=True)
class Calibration:
    """Measuring shards of some samples.

    Attributes:
        study: the model.
        data: as for `sources.open_source`.
        wanted: block number -> parts to measure.
        options: how to calibrate.
    """

    study: Study
    data: str | Path
    wanted: Wanted
    options: CalibrationOptions

    def do(self, task: Shard, report: Report) -> bytes | None:
        """Measure a shard: its file, or None where it lies in the folder that was asked for."""
        options = replace(self.options, shard=(task.number, task.of))
        with scratch_folder("toast-shard-") as folder:
            seen = task.is_seen()
            path = task.path if seen else folder / task.path.name
            calibrate(self.study, self.data, path, self.wanted, options, lambda done, _total, _note: report(done))
            return None if seen else path.read_bytes()

    def order(self) -> CalibrationOrder:
        """What another process opens the same from."""
        path = self.study.view.model.path.absolute()
        return CalibrationOrder(path, self.study.given, placed(self.data), self.wanted, self.options.sent(path))


@dataclass(frozen=True)
class CalibrationOrder(ByOptions):
    """Calibration as it is sent to workers.

    Attributes:
        model: file of the model.
        given: the concrete shapes that were asked for.
        data: as for `sources.open_source`; every worker reads its own share.
        wanted: block number -> parts to measure.
        options: how to calibrate.
    """

    model: Path
    given: Mapping[str, Sequence[int]]
    data: str
    wanted: Wanted
    options: CalibrationOptions
    solver: ClassVar[str] = "cpu"

    @property
    def files(self) -> tuple[tuple[Path, ...], ...]:
        """The model, and where a recipe may stand."""
        return reading_files(self.model, self.options.preprocess)

    @contextmanager
    def open(self, find: Find, _folder: Path) -> Iterator[Calibration]:
        """The same calibration in a process of its own."""
        options = replace(self.options, preprocess=found_recipe(self.options.preprocess, find))
        yield Calibration(study(load_model(find(self.model)), self.given), self.data, self.wanted, options)


def calibrate_on(
    executor: Executor,
    dense: Study,
    data: str | Path,
    out: Path,
    wanted: Wanted | None = None,
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> Header:
    """As `calibrate`, with a shard of the samples for every worker.

    Args:
        executor: who measures.
        dense: the model.
        data: as for `sources.open_source`; workers elsewhere read it under the same name.
        out: the statistics file.
        wanted: block number -> parts to measure; None takes what the defaults of pruning need.
        options: how to calibrate.
        progress: called as the workers go on.

    Raises:
        ToastError: its children say what is wrong with the data, an option, or the model.
    """
    options = options or CalibrationOptions()
    wanted = everything(dense) if wanted is None else wanted
    with executor.open(Calibration(dense, data, wanted, options)) as pool:
        if pool.workers == 1:
            return calibrate(dense, data, out, wanted, options, progress)
        inputs = held_inputs(dense, graph_inputs(dense.source))
        source, _ = open_measured(dense, data, inputs, options)
        parts = shares_of(source, whole_batch(inputs, options), pool.workers)
        shards, count = len(parts), parts[-1][1]
        total = count * len(passes(dense, {b: p - {GRADIENT} for b, p in wanted.items()}, options.budget))

        def report(done: int) -> None:
            if progress is not None:
                progress(done, total, f"{shards} shards")

        report(0)
        with scratch_folder("toast-shards-") as folder:
            sign = secrets.token_hex(16)
            (folder / _SIGN).write_text(sign)
            tasks = [Shard(number, shards, folder, sign) for number in range(1, shards + 1)]
            for number, content in pool.do(tasks, report):
                if content is not None:
                    tasks[number].path.write_bytes(content)
            header = merge_statistics([task.path for task in tasks], out)
        report(total)
        return header
