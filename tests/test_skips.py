"""A fast test that is skipped for another reason than those that are listed makes the run fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import ALLOWED

ROOT = Path(__file__).resolve().parent.parent
SKIPS = """
import pytest

def test_with_leave():
    pytest.importorskip("no_such_module", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")

@pytest.mark.slow
def test_slow():
    pytest.skip("Olive is not installed")

@pytest.mark.xfail(reason="known")
def test_known():
    assert False
"""
MISSING = """
import pytest

def test_missing_package():
    pytest.importorskip("no_such_module")

@pytest.mark.skipif(True, reason="this is not the day")
def test_mark():
    pass

def test_passes():
    pass
"""
WHOLE_FILE = """
import pytest

pytest.importorskip("no_such_module", reason="a plotting library is not installed")

def test_never():
    pass
"""


def run_pytest(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "no:cacheprovider", "-q", *options]
    environment = (
        os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""} | variables
    )
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_skips_with_leave_pass(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SKIPS)
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "2 skipped, 1 xfailed" in done.stdout


@pytest.mark.parametrize("options", [(), ("-p", "xdist", "-n", "2")], ids=["alone", "in two processes"])
def test_other_skips_fail_the_run(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SKIPS)
    (tmp_path / "test_missing.py").write_text(MISSING)
    done = run_pytest(tmp_path, *options)
    assert done.returncode == 1, done.stdout
    assert "1 failed, 1 passed, 2 skipped, 1 xfailed, 1 error" in done.stdout
    assert "could not import 'no_such_module'" in done.stdout
    assert "this is not the day" in done.stdout


@pytest.mark.parametrize("options", [(), ("-p", "xdist", "-n", "2")], ids=["alone", "in two processes"])
def test_a_file_that_skips_itself_fails_the_run(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "test_whole.py").write_text(WHOLE_FILE)
    done = run_pytest(tmp_path, *options)
    assert done.returncode in (1, 2), done.stdout
    assert "a plotting library is not installed" in done.stdout


@pytest.mark.parametrize("options", [(), ("-p", "xdist", "-n", "2")], ids=["alone", "in two processes"])
def test_what_was_skipped_can_be_run_later(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SKIPS)
    done = run_pytest(tmp_path, *options, TOAST_SKIPPED=str(tmp_path / "skipped"))
    assert done.returncode == 0, done.stdout
    names = (tmp_path / "skipped").read_text().splitlines()
    assert sorted(names) == ["test_some.py::test_slow", "test_some.py::test_with_leave"]
    again = run_pytest(tmp_path, *names)
    assert "2 skipped" in again.stdout


def test_this_run_is_watched(request: pytest.FixtureRequest) -> None:
    assert request.config.pluginmanager.has_plugin("tests.skips")


def test_every_reason_that_is_allowed_is_given_by_a_test() -> None:
    files = [p for p in (ROOT / "tests").rglob("*.py") if p.name not in ("skips.py", "test_skips.py")]
    lines = [line for p in files for line in p.read_text(encoding="utf-8").splitlines()]
    said = "\n".join(lines).replace("{trtexec.PROGRAMS[request.param]}", "trtexec")
    assert [pattern for pattern in ALLOWED if re.search(pattern, said) is None] == []
