"""Which of many alike cases every run goes through, and which wait for the slow tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet

T = TypeVar("T")


def mostly_slow(
    values: Iterable[T], fast: Callable[[T], bool], name: Callable[[T], str] | None = None
) -> list[ParameterSet]:
    """Parameters of a test, one after another; those that are not `fast` are marked slow.

    Args:
        values: what the test is run on; a tuple is several arguments.
        fast: picks the representatives, one of each kind, that every run goes through.
        name: the id of a value; pytest's own by default.
    """
    return [
        pytest.param(
            *(v if isinstance(v, tuple) else (v,)),
            id=None if name is None else name(v),
            marks=() if fast(v) else pytest.mark.slow,
        )
        for v in values
    ]
