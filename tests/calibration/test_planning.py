"""Plans on a small model: budgets met by the graph that prune writes, predictions, and what is refused."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import zoo
from tests.pace import mostly_slow
from tests.pruning import look
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ConfigError
from toast_onnx.matching.study import Study
from toast_onnx.model import save_model
from toast_onnx.planning.cost_table import CostTable, PartTimes
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.planning.search import Kept, PartChoice, combinations, joined
from toast_onnx.planning.width_costs import dense_widths
from toast_onnx.pruning import prune
from toast_onnx_calibration.costs import Runtime
from toast_onnx_calibration.planning import (
    Budget,
    check_settings,
    plan_counted,
    plan_latency,
    predicted_choices,
    shares,
)
from toast_onnx_calibration.sensitivity_results import Sensitivity, Trial

Exported = Callable[[zoo.Case], Path]
#: The cheapest order of hidden units: how they are chosen is not what is tested here.
SETTINGS = parse_ratios({"version": 1, "align": {"head_dim": 2, "width": 4}, "ffn": {"score": "variance"}})


@pytest.fixture(scope="module")
def vit(exported: Exported) -> Study:
    return look(exported(zoo.Case("timm-vit")))


@functools.cache
def synthetic(path: Path) -> SyntheticStatistics:
    """Statistics of a model, made once for all tests."""
    return SyntheticStatistics(look(path))


def choices_of(
    dense: Study, parts: Sequence[str] = ("qk", "vo", "fc2"), table: CostTable | None = None
) -> list[PartChoice]:
    """Predictions from made-up measurements at half of every width: the later the block, the less it hurts."""
    found = Sensitivity({}, "kl")
    for block in dense.match.blocks:
        for part, width in dense_widths(block).items():
            found.trials.append(Trial(block.index, part, 0.5, {part: width // 2}, {"kl": 0.1 / (1 + block.index)}))
    return predicted_choices(dense, SETTINGS, synthetic(dense.view.model.path), found, parts, table)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "share", "parts"),
    mostly_slow(
        itertools.product(
            ("macs", "params"),
            (0.5, 0.8),
            (("qk", "vo", "fc2"), ("qk", "vo", "fc1", "fc2"), ("heads", "qk", "vo", "fc2")),
        ),
        [
            ("macs", 0.5, ("heads", "qk", "vo", "fc2")),
            ("params", 0.8, ("qk", "vo", "fc1", "fc2")),
        ].__contains__,
        lambda v: f"{v[0]}-{v[1]}-{'+'.join(v[2])}",
    ),
)
def test_the_pruned_graph_meets_the_budget(
    kind: str, share: float, parts: tuple[str, ...], vit: Study, tmp_path: Path
) -> None:
    found = plan_counted(vit, choices_of(vit, parts), Budget(kind, share))  # type: ignore[arg-type]
    ratios = planned_ratios(SETTINGS, found.kept, [dense_widths(b) for b in vit.match.blocks])
    pruned = prune(vit, ratios, SyntheticStatistics(vit))
    for widths, kept, block in zip(pruned.widths, found.kept.values(), vit.match.blocks, strict=True):
        assert {p: getattr(widths, p) or dense_widths(block)[p] for p in kept} == kept
    save_model(pruned.model, tmp_path / "p.onnx")
    small = look(tmp_path / "p.onnx")
    count = graph_macs(small.view, small.counted) if kind == "macs" else graph_params(small.view)
    total = graph_macs(vit.view, vit.counted) if kind == "macs" else graph_params(vit.view)
    assert 0.99 * share <= count / total <= share * 1.005  # new biases count, too
    assert shares(vit, found.kept)[kind] == pytest.approx(count / total, rel=0.005)


def test_less_is_taken_where_it_hurts_more(vit: Study) -> None:
    found = plan_counted(vit, choices_of(vit, ["fc2"]), Budget("macs", 0.7))
    first, last = found.kept[0]["fc2"], found.kept[1]["fc2"]
    assert first > last


def damage_at(choices: Sequence[PartChoice], kept: Kept) -> float:
    """What a search adds up at the given counts: those between widths on offer are interpolated."""
    total = 0.0
    for members in joined(choices):
        counts = [kept.get(m.block, {}).get(m.part, m.dense) for m in members]
        harms = [float(np.interp(n, m.widths, m.damages)) for n, m in zip(counts, members, strict=True)]
        at = [
            replace(m, widths=(n, m.dense), damages=(harm, 0.0))
            for m, n, harm in zip(members, counts, harms, strict=True)
        ]
        total += float(combinations(at)[1][0])
    return total


def test_predictions_pass_through_what_was_measured(vit: Study) -> None:
    choices = choices_of(vit)
    half = {b.index: {"qk": dense_widths(b)["qk"] // 2} for b in vit.match.blocks}
    assert damage_at(choices, half) == pytest.approx(0.1 + 0.05, rel=1e-6)  # type: ignore[arg-type]
    assert damage_at(choices, {}) == 0


def test_thinned_heads_are_predicted_to_harm_less_where_there_are_fewer(vit: Study) -> None:
    choices = choices_of(vit, ("heads", "qk"))
    dense = dense_widths(vit.match.blocks[0])
    one, half = dense["heads"] // 2, dense["qk"] // 2  # the counts that were measured: 0.1 each
    assert damage_at(choices, {0: {"heads": one}}) == pytest.approx(0.1, rel=1e-6)
    both = damage_at(choices, {0: {"heads": one, "qk": half}})
    assert both == pytest.approx(0.1 + 0.1 * one / dense["heads"], rel=1e-6)


def test_an_impossible_budget_says_what_is_possible(vit: Study) -> None:
    with pytest.raises(ConfigError, match=r"still take 0\.\d+ of the dense model's macs; ask for at least 0\.\d+"):
        plan_counted(vit, choices_of(vit), Budget("macs", 0.01))


def test_what_no_plan_can_speak_of() -> None:
    for document, match in (
        ({"ffn": {"mode": "runtime"}}, "runtime"),
        ({"compensation": {"statistics": "sequential"}}, "one-shot statistics.*into the planned file"),
        ({"rounding": "paper"}, "paper"),
    ):
        with pytest.raises(ConfigError, match=match):
            check_settings(parse_ratios({"version": 1} | document))


def table_for(dense: Study, slow: int | None = None) -> CostTable:
    """20 ms dense; every fc2 unit of both blocks together takes 1/64 ms, but `slow` units are no faster than all."""
    width = dense_widths(dense.match.blocks[0])["fc2"]
    times = {k: 20.0 - (width - k) / 64 for k in range(width // 8, width, width // 8)}
    if slow is not None:
        times[slow] = 20.0
    blocks = tuple(b.index for b in dense.match.blocks)
    part = PartTimes(blocks=blocks, part="fc2", dense=width, milliseconds=times)
    return CostTable(model="m", model_sha256="x", runtime={}, batch=1, dense_milliseconds=20.0, parts=(part,))


def test_only_measured_widths_are_offered_and_slow_ones_not_bought(vit: Study) -> None:
    width = dense_widths(vit.match.blocks[0])["fc2"]
    table = table_for(vit, slow=width // 2)
    choices = choices_of(vit, table=table)
    assert {c.part for c in choices} == {"fc2"}
    assert set(choices[0].widths) == set(table.widths(0, "fc2"))
    for share in np.linspace(0.75, 0.99, 6):
        found, check = plan_latency(vit, choices, table, Budget("latency", float(share)), None)
        assert check is None
        assert all(kept["fc2"] != width // 2 for kept in found.kept.values())
        assert found.cost <= share * 20 + 1e-9


def test_a_table_that_promises_too_much_is_corrected(vit: Study) -> None:
    """The made-up machine gains half of what the table says."""
    table = table_for(vit)
    seen: list[float] = []

    def timer(models: Sequence[Path]) -> list[float]:
        small = look(models[1])
        width = dense_widths(vit.match.blocks[0])["fc2"]
        kept = [dense_widths(b)["fc2"] for b in small.match.blocks]
        seen.append(20.0 - 1 / 2 * sum(width - k for k in kept) / 128)
        return [20.0, seen[-1]]

    found, check = plan_latency(
        vit, choices_of(vit, table=table), table, Budget("latency", 0.88), Runtime(timer, {}, 1)
    )
    assert check is not None
    assert check.share == pytest.approx(0.88, rel=0.05)
    assert check.rounds > 0
    assert len(seen) > 1
    assert found.cost < 0.88 * 20


@pytest.mark.parametrize(("factor", "met"), [(1.0, False), (0.9, False), (0.5, True)])
def test_a_machine_that_does_not_follow_the_table(factor: float, met: bool, vit: Study) -> None:
    """Whatever is planned takes the same time here: the same as the dense model, a little less, or half."""
    table = table_for(vit)
    budget = Budget("latency", 0.85)
    runtime = Runtime(lambda _: [20.0, 20.0 * factor], {}, 1)
    _, check = plan_latency(vit, choices_of(vit, table=table), table, budget, runtime)
    assert check is not None
    assert check.share == factor
    assert check.meets(budget) is met


def test_a_plan_within_the_budget_is_preferred_to_a_nearer_one_beyond_it(vit: Study) -> None:
    table = table_for(vit)
    observed = iter([0.90, 0.78, 0.90, 0.90, 0.90])
    runtime = Runtime(lambda _: [20.0, 20.0 * next(observed)], {}, 1)
    budget = Budget("latency", 0.85)
    _, check = plan_latency(vit, choices_of(vit, table=table), table, budget, runtime)
    assert check is not None
    assert check.share == pytest.approx(0.78)


def test_why_there_is_nothing_to_choose(vit: Study) -> None:
    statistics = SyntheticStatistics(vit)
    width = dense_widths(vit.match.blocks[0])["fc2"]
    wide = parse_ratios({"version": 1, "align": {"head_dim": 2, "width": width}})
    with pytest.raises(ConfigError, match=f"alignment leaves no width.*fc2 is {width} wide in steps of {width}"):
        predicted_choices(vit, wide, statistics, Sensitivity({}, "kl"), ["fc2"])
    with pytest.raises(ConfigError, match="no part was measured"):
        predicted_choices(vit, SETTINGS, statistics, Sensitivity({}, "kl"))
    with pytest.raises(ConfigError, match="cost table"):
        choices_of(vit, ["qk"], table_for(vit))  # a table of fc2 alone
