"""Strict settings: unknown keys are errors that name the nearest known one, and every complaint is one plain line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError


def invalid(problem: str, suffix: str = "") -> PydanticCustomError:
    """Returns the error to raise from a validator.

    Args:
        problem: What is wrong and what is allowed, continuing a sentence that starts with the key.
        suffix: What to add to the key, such as the index of a list's entry.
    """
    return PydanticCustomError("setting", "{problem}", {"problem": problem, "suffix": suffix})


_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def names_code(text: str) -> bool:
    """Returns whether text has the form `module:function`, which the command line takes for Python code to run."""
    return _CODE.fullmatch(text) is not None


def exact_decimal(value: object) -> Decimal:
    """Returns a number as an exact decimal; a float stands for the shortest decimal that prints it.

    Raises:
        PydanticCustomError: The value is no number (a boolean is none).
    """
    if isinstance(value, Decimal):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    if isinstance(value, float):
        return Decimal(repr(float(value)))  # numpy's floats are floats too, but print differently
    hint = " without quotes or %, such as 0.5" if isinstance(value, str) else ""
    raise invalid(f"is {shown(value)}; expected a number{hint}")


class Section(BaseModel):
    """A mapping with a fixed set of keys: immutable, types not coerced, no key beyond the known ones."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    hidden_keys: ClassVar[tuple[str, ...]] = ()
    """Fields that are filled in from elsewhere and are no keys of the file."""

    @classmethod
    def key_names(cls) -> list[str]:
        """Returns the keys a file may use."""
        return [name for name in cls.model_fields if name not in cls.hidden_keys]

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise invalid(f"is {shown(data)}; it takes the keys {', '.join(cls.key_names())}")
        for key, value in data.items():
            if key not in cls.model_fields:
                hint = cls._nearest(str(key))
                raise invalid(f"has the unknown key {key!r}{hint or '.'} Known keys: {', '.join(cls.key_names())}")
            if value is None:
                raise invalid("is empty; give a value or remove the key", suffix=f".{key}")
        return data

    @classmethod
    def _nearest(cls, key: str) -> str:
        """Returns a hint: the key of a section below that goes by this very name, or the most similar key here."""
        for name, field in cls.model_fields.items():
            section = field.annotation
            if isinstance(section, type) and issubclass(section, Section) and key in section.key_names():
                return f", did you mean {name}.{key}?"
        return _did_you_mean(key, cls.key_names())


def explain(error: ValidationError, document: Mapping[Any, Any]) -> str:
    """Returns the first problem of a validation as one line: the key, its value, what is allowed.

    Args:
        error: What pydantic raised.
        document: What was validated; names the entries that pydantic counts.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    key = _key(first, document)
    more = len(problems) - 1
    rest = f" ({more} more problem{'s' if more > 1 else ''} after this)" if more else ""
    return f"{key or 'the file'} {_problem(first)}{rest}"


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Where a document that a program wrote is wrong first, empty for the whole of it, and what pydantic says."""
    first = error.errors(include_url=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"]


def _problem(problem: ErrorDetails) -> str:
    kind, value, context = problem["type"], problem.get("input"), problem.get("ctx", {})
    if kind == "setting":
        return str(context["problem"])
    if kind == "missing":
        return f"has no {problem['loc'][-1]}; add the key"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        hint = _did_you_mean(value, allowed) if isinstance(value, str) else ""
        return f"is {shown(value)}{hint or '.'} Allowed: {', '.join(allowed)}"
    expected = {
        "int_type": "expected a whole number",
        "string_type": "expected text",
        "string_too_short": "expected text",
        "greater_than_equal": f"it must be at least {context.get('ge')}",
        "less_than": f"it must be below {context.get('lt')}",
    }.get(kind, problem["msg"])
    return f"is {shown(value)}; {expected}"


def _key(problem: ErrorDetails, document: Mapping[Any, Any]) -> str:
    """Returns the key's path, such as `ffn.fc2[3]` or `blocks[0].attention.qk`."""
    path = ""
    level: Any = document
    for part in problem["loc"][: -1 if problem["type"] == "missing" else None]:
        if isinstance(part, int) and isinstance(level, Mapping):  # validated as the sequence of its items
            name = list(level)[part]
            path += f"[{name!r}]"
            level = level[name]
            continue
        path += f".{part}" if path else str(part)
        level = level.get(part) if isinstance(level, Mapping) else None
    suffix = str(problem.get("ctx", {}).get("suffix", ""))
    return (path + suffix).removeprefix(".")


def _did_you_mean(word: str, known: list[str]) -> str:
    nearest = get_close_matches(word, known, n=1, cutoff=0.4)
    return f", did you mean {nearest[0]}?" if nearest else ""


def shown(value: object) -> str:
    """Returns a value as a message quotes it, short and on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        return str(value)
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 40 else f"the text {value[:37]!r}..."
    if value is None:
        return "empty"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a mapping" if isinstance(value, Mapping) else repr(value)[:40]
