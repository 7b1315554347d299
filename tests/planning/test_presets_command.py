from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from toast_onnx.errors import ConfigError
from toast_onnx.planning.presets import list_presets, preset
from toast_onnx.planning.ratios import load_ratios, parse_ratios
from toast_onnx_cli.presets import command


def _output(*arguments: str) -> str:
    return CliRunner().invoke(command, arguments, catch_exceptions=False).output


def test_the_table_has_a_line_for_every_schedule() -> None:
    lines = _output().strip().splitlines()
    rows = [line.split() for line in lines if line.lstrip().startswith("paper:")]
    assert [row[0] for row in rows] == [schedule.name for schedule in list_presets()]
    assert rows[4] == [
        "paper:deit_small@2.7",
        "deit_small_patch16_224",
        "4.599",
        "2.655",
        "2.233",
        "79.82",
        "83.89",
        "2.01x",
    ]
    assert max(map(len, lines)) <= 120
    assert "static" in lines[0]


def test_json_holds_the_same_facts_and_ratios_that_can_be_used() -> None:
    entries = json.loads(_output("--json"))["presets"]
    assert [entry["name"] for entry in entries] == [schedule.name for schedule in list_presets()]
    for entry in entries:
        assert parse_ratios(entry["ratios"]) == preset(entry["name"])
        assert entry["gmacs"]["static"] < entry["gmacs"]["paper"] < entry["gmacs"]["dense"]
    assert entries[4]["reported"] == {"dense_top1": 79.82, "top1": 83.89, "speedup": 2.01}


def test_a_named_preset_prints_a_file_that_reads_back(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(_output("swin_tiny@3.1"))
    assert load_ratios(tmp_path / "r.yaml") == preset("paper:swin_tiny@3.1")


def test_an_unknown_preset_is_an_expected_failure() -> None:
    with pytest.raises(ConfigError, match="did you mean swin_tiny"):
        _output("swin_tinny@3.1")
