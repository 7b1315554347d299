"""Tokens in trials, in cost tables, and in plans for a latency, on a machine whose times are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from tests import zoo
from tests.pruning import look, run
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import BudgetError, ConfigError
from toast_onnx.matching.study import Study
from toast_onnx.model import save_model
from toast_onnx.planning.cost_table import CostTable, MergedTime
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.planning.schema import Align
from toast_onnx.planning.width_costs import TOKENS, dense_widths
from toast_onnx.pruning import prune
from toast_onnx.tokens.points import study_tokens
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.costs import Runtime, measure_costs
from toast_onnx_calibration.planning import Budget
from toast_onnx_calibration.plans import Planner
from toast_onnx_calibration.sensitivity_trials import trial_grid
from toast_onnx_calibration.work import open_work

Exported = Callable[[zoo.Case], Path]
SETTINGS = parse_ratios({"version": 1, "align": {"head_dim": 16, "width": 64}})
OPTIONS = CalibrationOptions(threads=1, batch=4)


@pytest.fixture(scope="module")
def vit(exported: Exported) -> Study:
    return look(exported(zoo.Case("timm-vit")))


@pytest.fixture
def data(vit: Study, tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", zoo.inputs(vit.view.model.path, 8)["input"])
    return tmp_path / "x.npy"


def macs_of(path: Path) -> int:
    small = look(path)
    return graph_macs(small.view, small.counted)


def machine(vit: Study, fixed: float, slope: float) -> Runtime:
    """Where a model takes `fixed + slope * MACs left` of the dense one's ten milliseconds."""
    dense = graph_macs(vit.view, vit.counted)

    def timer(models: Sequence[Path]) -> list[float]:
        return [10.0, *(10 * (fixed + slope * macs_of(m) / dense) for m in models[1:])]

    return Runtime(timer, {"program": "made up"}, 1)


def test_tokens_of_one_block_are_a_trial(vit: Study, data: Path) -> None:
    grid = trial_grid(vit, SETTINGS, [TOKENS], [0.3, 0.9, 0.95])
    count = study_tokens(vit).sequences[0].count
    most = (count - 1 + 1) // 2  # all but the class token, every second one
    assert [(t.block, t.kept[TOKENS]) for t in grid] == [
        (b, count - min(round(r * count), most)) for b in (0, 1) for r in (0.3, 0.9)
    ]
    with open_work(vit, data, SETTINGS, [TOKENS], OPTIONS) as work:
        found = work.damage(grid[0])
    alone = merged(vit, count - grid[0].kept[TOKENS], data.with_name("merged.onnx"))
    feeds = {"input": np.load(data)}
    a, b = (run(p, feeds)[0].astype(np.float64) for p in (vit.view.model.path, alone))
    p, q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    assert found["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-2, abs=1e-9)


def test_a_table_finds_what_merging_costs_and_saves(vit: Study) -> None:
    table = measure_costs(vit, machine(vit, 0.2, 0.75), [TOKENS])
    assert table.parts == ()
    assert len(table.merged) > 1
    line = table.merged_line()
    assert line is not None
    assert line == pytest.approx((0.2, 0.75), rel=1e-6)
    assert line.macs(line.latency(0.6)) == pytest.approx(0.6)


def test_a_machine_that_merging_makes_slower_has_no_line() -> None:
    merged = tuple(MergedTime(removed={0: r}, macs_share=m, milliseconds=t) for r, m, t in ((1, 0.9, 11), (9, 0.5, 12)))
    common = {"model": "m", "model_sha256": "x", "runtime": {}, "batch": 1, "dense_milliseconds": 10.0, "parts": ()}
    assert CostTable(**common, merged=merged).merged_line() is None  # type: ignore[arg-type]
    dear = tuple(MergedTime(removed={0: r}, macs_share=m, milliseconds=t) for r, m, t in ((1, 0.9, 13), (9, 0.5, 11)))
    assert CostTable(**common, merged=dear).merged_line() is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a line needs two"):
        CostTable(**common, merged=merged[:1])  # type: ignore[arg-type]


def merged(vit: Study, gone: int, path: Path) -> Path:
    share = Decimal(gone) / study_tokens(vit).sequences[0].count
    ratios = planned_ratios(SETTINGS, {}, [dense_widths(b) for b in vit.match.blocks], [share, Decimal(0)])
    save_model(prune(vit, ratios, SyntheticStatistics(vit)).model, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("parts", [(TOKENS,), (TOKENS, "fc2")])
def test_a_latency_is_met_with_tokens(parts: tuple[str, ...], vit: Study, data: Path) -> None:
    """The table is of a machine where merging is nearly free; the one that is planned for gains less."""
    table = measure_costs(vit, machine(vit, 0.05, 0.95), parts, Align(head_dim=16, width=64))
    here = machine(vit, 0.15, 0.85)
    _, four, six = here.timer([vit.view.model.path, *(merged(vit, r, data.with_name(f"{r}.onnx")) for r in (4, 6))])
    share = (four + six) / 20
    with open_work(vit, data, SETTINGS, parts, OPTIONS) as work:
        planner = Planner(vit, SETTINGS, parts, (0.5,), None, table, here, work)
        plan = planner.plan(Budget("latency", share))
        with pytest.raises(BudgetError, match="latency, only 0"):
            replace(planner, parts=(TOKENS,)).plan(Budget("latency", 0.1))
        with pytest.raises(ConfigError, match="no parameters"):
            replace(planner, parts=(TOKENS,), table=None).plan(Budget("params", 0.5))
    save_model(prune(vit, plan.ratios, SyntheticStatistics(vit)).model, data.with_name("planned.onnx"))
    _, milliseconds = here.timer([vit.view.model.path, data.with_name("planned.onnx")])
    assert plan.document["latency"]["measured_share"] == pytest.approx(milliseconds / 10)
    assert milliseconds == pytest.approx(10 * share, rel=0.031)
    if parts == (TOKENS,):
        assert plan.document["tokens"]["removed"] in ({"0": 4}, {"0": 5}, {"0": 6})
