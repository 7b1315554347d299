"""Reads and writes YAML without its surprises.

Plain YAML 1.1 turns `no` into false, `1:30` into 90, `0.35` into a binary fraction, and keeps only the last of two
equal keys. A settings file wants none of that: scalars follow the YAML 1.2 core schema (section 10.3.2 of its
specification), numbers with a fraction become exact decimals, and a repeated key is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from itertools import count
from pathlib import Path

import yaml

from toast_onnx.errors import ConfigError
from toast_onnx.files import read_limited, write_bytes

MAX_BYTES = 1 << 18
_MAX_VALUES = 20_000  # aliases can repeat a value without writing it, so the file's size does not bound this
_MAX_DEPTH = 16
_MAX_NUMBER = 40  # characters

_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


def _tag(kind: str) -> str:
    return f"tag:yaml.org,2002:{kind}"


class _CoreLoader(yaml.SafeLoader):
    """A safe loader that resolves plain scalars by the YAML 1.2 core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute, emptied of the YAML 1.1 rules


class _CoreDumper(yaml.SafeDumper):
    """A safe dumper that quotes exactly what `_CoreLoader` would misread, and writes decimals as they are."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as above

    def ignore_aliases(self, data: object) -> bool:
        return True


for _kind, (_pattern, _first) in _CORE_SCHEMA.items():
    for _side in (_CoreLoader, _CoreDumper):
        _side.add_implicit_resolver(_tag(_kind), re.compile(rf"(?:{_pattern})\Z"), _first)


def _represent_decimal(dumper: yaml.SafeDumper, value: Decimal) -> yaml.ScalarNode:
    text = format(value, "f")
    return dumper.represent_scalar(_tag("float" if "." in text else "int"), text)


_CoreDumper.add_representer(Decimal, _represent_decimal)


def read_document(path: str | os.PathLike[str]) -> object:
    """Reads one YAML document into dicts, lists, strings, booleans, None, `int` and exact `Decimal`.

    Args:
        path: The file, UTF-8, at most 256 KiB.

    Returns:
        The document's value. A `Decimal` holds exactly the digits that were written.

    Raises:
        ConfigError: The file cannot be read, is not YAML, repeats a key, nests deeper than 16 levels, or uses tags.
    """
    source = Path(path)
    return parse_document(read_limited(source, MAX_BYTES, ConfigError, "give the YAML file"), source)


def parse_document(data: bytes, source: Path) -> object:
    """As `read_document`, of bytes that are at hand; `source` stands for them in messages."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{source} is not a text file in UTF-8; give the YAML file") from e
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.YAMLError as e:
        raise ConfigError(f"{source}{_describe(e, text)}") from e
    except RecursionError as e:
        raise ConfigError(f"{source}: nested too deeply to be a settings file; flatten it") from e
    if node is None:
        return None
    return _Reader(source).value(node, depth=0)


def format_document(document: Mapping[str, object], header_comment: str = "") -> str:
    """Returns YAML text that `read_document` reads back equal; `header_comment` goes on top, a `#` before each line."""
    header = "".join(f"# {line}".rstrip() + "\n" for line in header_comment.splitlines())
    body: str = yaml.dump(
        document, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )
    return header + body


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text so that the file appears whole or not at all.

    Raises:
        ConfigError: The destination cannot be written.
    """
    write_bytes(Path(path), text.encode(), ConfigError)


def _describe(error: yaml.YAMLError, text: str) -> str:
    """Returns `:LINE: what is wrong`, one line, from an error of PyYAML's."""
    if isinstance(error, yaml.reader.ReaderError):
        return ": not a text file (it holds control characters); give the YAML file"
    mark = getattr(error, "problem_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if mark is None:
        return f": not valid YAML: {problem}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return f":{mark.line + 1}: indented with a tab; YAML takes spaces only"
    if "but found another document" in problem:
        return f":{mark.line + 1}: a second document starts here; keep one per file"
    return f":{mark.line + 1}: not valid YAML: {problem}"


class _Reader:
    """Turns the node tree of one file into plain values."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._values: Iterator[int] = count(1)

    def value(self, node: yaml.Node, depth: int) -> object:
        if depth > _MAX_DEPTH or next(self._values) > _MAX_VALUES:
            raise self._error(node, "nested too deeply or repeated too often for a settings file; write it plainly")
        if isinstance(node, yaml.MappingNode) and node.tag == _tag("map"):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == _tag("seq"):
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise self._error(node, f"the tag {node.tag!r} is not allowed; write the plain value")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[object, object]:
        result: dict[object, object] = {}
        lines: dict[object, int] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise self._error(key_node, "a key must be a name or a whole number; quote it if it is a name")
            if key in result:
                raise self._error(key_node, f"the key {key!r} stands here again (first on line {lines[key]}); keep one")
            lines[key] = key_node.start_mark.line + 1
            result[key] = self.value(value_node, depth + 1)
        return result

    def _scalar(self, node: yaml.ScalarNode) -> object:
        parse = _SCALARS.get(node.tag)
        if parse is None:
            raise self._error(node, f"the tag {node.tag!r} is not allowed; write the plain value")
        if node.tag in (_tag("int"), _tag("float")) and len(node.value) > _MAX_NUMBER:
            raise self._error(node, f"the number {node.value[:12]}... has over {_MAX_NUMBER} characters; shorten it")
        try:
            return parse(node.value)
        except (ValueError, ArithmeticError) as e:
            raise self._error(node, f"{node.value[:_MAX_NUMBER]!r} cannot be read as a number; write it out") from e

    def _error(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self._source}:{node.start_mark.line + 1}: {message}")


def _parse_float(text: str) -> Decimal:
    return Decimal(re.sub(r"^([-+]?)\.(?=[a-zA-Z])", r"\1", text))  # .inf and .nan are YAML's spelling


_SCALARS: dict[str, Callable[[str], object]] = {
    _tag("str"): str,
    _tag("null"): lambda text: None,
    _tag("bool"): lambda text: text.lower() == "true",
    _tag("int"): int,
    _tag("float"): _parse_float,
}
