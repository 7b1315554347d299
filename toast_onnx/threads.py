"""Threads: how many there are, and work that several of them share while its results come in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice
from typing import TypeVar

from threadpoolctl import threadpool_info, threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


def wished_threads(threads: int | None) -> int | None:
    """How many threads a library may use: as given, else as `OMP_NUM_THREADS` says; None leaves it to the library."""
    wished = os.environ.get("OMP_NUM_THREADS", "")
    return threads or (int(wished) if wished.isdecimal() and int(wished) else None)


def count_threads(threads: int | None) -> int:
    """How many threads may work: as wished, else one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wished_threads(threads) or cores


def shared_work(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int | None, most: int
) -> Iterator[Result]:
    """Results in the order of the items, worked on by several threads; each has its share of BLAS's threads.

    Products of small matrices keep one core busy however many BLAS may use; those of different items keep as many as
    there are. With one worker nothing is begun before the result ahead of it was taken.

    Args:
        work: called with one item; it must not depend on results that were not taken yet, unless `most` is 1.
        items: what to work on.
        threads: as for `count_threads`.
        most: how many items may be worked on at once, for the memory that each needs.
    """
    available = count_threads(threads)
    workers = max(1, min(available, most, len(items)))
    allowed = [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]
    share = min([max(1, available // workers), *allowed])  # no more than a caller, or the environment, allows
    with threadpool_limits(limits=share, user_api="blas"):
        if workers == 1:
            yield from map(work, items)
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="share-work")
        begun = (pool.submit(copy_context().run, work, item) for item in items)
        try:
            waiting = deque[Future[Result]](islice(begun, workers))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(islice(begun, 1))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
