"""What a run with selection at run time asks for and what it writes down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import zoo
from tests.pruning import look, prune_file
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.report.pruning import pruning_report
from toast_onnx_calibration.needs import needed

Exported = Callable[[zoo.Case], Path]
RATIOS: dict[str, Any] = {
    "version": 1,
    "attention": {"qk": 0.5},
    "ffn": {"fc1": 0.25, "fc2": 0.5, "mode": "runtime"},
    "blocks": {0: {"ffn": {"mode": "static"}}},
    "align": 1,
}


def test_a_network_that_selects_needs_no_statistics(exported: Exported) -> None:
    wanted = needed(look(exported(zoo.Case("timm-deit"))), parse_ratios(RATIOS))
    assert wanted == {0: {"qk", "inputs", "hidden"}, 1: {"qk"}, 2: {"qk"}}


def test_the_report_names_what_is_selected_and_from_which_tokens(exported: Exported, tmp_path: Path) -> None:
    out = tmp_path / "pruned.onnx"
    dense, pruned = prune_file(exported(zoo.Case("timm-deit")), RATIOS, out)
    static, first, _ = pruning_report(pruned, dense, out, {})["blocks"]
    assert static["settings"]["mode"] == "static"
    assert len(static["kept"]["fc2"]) == 384
    assert (first["settings"]["mode"], first["settings"]["ffn_score"]) == ("runtime", "activation")
    fc1, fc2 = pruned.selections[:2]
    assert fc1.tokens is not None
    assert fc2.tokens is not None
    assert first["kept"]["fc1"] == {"runtime": 144, "tokens": fc1.tokens.tolist(), "residual": "kept"}
    assert first["kept"]["fc2"] == {"runtime": 384, "tokens": fc2.tokens.tolist()}
    assert first["after"]["qk_dim"] == 32
