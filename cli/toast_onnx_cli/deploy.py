"""`toast-onnx deploy`: from a dense model to a checked engine, as one file says."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.errors import BackendError
from toast_onnx.external import links_followed
from toast_onnx_cli.commands import json_option, toast_command
from toast_onnx_cli.console import print_json, print_table
from toast_onnx_cli.links import links_option
from toast_onnx_cli.models import FILE

if TYPE_CHECKING:
    from toast_onnx.deploy.run import Finished


@toast_command("deploy", "deploy deploy.yaml --dry-run", "deploy deploy.yaml")
@click.argument("config", type=FILE)
@click.option("--redo", multiple=True, metavar="STEP", help="Run this step even where it is done; may be repeated.")
@click.option("--partial", is_flag=True, help="Status 0 even where steps wait for a machine that can run them.")
@click.option("--allow-code", is_flag=True, help="Run Python code that CONFIG names as module:function.")
@links_option
@click.option("--dry-run", is_flag=True, help="Print the steps' commands and stop.")
@json_option
def command(config: Path, redo: tuple[str, ...], partial: bool, allow_code: bool, dry_run: bool, as_json: bool) -> None:
    """Prune, convert, build, measure and check in one go, as CONFIG, a YAML file, says.

    A run that was stopped goes on where it was: steps whose command, inputs and versions are the same and whose outputs
    are untouched are not run again. Steps that need a GPU wait where there is none and the others go on; their commands
    go to elsewhere.sh in the output folder, and the exit status is 1 unless --partial is given.
    """
    import shlex

    from toast_onnx.deploy.config import load_deployment
    from toast_onnx.deploy.run import deploy
    from toast_onnx.deploy.steps import plan_steps

    settings = load_deployment(config, allow_code=allow_code)
    if dry_run:
        for step in plan_steps(settings, config):
            click.echo(shlex.join(["toast-onnx", *step.arguments]))
        return
    record = deploy(settings, config, run_command, redo=redo, listener=_say)
    if as_json:
        print_json(record)
    else:
        print_table(["step", "", "seconds", "result"], _rows(record["steps"]), align=["left", "left", "right", "left"])
    _end(record["steps"], partial)


def run_command(arguments: Sequence[str], folder: Path) -> Finished:
    """Run `toast-onnx` in a process of its own: its memory is given back, and a crash is one failed step.

    What it writes to stderr passes through; its last `Error:` line is kept.
    """
    from toast_onnx.deploy.run import Finished

    words = [sys.executable, "-m", "toast_onnx_cli.main", *arguments, *([] if links_followed() else ["--no-links"])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    error = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stdout:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert process.stderr is not None
        with process:
            for line in process.stderr:
                click.echo(line, nl=False, err=True)
                if line.startswith("Error: "):
                    error = line.removeprefix("Error: ").strip()
        stdout.seek(0)
        return Finished(process.returncode, stdout.read(), error)


def _say(name: str, event: str, text: str) -> None:
    line = {
        "done before": f"== {name}: done before, not run again",
        "runs": f"== {name}: {text}",
        "waits": f"== {name} waits: {text}",
    }.get(event)
    if line is not None:
        click.echo(line, err=True)


def _end(steps: dict[str, Any], partial: bool) -> None:
    """The exit status: a failed step is an error, a waiting one too unless `partial`."""
    for name, entry in steps.items():
        if entry["status"] == "failed":
            raise BackendError(f"{name}: {entry['reason']}. What was done before it is kept; run again to go on")
    waiting = [name for name, entry in steps.items() if entry["status"] == "waiting"]
    if waiting and not partial:
        raise BackendError(
            f"{', '.join(waiting)} could not run here: run elsewhere.sh in the output folder, or this command again, "
            "on a machine that can; --partial accepts what is there"
        )


def _rows(steps: dict[str, Any]) -> list[list[str]]:
    from toast_onnx.report.deployment import headline

    return [
        [name, entry["status"], f"{entry['seconds']:.1f}" if "seconds" in entry else "", headline(name, entry)]
        for name, entry in steps.items()
    ]
