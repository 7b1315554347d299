"""The record of a deployment: what every step was asked, read, wrote and found, and whether it has to run again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from toast_onnx import __version__
from toast_onnx.deploy.code import code_files
from toast_onnx.deploy.steps import Step
from toast_onnx.errors import ConfigError, ModelError
from toast_onnx.files import write_bytes
from toast_onnx.model import model_files
from toast_onnx.planning.settings import first_problem
from toast_onnx.planning.strict_json import read_json

FORMAT = "toast-onnx/deploy/1"
RECORD = "deploy.json"


class _Entry(BaseModel):
    """A step on record, as far as it is read again."""

    model_config = ConfigDict(strict=True, extra="ignore")

    status: Literal["done", "waiting", "failed"]
    command: list[str]
    inputs: dict[str, str | None]
    versions: dict[str, str]
    outputs: dict[str, str | None] = {}
    reason: str = ""


_STEPS = TypeAdapter(dict[str, _Entry])


class Digests:
    """SHA-256 of files and folders below one folder, and of Python code; a file is read once until it changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, int, int], str] = {}

    def of(self, name: str) -> str | None:
        """Digest of a file (an ONNX file with its external data), a folder's files or a `module:function`'s code.

        None for what is none of these. It does not depend on where the folder is.
        """
        path = self._folder / name
        if os.path.isdir(path):
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            return _of_pairs((str(p.relative_to(path)), self._file(p)) for p in inside)
        if not os.path.isfile(path):
            code = code_files(name, self._folder)
            return _of_pairs((p.name, self._file(p)) for p in code) if code else None
        return _of_pairs((p.name, self._file(p)) for p in _parts(path)) if path.suffix == ".onnx" else self._file(path)

    def of_all(self, names: Iterable[str]) -> dict[str, str | None]:
        """Digest by name."""
        return {name: self.of(name) for name in names}

    def _file(self, path: Path) -> str:
        if not path.is_file():
            return "missing"
        about = path.stat()
        key = (str(path), about.st_size, about.st_mtime_ns)
        if key not in self._known:
            with path.open("rb") as stream:
                self._known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._known[key]


def _parts(path: Path) -> list[Path]:
    """The files of an ONNX model; the file alone where it is none, which the command that reads it will say."""
    try:
        return model_files(path)
    except ModelError:
        return [path]


def _of_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, value in pairs:
        digest.update(f"{name}\0{value}\n".encode())
    return digest.hexdigest()


def request_of(step: Step, digests: Digests) -> dict[str, Any]:
    """What decides a step's result: its command, the digests of its inputs, and versions."""
    versions = {"toast-onnx": __version__}
    for name in step.packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"command": ["toast-onnx", *step.arguments], "inputs": digests.of_all(step.inputs), "versions": versions}


def is_done(entry: dict[str, Any] | None, request: dict[str, Any], digests: Digests) -> bool:
    """Whether a step finished on this very request and its outputs are still as it left them."""
    if entry is None or entry.get("status") != "done":
        return False
    if {key: entry.get(key) for key in request} != request:
        return False
    outputs: dict[str, str | None] = entry.get("outputs", {})
    return all(value is not None and digests.of(name) == value for name, value in outputs.items())


def read_record(path: Path) -> dict[str, Any]:
    """Steps by name of an earlier run; empty where there was none.

    Raises:
        ConfigError: the file is something else.
    """
    if not path.exists():
        return {}
    document = read_json(path, hint="it is no record of a deployment; remove it to start over")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"{path} is no record of a deployment; choose another output folder")
    steps = document.get("steps")
    try:
        _STEPS.validate_python(steps)
    except ValidationError as e:
        where, what = first_problem(e)
        raise ConfigError(f"{path}: {'.'.join(filter(None, ('steps', where)))}: {what}; remove it to start over") from e
    assert isinstance(steps, dict)
    return steps


def write_record(path: Path, document: dict[str, Any]) -> None:
    """Write the record whole or not at all.

    Raises:
        ModelError: it cannot be written.
    """
    write_bytes(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
