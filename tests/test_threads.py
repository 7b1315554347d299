"""Work that threads share: in order, bounded, with BLAS divided among them; and blocks solved that way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from tests import zoo
from tests.pruning import look
from toast_onnx.choosing.at_once import blocks_at_once
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.importance.graphics import Graphics
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx.threads import count_threads, shared_work, wished_threads

VIT = zoo.Case("timm-vit", "dynamo-20", "dynamic")


def test_threads_are_those_asked_for_then_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (wished_threads(None), wished_threads(2), count_threads(None), count_threads(2)) == (3, 2, 3, 2)
    for nothing in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert wished_threads(None) is None
        assert count_threads(None) >= 1


def test_results_come_in_order_and_no_more_than_so_many_items_are_begun() -> None:
    begun: list[int] = []
    later = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 0:
            assert later.wait(60)  # the second item is worked on meanwhile
        elif item == 1:
            later.set()
        return item * item

    results = shared_work(work, range(7), threads=8, most=2)
    assert next(results) == 0
    assert set(begun) <= {0, 1, 2}
    assert list(results) == [1, 4, 9, 16, 25, 36]
    assert sorted(begun) == list(range(7))


def test_with_one_worker_an_item_sees_the_result_before_it() -> None:
    taken: list[int] = []
    for result in shared_work(lambda item: item + sum(taken), [1, 2, 3], threads=8, most=1):
        taken.append(result)
    assert taken == [1, 3, 7]


@pytest.mark.parametrize("most", [1, 3])
def test_the_first_failure_in_order_is_raised_and_what_waits_is_not_begun(most: int) -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item >= 2:
            raise ValueError(f"item {item}")
        return item

    results = shared_work(work, range(50), threads=4, most=most)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match=r"^item 2$"):
        next(results)
    assert len(begun) < 10


@pytest.mark.parametrize(("threads", "most", "each"), [(4, 1, 4), (4, 2, 2), (4, 3, 1), (2, 8, 1), (6, 4, 2)])
def test_blas_has_its_share_inside_and_all_it_had_behind(threads: int, most: int, each: int) -> None:
    def blas(_: int) -> set[int]:
        return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}

    before = blas(0)
    if not before:
        pytest.skip("NumPy's BLAS cannot be told how many threads to take")
    # three items: more workers than items there are not
    with threadpool_limits(8, user_api="blas"):
        assert set().union(*shared_work(blas, range(3), threads, most)) == {each}
        assert blas(0) == {8}
    with threadpool_limits(1, user_api="blas"):  # a caller's own limit, or the environment's
        assert set().union(*shared_work(blas, range(3), threads, most)) == {1}
    assert blas(0) == before


def test_workers_see_the_callers_context() -> None:
    seen = ContextVar("seen", default="nothing")
    seen.set("what was set")
    assert list(shared_work(lambda _: seen.get(), range(3), threads=2, most=2)) == ["what was set"] * 3


def test_blocks_solved_side_by_side_are_what_they_are_one_by_one(exported: Callable[[zoo.Case], Path]) -> None:
    dense = look(exported(VIT))
    assert blocks_at_once(dense) > 1
    ratios = parse_ratios({"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc2": 0.5}, "align": 1})
    told: list[str] = []
    one, several = (
        prune(dense, ratios, SyntheticStatistics(dense), threads=threads, progress=told.append) for threads in (1, 2)
    )
    assert told[: len(told) // 2] == told[len(told) // 2 :]
    assert one.errors == several.errors
    assert one.model.proto.SerializeToString() == several.model.proto.SerializeToString()
    assert one.model.arrays.keys() == several.model.arrays.keys()
    for name, array in one.model.arrays.items():
        np.testing.assert_array_equal(array, several.model.arrays[name])


def test_a_large_block_of_a_small_model_is_solved_alone_and_so_is_all_on_a_gpu(
    exported: Callable[[zoo.Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = look(exported(VIT))
    monkeypatch.setattr("toast_onnx.choosing.at_once._widest", lambda _: 4000)
    assert blocks_at_once(dense) == 1
    monkeypatch.undo()
    device: Any = object.__new__(Graphics)
    monkeypatch.setattr("toast_onnx.choosing.at_once.arithmetic", lambda: device)
    assert blocks_at_once(dense) == 1
