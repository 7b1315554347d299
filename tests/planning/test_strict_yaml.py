from __future__ import annotations

import os
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toast_onnx.errors import ConfigError
from toast_onnx.planning.strict_yaml import format_document, read_document, write_text_atomically


def _read(folder: Path, text: str | bytes) -> object:
    path = folder / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_document(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.35", Decimal("0.35")),
        ("5e-1", Decimal("0.5")),
        (".5", Decimal("0.5")),
        ("1.", Decimal(1)),
        ("0.30000000000000000001", Decimal("0.30000000000000000001")),
        ("010", 10),
        ("-3", -3),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("0x10", "0x10"),
        ("true", True),
        ("~", None),
        ("'0.5'", "0.5"),
        (b"\xef\xbb\xbfa: 1\r\n", {"a": 1}),
    ],
)
def test_scalars_follow_the_core_schema(tmp_path: Path, text: str | bytes, expected: object) -> None:
    value = _read(tmp_path, text)
    assert value == expected
    assert type(value) is type(expected)


def test_infinities_and_nan_are_read(tmp_path: Path) -> None:
    values = _read(tmp_path, "[.inf, -.Inf, .NaN]")
    assert [str(value) for value in values] == ["Infinity", "-Infinity", "NaN"]


def test_anchors_are_read_where_they_stay_small(tmp_path: Path) -> None:
    assert _read(tmp_path, "a: &r [0, 0.5]\nb: *r") == {"a": [0, Decimal("0.5")], "b": [0, Decimal("0.5")]}


_LAUGHS = "a0: &a0 [0, 0]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", ":3: the key 'a' stands here again (first on line 1)"),
        ("a: {b: 1, b: 1}", ":1: the key 'b' stands here again"),
        ("a:\n\tb: 1", ":2: indented with a tab"),
        ("a: 1\n---\nb: 1", "keep one per file"),
        ("a: {b: 1", "not valid YAML"),
        ("a: *nowhere", "undefined alias"),
        ("a: !!python/object/apply:os.getcwd []", "the tag"),
        ("a: !secret x", "the tag"),
        ("[1]: 2", "a key must be a name or a whole number"),
        ("0.5: 2", "a key must be a name or a whole number"),
        ("true: 2", "a key must be a name or a whole number"),
        ("a: &a [*a]", "nested too deeply"),
        (_LAUGHS, "repeated too often"),
        ("[" * 1500, "nested too deeply"),
        ("a: " + "9" * 5000, "over 40 characters"),
        ("a: 1e99999999999999999999", "cannot be read as a number"),
        (b"\x08\x03\x12\x07pytorch", "not a text file"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("#" * (1 << 18) + "##", "larger than 256 KiB"),
    ],
)
def test_odd_files_are_refused_in_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "settings.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_paths_are_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "nothing.yaml", r"nothing\.yaml does not exist")):
        with pytest.raises(ConfigError, match=reason):
            read_document(path)


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.decimals(-10, 10, places=6)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)
    | st.sampled_from(["1e5", "0.5", "010", "null", "no", "*", "*/layer.3/*", "- x", "1_000", "~", "", "true"]),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text("abc01", min_size=1), children, max_size=4)
    ),
    max_leaves=12,
)


@given(document=st.dictionaries(st.text("xyz019.*/", min_size=1) | st.integers(0, 99), _PLAIN, min_size=1, max_size=4))
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, document: dict) -> None:
    path = tmp_path_factory.getbasetemp() / "roundtrip.yaml"
    path.write_text(format_document(document, "a comment\n\nof three lines"), encoding="utf-8")
    assert repr(read_document(path)) == repr(document)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "r.yaml"
    target.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"was not written: the disk is full"):
        write_text_atomically(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_a_missing_destination_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.* cannot be written"):
        write_text_atomically(tmp_path / "nowhere" / "r.yaml", "text")
