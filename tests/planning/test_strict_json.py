"""The reader of JSON: what it takes, and that everything else is one short line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toast_onnx.errors import ConfigError, DataError
from toast_onnx.planning.strict_json import parse_json, read_json

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(PLAIN)
def test_what_is_written_is_read_back(document: object) -> None:
    assert parse_json(json.dumps(document), "f") == document


@settings(max_examples=200)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_document_or_one_line(data: bytes) -> None:
    refusal = ""
    try:
        parse_json(data, "f.json")
    except ConfigError as e:
        refusal = str(e)
    assert not refusal or refusal.startswith("f.json ")
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nests deeper than 64"),
        ("[" * 70 + "]" * 70, "nests deeper than 64"),
        ('{"a":' * 70 + "1" + "}" * 70, "nests deeper than 64"),
        ("1" * 5000, "of 5000 characters"),
        ("-0." + "1" * 5000, "characters"),
        ("1e999", "too large"),
        ("[NaN]", "holds NaN"),
        ("[-Infinity]", "holds -Infinity"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        ("", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("'a'", "not valid JSON"),
        (b"\xff\xfe", "not text in UTF-8"),
    ],
)
def test_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        parse_json(text, "f.json", DataError, "write it again")
    assert str(caught.value).endswith("; write it again")
    assert len(str(caught.value)) < 200


def test_a_program_may_write_what_is_no_number() -> None:
    (found,) = parse_json("[NaN]", "f", lenient=True)  # type: ignore[misc]
    assert math.isnan(found)


def test_files_have_a_size(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('"' + "a" * 3000 + '"')
    with pytest.raises(ConfigError, match="larger than 2 KiB"):
        read_json(tmp_path / "f.json", limit=2048)
    with pytest.raises(ConfigError, match="does not exist"):
        read_json(tmp_path / "other.json")
