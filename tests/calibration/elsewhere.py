"""Workers elsewhere without Ray: each opens what was pickled, and tasks come back out of order."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from toast_onnx_calibration.executing import Job, Pool, Report


class Elsewhere:
    """Opens pools of two workers, each in a folder of its own."""

    def __init__(self, folder: Path, workers: int = 2) -> None:
        self.folders = [folder / f"worker-{number}" for number in range(workers)]
        for each in self.folders:
            each.mkdir()

    @contextmanager
    def open(self, job: Job) -> Iterator[Pool]:
        order = pickle.dumps(job.order())
        with ExitStack() as stack:
            orders = [pickle.loads(order) for _ in self.folders]
            yield Apart(
                [stack.enter_context(o.open(lambda p: p, f)) for o, f in zip(orders, self.folders, strict=True)]
            )


class Apart:
    """Workers that take turns, beginning with the last task."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.workers = jobs, len(jobs)
        self.given: list[Any] = []

    def do(self, tasks: Sequence[Any], report: Report | None = None) -> Iterator[tuple[int, Any]]:
        done: dict[int, int] = {}

        def told(number: int, count: int) -> None:
            done[number] = count
            if report is not None:
                report(sum(done.values()))

        self.given += tasks
        for turn, number in enumerate(reversed(range(len(tasks)))):
            job = self.jobs[turn % self.workers]
            task = pickle.loads(pickle.dumps(tasks[number]))
            yield number, pickle.loads(pickle.dumps(job.do(task, lambda count, n=number: told(n, count))))
