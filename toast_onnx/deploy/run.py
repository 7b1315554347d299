"""Runs the steps of a deployment, skips those that are done, and leaves those that need another machine."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toast_onnx.deploy.config import Deployment
from toast_onnx.deploy.state import FORMAT, RECORD, Digests, is_done, read_record, request_of, write_record
from toast_onnx.deploy.steps import Step, output_folder, plan_steps
from toast_onnx.errors import BackendError, ConfigError, ModelError
from toast_onnx.files import write_bytes
from toast_onnx.planning.strict_json import parse_json

#: Commands of the steps that wait, as a shell script in the output folder.
SCRIPT = "elsewhere.sh"


@dataclass(frozen=True)
class Finished:
    """How a command ended.

    Attributes:
        status: its exit status.
        stdout: what it printed.
        error: its `Error:` line without that word; empty where there was none.
    """

    status: int
    stdout: str
    error: str = ""


#: Runs `toast-onnx` with arguments in a folder.
Runner = Callable[[Sequence[str], Path], Finished]
#: Told about a step: its name, what happens to it (`done before`, `runs`, `done`, `waits`, `failed`) and a remark.
Listener = Callable[[str, str, str], object]


def deploy(
    config: Deployment,
    source: Path,
    run: Runner,
    *,
    redo: Collection[str] = (),
    listener: Listener = lambda name, event, text: None,
) -> dict[str, Any]:
    """Run every step that is not done yet; the record is written after each of them.

    A step that cannot run on this machine waits and the others go on; a step that fails ends the run, and is tried
    again by the next one.

    Args:
        config: the settings.
        source: the deployment file; everything is relative to its folder.
        run: runs one command.
        redo: names of steps to run even where they are done.
        listener: told what happens.

    Returns:
        The record, as written to `deploy.json` in the output folder: `steps` by name, each with `status` (`done`,
        `waiting`, `failed`), `command`, digests of `inputs` and `outputs`, `versions`, `seconds`, `result` or `reason`.

    Raises:
        ConfigError: an unknown step in `redo`, a missing input, or a record that is none.
        ModelError: the output folder or the record cannot be written.
    """
    folder, steps = source.parent, plan_steps(config, source)
    unknown = set(redo) - {step.name for step in steps}
    if unknown:
        raise ConfigError(f"there is no step {sorted(unknown)[0]!r} here; steps: {', '.join(s.name for s in steps)}")
    _check_inputs(config, folder)
    out = folder / output_folder(config, source)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ModelError(f"{out} cannot be made: {e.strerror or e}; choose another output") from e
    earlier, digests = read_record(out / RECORD), Digests(folder)
    # Steps of an earlier run stay on record until they run again: a kill in between loses nothing.
    entries = {step.name: earlier[step.name] for step in steps if step.name in earlier}
    waiting: set[str] = set()  # outputs that are not there yet
    document = {"format": FORMAT, "config": source.name, "settings": config.model_dump(mode="json"), "steps": entries}
    for step in steps:
        entry = entries.get(step.name)
        request = request_of(step, digests)
        if step.name not in redo and is_done(entry, request, digests):
            listener(step.name, "done before", "")
            continue
        reason = _what_is_missing(step, config, folder, waiting)
        if reason is not None:
            waiting.update(step.outputs)
            entries[step.name] = {"status": "waiting", "reason": reason, **request}
            listener(step.name, "waits", f"{reason}; elsewhere: {shlex.join(request['command'])}")
        else:
            listener(step.name, "runs", shlex.join(request["command"]))
            entries[step.name] = _run(step, request, run, folder, digests)
            listener(step.name, entries[step.name]["status"], entries[step.name].get("reason", ""))
        if entries[step.name]["status"] == "failed":
            _forget_after(step, steps, entries, digests)
            write_record(out / RECORD, document)
            break
        write_record(out / RECORD, document)
    write_record(out / RECORD, document)
    _leave_script(out / SCRIPT, entries, out, folder)
    return document


def _forget_after(failed: Step, steps: Sequence[Step], entries: dict[str, Any], digests: Digests) -> None:
    """Drop what was found on older inputs or settings: nobody should take it for the result of the new ones."""
    changing = set(failed.outputs)
    for step in steps[steps.index(failed) + 1 :]:
        current = is_done(entries.get(step.name), request_of(step, digests), digests)
        if not current or changing.intersection(step.inputs):
            changing.update(step.outputs)
            entries.pop(step.name, None)


def _check_inputs(config: Deployment, folder: Path) -> None:
    """The files that are certainly files have to be there before hours are spent.

    Raises:
        ConfigError: one is missing.
    """
    wanted = [config.model, config.prune.statistics if config.prune is not None else None]
    for name in wanted:
        if name is not None and not os.path.isfile(folder / name):
            raise ConfigError(f"{folder / name} does not exist; paths are relative to the deployment file's folder")


def _what_is_missing(step: Step, config: Deployment, folder: Path, waiting: Collection[str]) -> str | None:
    """Why a step cannot run here, one line; None where it can."""
    from toast_onnx.engines import cuda
    from toast_onnx.engines.backends import choose
    from toast_onnx.engines.trtexec import PROGRAMS, find_trtexec

    late = [name for name in step.inputs if name in waiting]
    if late:
        return f"{late[0]} has to be made first"
    backend = config.build.backend if config.build is not None else "auto"
    try:
        if step.needs == "builder":
            alone = choose(backend).name == "tensorrt" and cuda.gpu_name() is None
            return "tensorrt builds on a machine with a GPU only (tensorrt-rtx does without)" if alone else None
        if step.needs is not None and cuda.gpu_name() is None:
            return "it needs an NVIDIA GPU and none is here"
        if step.needs == "trtexec":
            name = _backend_of(folder / step.inputs[-1])
            if find_trtexec(name) is None:
                return f"{PROGRAMS[name]} was not found on PATH; set TRTEXEC to its path"
    except BackendError as e:
        return str(e)
    return None


def _backend_of(engine: Path) -> str:
    """The backend that built an engine, as the JSON beside it says."""
    from toast_onnx.engines.backends import BACKENDS
    from toast_onnx.engines.record import read_record

    record = read_record(engine)
    return record.backend if record is not None and record.backend in BACKENDS else "tensorrt"


def _run(step: Step, request: dict[str, Any], run: Runner, folder: Path, digests: Digests) -> dict[str, Any]:
    """Run a step; its entry for the record."""
    started = time.perf_counter()
    finished = run(step.arguments, folder)
    entry = {**request, "seconds": round(time.perf_counter() - started, 3)}
    result = _result(finished.stdout, step.keep)
    if result is not None:
        entry["result"] = result
    if finished.status != 0:
        reason = finished.error or f"it ended with status {finished.status}"
        return {"status": "failed", "reason": reason, **entry}
    outputs = digests.of_all(step.outputs)
    absent = [name for name, value in outputs.items() if value is None]
    if absent:
        return {"status": "failed", "reason": f"it wrote no {absent[0]}", **entry}
    return {"status": "done", "outputs": outputs, **entry}


def _result(stdout: str, keep: Sequence[str]) -> Any:
    """The JSON a command printed, None where it is none."""
    try:
        document = parse_json(stdout, "the output")
    except ConfigError:
        return None
    if keep and not isinstance(document, dict):
        return None
    return {key: document[key] for key in keep if key in document} if isinstance(document, dict) and keep else document


def _leave_script(path: Path, entries: dict[str, Any], out: Path, folder: Path) -> None:
    """Write the waiting steps' commands for a machine that can run them; no script where none waits."""
    commands = [entry["command"] for entry in entries.values() if entry["status"] == "waiting"]
    if not commands:
        path.unlink(missing_ok=True)
        return
    up = Path(*[".."] * len(out.relative_to(folder).parts)) if out.is_relative_to(folder) else folder.resolve()
    lines = ["#!/bin/sh", "# What could not run where the rest ran.", "set -e", f'cd "$(dirname "$0")"/{up}']
    write_bytes(path, "\n".join([*lines, *map(shlex.join, commands), ""]).encode())
