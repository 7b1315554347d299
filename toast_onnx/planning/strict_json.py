"""Reads JSON without its surprises, and never more of it than a file of ours or of an exporter can need.

Python's own reader takes NaN, keeps only the last of two equal keys, and runs out of stack on a thousand brackets.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence

from toast_onnx.errors import ConfigError, ToastError
from toast_onnx.files import read_limited

MAX_BYTES = 1 << 26
_MAX_DEPTH = 64
_MAX_NUMBER = 40  # characters


class _Refused(ValueError):
    """What is wrong with a document, continuing a sentence that starts with its name."""


def read_json(
    path: str | os.PathLike[str],
    error: type[ToastError] = ConfigError,
    hint: str = "check the path",
    limit: int = MAX_BYTES,
) -> object:
    """Reads one JSON document of a regular file into dicts, lists, strings, booleans, None and finite numbers.

    Args:
        path: The file, UTF-8.
        error: What to raise.
        hint: What to do next, the end of every message.
        limit: Largest size in bytes.

    Raises:
        ToastError: Of the given kind: the file cannot be read, is not JSON, repeats a key, nests deeper than 64 levels,
            or holds a number that is too long or none.
    """
    return parse_json(read_limited(path, limit, error, hint), str(path), error, hint)


def parse_json(
    data: bytes | str, source: str, error: type[ToastError] = ConfigError, hint: str = "", *, lenient: bool = False
) -> object:
    """As `read_json`, of text that is at hand.

    Args:
        data: The document.
        source: The name that messages start with.
        error: What to raise.
        hint: What to do next, the end of every message.
        lenient: Take NaN, and control characters inside strings, which some programs write.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        document: object = json.loads(
            text,
            strict=not lenient,
            parse_int=_whole,
            parse_float=_float,
            parse_constant=float if lenient else _constant,
            object_pairs_hook=_mapping,
        )
        _check_depth(document)
    except UnicodeDecodeError as e:
        raise _complaint(error, source, "is not text in UTF-8", hint) from e
    except RecursionError as e:
        raise _complaint(error, source, f"nests deeper than {_MAX_DEPTH} levels", hint) from e
    except _Refused as e:
        raise _complaint(error, source, str(e), hint) from e
    except ValueError as e:
        raise _complaint(error, source, f"is not valid JSON ({e})", hint) from e
    return document


def _complaint(error: type[ToastError], source: str, problem: str, hint: str) -> ToastError:
    return error(f"{source} {problem}" + (f"; {hint}" if hint else ""))


def _whole(text: str) -> int:
    return int(_short(text))


def _float(text: str) -> float:
    number = float(_short(text))
    if not math.isfinite(number):
        raise _Refused(f"holds the number {text}, which is too large")
    return number


def _short(text: str) -> str:
    if len(text) > _MAX_NUMBER:
        raise _Refused(f"holds the number {text[:12]}... of {len(text)} characters, more than {_MAX_NUMBER}")
    return text


def _constant(text: str) -> float:
    raise _Refused(f"holds {text}, which is no number")


def _mapping(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"has the key {twice[:40]!r} twice")
    return result


def _check_depth(document: object) -> None:
    level: list[object] = [document]
    for _ in range(_MAX_DEPTH + 1):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise _Refused(f"nests deeper than {_MAX_DEPTH} levels")


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
