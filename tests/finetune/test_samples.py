"""What is read when: every sample once an epoch, split over processes, the same whatever was read before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toast_onnx.finetune.samples import Reader, hold_out, plain_batches, rows_of_step


class Numbers:
    """Sample i is i, plus noise from the given generator."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        return {"x": np.array([index + (0 if rng is None else rng.random())])}

    def label(self, index: int) -> int | None:
        return index % 3


@given(st.integers(2, 500), st.floats(0.01, 0.9), st.integers(0, 5))
def test_held_out_and_training_samples_are_a_partition_and_neither_is_empty(count: int, part: float, seed: int) -> None:
    train, held = hold_out(count, part, seed)
    assert sorted([*train, *held]) == list(range(count))
    assert len(train) > 0
    assert len(held) > 0
    assert abs(len(held) - part * count) <= 1


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 3), st.integers(0, 3))
def test_every_epoch_reads_every_sample_once(count: int, size: int, ranks: int, seed: int) -> None:
    numbers = np.arange(100, 100 + count)
    steps = -(-2 * count // (size * ranks))
    rows = [
        row
        for step in range(steps)
        for rank in range(ranks)
        for row in rows_of_step(numbers, step, size, rank, ranks, seed)
    ]
    for epoch in (0, 1):
        assert sorted(i for i, e in rows if e == epoch) == sorted(numbers)


def test_epochs_differ_in_order() -> None:
    rows = rows_of_step(np.arange(50), 0, 100, 0, 1, 0)
    assert [i for i, _ in rows[:50]] != [i for i, _ in rows[50:]]


def test_a_later_start_reads_the_same_batches() -> None:
    reader = Reader(Numbers(10), np.arange(8), 3, 0, 1, 7)
    whole = [batch.feeds["x"] for batch in reader.steps(0, 12)]
    rest = [batch.feeds["x"] for batch in reader.steps(5, 12)]
    assert len(whole) == 12
    for a, b in zip(whole[5:], rest, strict=True):
        np.testing.assert_array_equal(a, b)


def test_augmentation_differs_between_epochs_and_samples() -> None:
    batch = next(iter(Reader(Numbers(4), np.arange(4), 8, 0, 1, 0).steps(0, 1)))
    fractions = batch.feeds["x"] % 1
    assert len(np.unique(fractions)) == 8


@pytest.mark.parametrize(("fixed", "sizes"), [(False, [3, 3, 1]), (True, [3, 3, 3])])
def test_plain_batches_come_in_order_and_fill_a_fixed_size(fixed: bool, sizes: list[int]) -> None:
    found = list(plain_batches(Numbers(7), np.arange(7), 3, fixed))
    assert [len(b.feeds["x"]) for b in found] == sizes
    assert [b.valid for b in found] == [3, 3, 1]
    assert np.concatenate([b.feeds["x"][: b.valid] for b in found]).ravel().tolist() == list(range(7))
