"""Why a fast test may be skipped. Any other reason is a failure: something that the `test` extra should have brought.

A pytest plugin, loaded by conftest.py. Slow tests may be skipped for any reason. Where TOAST_SKIPPED names a file, the
tests that were skipped are listed there, one a line, for a later run that has what they miss.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

#: What a skip's reason says -> what has to be there for the test to run.
ALLOWED: dict[str, str] = {
    r"TOAST_DATA": "real weights and images, which are not shipped",
    r"tensorrt_rtx is not installed": "TensorRT-RTX, which NVIDIA's licence keeps out of the `test` extra",
    r"(trtexec|tensorrt_rtx) is not on this machine": "TensorRT's programs, which no package holds",
    r"an NVIDIA GPU and none is here": "a GPU",
    r"a GPU is here|and one is here": "a machine without a GPU",
    r"needs root|root may write anywhere": "the other kind of user",
    r"on Windows|Windows ends|pipes end": "another system",
}


def is_allowed(reason: str) -> bool:
    """Whether a fast test may be skipped for this reason."""
    return any(re.search(pattern, reason) for pattern in ALLOWED)


def _refused(report: pytest.TestReport | pytest.CollectReport) -> bool:
    """Turns a report of a skip that is not allowed into that of a failure; returns whether it did."""
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return False
    path, line, reason = report.longrepr
    if is_allowed(reason):
        return False
    report.outcome = "failed"
    report.longrepr = f"{path}:{line}: {reason}\nA fast test may not be skipped for that: tests/skips.py says for what."
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A fast test that is skipped without leave has failed."""
    report = yield
    if item.get_closest_marker("slow") is None:
        _refused(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, pytest.CollectReport]:
    """So has a file that skips itself."""
    report: pytest.CollectReport = yield
    _refused(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, for whom it concerns; called once, however many processes ran the tests."""
    if "TOAST_SKIPPED" in os.environ:
        skipped = dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("skipped", []))
        Path(os.environ["TOAST_SKIPPED"]).write_text("".join(f"{name}\n" for name in skipped), encoding="utf-8")
