"""Samples by number: what a data set must offer to be trained on, and batches of it read ahead on threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]


class Samples(Protocol):
    """Samples that can be read in any order, as often as wanted."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, index: int, rng: np.random.Generator | None) -> Arrays:
        """One sample: input name -> array without the batch axis; augmented by `rng`, plain where that is None."""
        ...

    def label(self, index: int) -> int | None:
        """Its class number, None where it has none."""
        ...


@dataclass(frozen=True)
class Batch:
    """Some samples stacked.

    Attributes:
        feeds: input name -> (B, ...).
        labels: (B,) class numbers, None where a sample has none.
        valid: how many of the B count; the rest fills a fixed batch.
    """

    feeds: Arrays
    labels: np.ndarray[Any, Any] | None
    valid: int


def hold_out(count: int, fraction: float, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sample numbers to train on and to keep for evaluation, both ascending, drawn by seed."""
    order = np.random.default_rng([seed, 0]).permutation(count)
    held = min(max(1, round(fraction * count)), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def rows_of_step(
    numbers: np.ndarray[Any, Any], step: int, size: int, rank: int, ranks: int, seed: int
) -> list[tuple[int, int]]:
    """What one process reads in one step: (sample number, epoch) of `size` samples.

    The epochs' shuffled orders form one endless list; step after step, process after process takes its share. So any
    step can be computed alone, which is what makes a resumed run equal to an uninterrupted one.
    """
    first = (step * ranks + rank) * size
    places = range(first, first + size)
    orders = {e: np.random.default_rng([seed, 1, e]).permutation(numbers) for e in {p // len(numbers) for p in places}}
    return [(int(orders[p // len(numbers)][p % len(numbers)]), p // len(numbers)) for p in places]


def training_batch(samples: Samples, rows: Sequence[tuple[int, int]], seed: int) -> Batch:
    """Read and augment rows; each sample's augmentation depends on seed, epoch and its number alone."""
    read = [samples.read(i, np.random.default_rng([seed, 2, epoch, i])) for i, epoch in rows]
    return _stack(read, [samples.label(i) for i, _ in rows], len(rows))


def plain_batches(samples: Samples, numbers: np.ndarray[Any, Any], size: int, fixed: bool) -> Iterator[Batch]:
    """Batches in order, without augmentation; with a fixed batch size the last is filled with repetitions."""
    for start in range(0, len(numbers), size):
        rows = [int(i) for i in numbers[start : start + size]]
        filled = rows + [rows[-1]] * (size - len(rows) if fixed else 0)
        yield _stack([samples.read(i, None) for i in filled], [samples.label(i) for i in filled], len(rows))


class Reader:
    """Training batches by step, a few of them prepared ahead on threads."""

    def __init__(
        self, samples: Samples, numbers: np.ndarray[Any, Any], size: int, rank: int, ranks: int, seed: int
    ) -> None:
        """Start no work yet; `size` is the number of samples a process takes a step."""
        self._samples, self._numbers, self._size = samples, numbers, size
        self._rank, self._ranks, self._seed = rank, ranks, seed

    def steps(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of the steps first .. last - 1, in order."""
        threads = min(8, os.cpu_count() or 1)
        waiting: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="read-samples")
        try:
            upcoming = iter(range(first, last))
            for step in upcoming:
                waiting.append(pool.submit(self._read, step))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> Batch:
        rows = rows_of_step(self._numbers, step, self._size, self._rank, self._ranks, self._seed)
        return training_batch(self._samples, rows, self._seed)


def _stack(read: Sequence[Arrays], labels: Sequence[int | None], valid: int) -> Batch:
    feeds = {name: np.stack([sample[name] for sample in read]) for name in read[0]}
    known = [label for label in labels if label is not None]
    return Batch(feeds, np.asarray(known, np.int64) if len(known) == len(labels) else None, valid)
