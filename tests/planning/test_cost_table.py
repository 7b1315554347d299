"""Latency tables: what they save by block and width, written and read, refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.pruning import look
from toast_onnx.errors import ConfigError
from toast_onnx.planning.cost_table import CostTable, alike, read_table, table_widths, write_table

Exported = Callable[[zoo.Case], Path]
DOCUMENT: dict[str, Any] = {
    "format": "toast-onnx/costs/1",
    "model": "m.onnx",
    "model_sha256": "abc",
    "runtime": {"program": "onnxruntime"},
    "batch": 1,
    "dense_milliseconds": 20.0,
    "parts": [{"blocks": [0, 1], "part": "fc2", "dense": 256, "milliseconds": {"64": 14.0, "128": 17.0}}],
}


def test_savings_are_shared_by_the_blocks() -> None:
    table = CostTable.model_validate_json(json.dumps(DOCUMENT))
    assert table.widths(1, "fc2") == (64, 128, 256)
    assert table.widths(2, "fc2") == ()
    assert table.saved(0, "fc2", 64) == pytest.approx(3.0)
    assert table.saved(1, "fc2", 128) == pytest.approx(1.5)
    assert table.saved(1, "fc2", 256) == 0
    with pytest.raises(KeyError):
        table.saved(0, "qk", 8)


def test_dimensions_of_dropped_heads_save_nothing() -> None:
    parts = [
        {"blocks": [0], "part": "heads", "dense": 4, "milliseconds": {"1": 17.0, "2": 18.0}},
        {"blocks": [0], "part": "qk", "dense": 64, "milliseconds": {"32": 19.0}},
    ]
    table = CostTable.model_validate_json(json.dumps(DOCUMENT | {"parts": [*DOCUMENT["parts"], *parts]}))
    assert table.saved_together(0, {"qk": 32}) == pytest.approx(1.0)
    assert table.saved_together(0, {"heads": 4, "qk": 32}) == pytest.approx(1.0)
    assert table.saved_together(0, {"heads": 2, "qk": 32}) == pytest.approx(2.0 + 0.5)
    assert table.saved_together(0, {"heads": 1, "qk": 64}) == pytest.approx(3.0)
    assert table.saved_together(0, {"heads": 2, "fc2": 64}) == pytest.approx(2.0 + 3.0)


def test_written_and_read(tmp_path: Path, exported: Exported) -> None:
    table = CostTable.model_validate_json(json.dumps(DOCUMENT))
    write_table(table, tmp_path / "t.json")
    assert read_table(tmp_path / "t.json", look(exported(zoo.Case("timm-vit"))), "abc") == table


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_sha256": "def"}, "another model"),
        ({"format": "toast-onnx/costs/9"}, "costs/9"),
        ({"batch": 0}, "batch"),
        ({"dense_milliseconds": float("nan")}, "NaN"),
        ({"speed": 1}, "speed"),
        ({"parts": [{"blocks": [0], "part": "fc2", "dense": 8, "milliseconds": {"9": 1.0}}]}, "9 of 8"),
        ({"parts": [{"blocks": [], "part": "fc2", "dense": 8, "milliseconds": {"4": 1.0}}]}, "blocks"),
    ],
)
def test_refused_with_a_reason(change: dict[str, Any], match: str, tmp_path: Path, exported: Exported) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(DOCUMENT | change))
    with pytest.raises(ConfigError, match=match):
        read_table(path, look(exported(zoo.Case("timm-vit"))), "abc")


def test_missing_and_damaged(tmp_path: Path, exported: Exported) -> None:
    dense = look(exported(zoo.Case("timm-vit")))
    with pytest.raises(ConfigError, match="toast-onnx costs"):
        read_table(tmp_path / "none.json", dense, "abc")
    (tmp_path / "half.json").write_text('{"format": ')
    with pytest.raises(ConfigError, match="measure the table again"):
        read_table(tmp_path / "half.json", dense, "abc")


def test_blocks_of_one_shape_go_together(exported: Exported) -> None:
    blocks = look(exported(zoo.Case("timm-vit"))).match.blocks
    assert alike(blocks, {b.index: "same" for b in blocks}) == [tuple(b.index for b in blocks)]
    assert alike(blocks, {b.index: b.index for b in blocks}) == [(b.index,) for b in blocks]


def test_table_widths() -> None:
    assert table_widths(64, 8) == (8, 16, 24, 32, 40, 48, 56)
    many = table_widths(3072, 8, 24)
    assert len(many) == 24
    assert (many[0], many[-1]) == (8, 3064)
    assert all(k % 8 == 0 for k in many)
    assert table_widths(8, 8) == ()
