"""Where independent pieces of work are done: here one after another, or by workers elsewhere.

What divides its work (trials, schedules, shards of samples) asks a pool for results and does not know who gives them.
A job is opened once by every worker and then does any number of tasks; its results depend on the task alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

from toast_onnx import __version__
from toast_onnx.external import links_followed, set_links_followed
from toast_onnx_calibration.recipes import max_pixels, set_max_pixels

Report = Callable[[int], None]
"""Called with how much of a task is done so far, in whatever its job counts."""
Find = Callable[[Path], Path]
"""Where a file that a job reads lies for a worker."""


class Job(Protocol):
    """Work that is divided into tasks."""

    def do(self, task: Any, report: Report) -> Any:
        """The result of a task, whatever was done before."""

    def order(self) -> Order:
        """What another process opens the same job from."""


class Order(Protocol):
    """A job as it is sent to workers: it can be pickled.

    Attributes:
        files: what it reads from files; the first of each tuple is named, the others lie in its folder.
        threads: a worker uses; 0 for all of its machine, on which it is alone.
        provider: a key of `toast_onnx.providers.PROVIDERS`.
        solver: a key of `toast_onnx.importance.arithmetic.SOLVERS`; `cpu` where nothing is solved.
    """

    @property
    def files(self) -> tuple[tuple[Path, ...], ...]: ...
    @property
    def threads(self) -> int: ...
    @property
    def provider(self) -> str: ...
    @property
    def solver(self) -> str: ...
    def open(self, find: Find, folder: Path) -> AbstractContextManager[Job]:
        """Open the job in a process of its own.

        Args:
            find: where its files lie there.
            folder: for working files.
        """


class Pool(Protocol):
    """Whoever does the tasks of one job.

    Attributes:
        workers: how many tasks are done at the same time.
    """

    @property
    def workers(self) -> int: ...
    def do(self, tasks: Sequence[Any], report: Report | None = None) -> Iterator[tuple[int, Any]]:
        """Number and result of every task, in the order in which they are done.

        Args:
            tasks: what to do.
            report: called with how much of all tasks is done.
        """


class Executor(Protocol):
    """Opens pools."""

    def open(self, job: Job) -> AbstractContextManager[Pool]:
        """Whoever does the tasks of a job, until the context ends."""


@dataclass(frozen=True)
class Alone:
    """This process does all tasks of a job, one after another.

    Attributes:
        job: the job.
    """

    job: Job
    workers: ClassVar[int] = 1

    def do(self, tasks: Sequence[Any], report: Report | None = None) -> Iterator[tuple[int, Any]]:
        """Number and result of every task, in their order."""
        before = 0
        for number, task in enumerate(tasks):
            done = 0

            def told(count: int, before: int = before) -> None:
                nonlocal done
                done = count
                if report is not None:
                    report(before + count)

            yield number, self.job.do(task, told)
            before += done


class Here:
    """Opens pools of this process alone."""

    @contextmanager
    def open(self, job: Job) -> Iterator[Pool]:
        """A pool of this process."""
        yield Alone(job)


@dataclass(frozen=True)
class Rules:
    """What a process was told for all it reads, for workers to keep to.

    Attributes:
        links: whether links out of a model's folder are followed.
        pixels: of an image, at most.
        version: of toast-onnx.
    """

    links: bool
    pixels: int
    version: str = __version__

    @classmethod
    def present(cls) -> Rules:
        """Those of this process."""
        return cls(links_followed(), max_pixels())

    def keep(self) -> None:
        """Keep to them from now on."""
        set_links_followed(self.links)
        set_max_pixels(self.pixels)


def divided(count: int, batch: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of parts of some samples, in whole batches, as equal as can be; none is empty.

    Args:
        count: number of samples.
        batch: samples a batch.
        parts: how many are wished for.
    """
    runs = -(-count // batch)
    parts = max(1, min(parts, runs))
    bounds = [min(count, runs * k // parts * batch) for k in range(parts + 1)]
    return list(pairwise(bounds))
