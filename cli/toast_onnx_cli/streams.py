"""`-` on the command line: a ratios file from standard input, a document to standard output."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from toast_onnx.errors import ConfigError
from toast_onnx.planning.presets import read_ratios
from toast_onnx.planning.ratios import Ratios, parse_ratios
from toast_onnx.planning.strict_yaml import MAX_BYTES, parse_document

STREAM = "-"


def ratios_given(argument: str) -> Ratios:
    """What `--ratios` or `--settings` asks for: a preset, a file, or the text on standard input for `-`.

    Raises:
        ConfigError: it is at fault; says where.
    """
    if argument != STREAM:
        return read_ratios(argument)
    where = Path("standard input")
    data = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{where} is longer than {MAX_BYTES >> 10} KiB, no ratios file; pipe one in for --ratios -")
    if not data.strip():
        raise ConfigError(f"{where} is empty; pipe a ratios file in for --ratios -")
    return parse_ratios(parse_document(data, where), str(where))


def is_stream(path: str | os.PathLike[str] | None) -> bool:
    """Whether a file that was named is standard input or output."""
    return path is not None and os.fspath(path) == STREAM


def as_file(path: Path | None) -> Path | None:
    """The file to check and to write; None for standard output."""
    return None if is_stream(path) else path
