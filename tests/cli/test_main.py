"""The command group: lazy loading, exit statuses, one-line errors."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from toast_onnx import __version__
from toast_onnx.errors import ConfigError
from toast_onnx_cli.console import progress, say_note
from toast_onnx_cli.main import SUBCOMMANDS, main

HEAVY = ("onnxruntime", "onnx", "numpy", "rich", "torch")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Adds a subcommand `trial` that runs the given function."""

    def add(body: Callable[[], None]) -> None:
        module = types.ModuleType("toast_onnx_cli.trial")
        module.command = click.command("trial")(body)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(SUBCOMMANDS, "trial", "A command for the tests.")

    return add


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_help_imports_no_heavy_library() -> None:
    code = f"""
import sys
from toast_onnx_cli.main import main
main(["--help"], standalone_mode=False)
print("heavy:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
    for name in SUBCOMMANDS:
        assert name in done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such option")
def test_memory_of_freed_arrays_is_not_fetched_from_the_system_again() -> None:
    """32 MB ten times: 8192 pages of 4 KiB each, where nothing is kept and pages are small."""
    code = """
import resource
from toast_onnx_cli.main import keep_freed_memory
keep_freed_memory()
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(32_000_000)
    block[::4096] = bytes(len(block[::4096])).replace(b"\\0", b"x")
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print("again:", sum(faults[1:]) < 2000)
"""
    done = run_python(code)
    assert done.stdout == "again: True\n", done.stderr


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_registered_command_exists_and_has_help(name: str) -> None:
    assert importlib.util.find_spec(f"toast_onnx_cli.{name.replace('-', '_')}") is not None
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"Usage: main {name}" in result.output


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == f"toast-onnx, version {__version__}\n"


def test_toast_error_is_one_line_and_status_1(register: Callable[[Callable[[], None]], None]) -> None:
    def body() -> None:
        raise ConfigError("ratio 1.5 is outside [0, 1):\n   give the fraction to remove")

    register(body)
    result = CliRunner().invoke(main, ["trial"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "Error: ratio 1.5 is outside [0, 1): give the fraction to remove\n"


def test_other_errors_keep_their_traceback(register: Callable[[Callable[[], None]], None]) -> None:
    def body() -> None:
        raise ZeroDivisionError

    register(body)
    assert isinstance(CliRunner().invoke(main, ["trial"]).exception, ZeroDivisionError)


def test_interrupt_is_one_line_and_status_130(register: Callable[[Callable[[], None]], None]) -> None:
    def body() -> None:
        raise KeyboardInterrupt

    register(body)
    result = CliRunner().invoke(main, ["trial"])
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"


@pytest.mark.parametrize("arguments", [["nosuchcommand"], ["--nosuchoption"], ["trial", "surplus"]])
def test_wrong_usage_is_status_2(arguments: list[str], register: Callable[[Callable[[], None]], None]) -> None:
    register(lambda: None)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end differently on Windows")
@pytest.mark.parametrize("show", ["click.echo", "print"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_reader_that_leaves_early_is_quiet(lines: int, show: str) -> None:
    code = f"""
import sys, types, click
from toast_onnx_cli import main as room
module = sys.modules["toast_onnx_cli.trial"] = types.ModuleType("trial")
def body():
    sys.stdin.read()  # until the other end of stdout is closed
    for _ in range({lines}):
        {show}("a line")
module.command = click.command("trial")(body)
room.SUBCOMMANDS["trial"] = "A command for the tests."
room.main(["trial"])
"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=buffered,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate("", timeout=60)
    assert stderr == ""
    assert process.returncode == 141


@pytest.mark.parametrize(("flags", "shown"), [([], "w"), (["-v"], "iw"), (["-vv"], "diw")])
def test_verbose_shows_more_of_our_log_and_none_of_others(flags: list[str], shown: str) -> None:
    code = f"""
import logging, sys, types, click
from toast_onnx_cli import main as room
module = sys.modules["toast_onnx_cli.trial"] = types.ModuleType("trial")
def body():
    for name in ("toast_onnx.rewriting", "somebody.else"):
        log = logging.getLogger(name)
        log.debug("d"), log.info("i")
    logging.getLogger("toast_onnx").warning("w")
module.command = click.command("trial")(body)
room.SUBCOMMANDS["trial"] = "A command for the tests."
room.main([*{flags!r}, "trial"])
"""
    done = run_python(code)
    assert done.stdout == ""
    assert "".join(line[-1] for line in done.stderr.splitlines()) == shown


def test_quiet_leaves_progress_and_notes_out(register: Callable[[Callable[[], None]], None]) -> None:
    def body() -> None:
        with progress("working", 2) as advance:
            advance()
            say_note("something to know")
        click.echo("the result")

    register(body)
    loud, quiet = (CliRunner().invoke(main, [*flags, "trial"]) for flags in ([], ["--quiet"]))
    assert "working" in loud.stderr
    assert "Note: something to know" in loud.stderr
    assert (quiet.stdout, quiet.stderr) == ("the result\n", "")


def test_defaults_come_from_the_environment(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["prune", "m.onnx"], env={"TOAST_PRUNE_RATIOS": str(tmp_path / "mine.yaml")})
    assert "mine.yaml" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_completion(shell: str) -> None:
    code = "import sys; sys.argv = ['toast-onnx']; from toast_onnx_cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"_TOAST_ONNX_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # click asks bash for its version where there is one; the script itself is what counts
    assert "toast-onnx" in done.stdout
    assert "COMPLETE" in done.stdout
