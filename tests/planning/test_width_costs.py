"""Predicted costs against the counts of graphs that were pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import zoo
from tests.pruning import UNEVEN, look, prune_file
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.width_costs import dense_widths, prunable_widths, width_cost

Exported = Callable[[zoo.Case], Path]
CASES = ("timm-vit", "hf-dinov2", "timm-swin")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        pytest.param(name, heads, marks=pytest.mark.slow if name == "timm-swin" and heads else ())
        for name in CASES
        for heads in (0, 0.4)
    ],
)
def test_costs_are_those_of_the_pruned_graph(name: str, heads: float, exported: Exported, tmp_path: Path) -> None:
    settings = UNEVEN | {"attention": UNEVEN["attention"] | {"heads": heads}}
    dense, pruned = prune_file(exported(zoo.Case(name)), settings, tmp_path / "p.onnx", skip_unprunable=True)
    small = look(tmp_path / "p.onnx")
    for resource, count in (
        ("macs", lambda s: graph_macs(s.view, s.counted)),
        ("params", lambda s: graph_params(s.view)),
    ):
        saved = 0.0
        for block, widths in zip(dense.match.blocks, pruned.widths, strict=True):
            cost = width_cost(dense.view, dense.counted, block, resource)  # type: ignore[arg-type]
            before = dense_widths(block)
            after = before | {p: k for p in before if (k := getattr(widths, p)) is not None}
            assert after != before
            saved += cost.at(before) - cost.at(after)  # type: ignore[arg-type]
        assert count(dense) - saved == pytest.approx(count(small), rel=0 if resource == "macs" else 0.01)


def test_parts_that_cannot_be_pruned_are_no_choice(exported: Exported) -> None:
    for block in look(exported(zoo.Case("timm-vit"))).match.blocks:
        assert prunable_widths(block) == dense_widths(block)
