"""Numbers, tables, JSON and progress as people and machines see them."""

from __future__ import annotations

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toast_onnx_cli import console
from toast_onnx_cli.console import format_bytes, format_count, print_json, print_table, progress

FACTORS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (588, "588"), (999.6, "1 K"), (1_254_000_000, "1.25 G"), (5_700_000, "5.7 M"), (999_999, "1 M")],
)
def test_format_count(value: float, text: str) -> None:
    assert format_count(value) == text


@given(st.integers(min_value=0, max_value=10**17))
def test_format_count_reads_back_to_three_digits(value: int) -> None:
    number, _, unit = format_count(value).partition(" ")
    assert "e" not in number
    assert math.isclose(float(number) * FACTORS[unit], value, rel_tol=0.005001)


def test_format_bytes() -> None:
    assert format_bytes(21_900_000) == "21.9 MB"
    assert format_bytes(512) == "512 B"


def test_print_json_keeps_order_and_refuses_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"b": 1, "a": ["é", None]})
    text = capsys.readouterr().out
    assert list(json.loads(text)) == ["b", "a", "read"]
    with pytest.raises(ValueError, match="JSON"):
        print_json({"x": float("nan")})


def test_print_table_takes_cells_literally_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    long = "/blocks.0/" + "x" * 200
    print_table(["node", "MACs"], [["[red]name[/red]", "1.25 G"], [long, "5 M"]], title="blocks")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["[red]name[/red]", "1.25", "G"] for line in lines)
    assert any(long in line and line.endswith("5 M") for line in lines)


def test_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take the same, unless somebody knows better."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with progress("solving", 10) as advance:
        now[0] = 20.0
        advance(2, "block 1")
        now[0] = 300.0
        advance(1, left=7000.0)
        now[0] = 320.0
        advance(7)
    assert capsys.readouterr().err.splitlines()[1:-1] == [
        "solving: 2/10 block 1 ~80 s left",
        "solving: 3/10 ~1.9 h left",
        "solving: 10/10",
    ]
    assert console.format_seconds(240) == "4 min"


def test_progress_off_a_terminal_is_plain_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("solving", 2) as advance:
        advance(note="block 0")
        advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("solving ...\nsolving: done in ")
    assert "\x1b" not in captured.err


def test_progress_on_a_terminal_shows_a_bar_and_its_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("[b]solving[/b]", 2) as advance:
        advance(note="block [0]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[b]solving[/b]" in captured.err
