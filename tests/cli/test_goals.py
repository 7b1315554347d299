"""`prune` from a goal, and what it says of the answers on samples that were held back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from tests import zoo
from tests.end_to_end.command import DIGITS
from toast_onnx.errors import BudgetError, ConfigError
from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.planning.ratios import Ratios, dump_ratios, load_ratios, parse_ratios
from toast_onnx.planning.width_costs import TOKENS
from toast_onnx.report.tables import Table
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.goals import Goal, Judged, judge_model, smallest_within
from toast_onnx_calibration.images import choose
from toast_onnx_calibration.planning import Budget
from toast_onnx_calibration.reachable import check_reachable
from toast_onnx_cli.goals import Asked, measure_all, write_plan
from toast_onnx_cli.main import main
from toast_onnx_cli.prune_summary import _agreement_lines

TEST = DIGITS.with_name("digits_test.npz")


def test_a_budget_is_planned_and_its_file_repeats_the_run(
    exported: Callable[[zoo.Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = exported(zoo.Case("timm-vit"))
    Path("m.onnx").write_bytes(source.read_bytes())
    np.save("x.npy", zoo.inputs(source, 8)["input"])
    common = ("prune", "m.onnx", "--data", "x.npy", "--threads", "1", "--json")
    first = CliRunner().invoke(main, [*common, "--macs", "0.7", "-o", "a.onnx"])
    assert first.exit_code == 0, first.stderr
    a = json.loads(first.stdout)
    assert a["pruned"]["macs"] <= 0.7 * a["dense"]["macs"]
    assert a["options"]["goal"]["macs"] == 0.7
    assert "# budget: --macs 0.7" in Path("a.ratios.yaml").read_text()
    again = CliRunner().invoke(main, [*common, "--ratios", "a.ratios.yaml", "-o", "b.onnx"])
    b = json.loads(again.stdout)
    assert [x["after"] for x in a["blocks"]] == [x["after"] for x in b["blocks"]]
    assert a["agreement"]["held_back"] is False  # eight samples are too few to spare any
    assert a["agreement"]["samples"] == 8


def test_only_a_budget_that_merging_cannot_help_is_refused_at_once(exported: Callable[[zoo.Case], Path]) -> None:
    dense, widths = study(load_model(exported(zoo.Case("timm-vit")))), ("heads", "qk", "vo", "fc1", "fc2")
    check_reachable(dense, Ratios(), Budget("macs", 0.01), (TOKENS, *widths))
    for kind, parts in (("macs", widths), ("params", (TOKENS, *widths))):
        with pytest.raises(BudgetError, match="cannot be reached"):
            check_reachable(dense, Ratios(), Budget(kind, 0.01), parts)  # type: ignore[arg-type]


@given(st.integers(1, 200), st.integers(1, 100), st.integers(0, 5), st.integers(2, 9))
def test_what_is_held_back_is_not_measured_on(count: int, samples: int, seed: int, hold: int) -> None:
    used, back = (choose(count, samples, seed, hold, held=held) for held in (False, True))
    assert not {*used} & {*back}
    assert {*used} <= {*choose(count, samples, seed)}
    assert len(back) == max(1, min(count, samples) // hold) or min(count, samples) < hold
    if count >= samples + samples // hold + 1:
        assert used == choose(count, samples, seed)  # others are at hand, so none is given up


@pytest.mark.parametrize("most", [0.5, 2.0, 5.0])
def test_bisection_finds_the_smallest_share_within_the_loss(most: float) -> None:
    """Where the loss falls from 10 points at no multiply-accumulates to none at all of them, and 0.3 is the least."""
    made: list[float] = []

    def plan(share: float) -> str:
        if share < 0.3:
            raise BudgetError("too small")
        made.append(share)
        return f"{share}"

    share, planned, judged = smallest_within(
        Goal("max_drop", most), plan, lambda plan: Judged(10 * (1 - float(plan)), plan)
    )
    assert judged.loss <= most
    assert share - (1 - most / 10) < 0.75 / 2**5 + 1e-9
    assert planned == judged.text == f"{share}"
    assert len(made) == len(set(made))  # a plan is not made twice


@dataclass(frozen=True)
class _Plan:
    """A plan by a rule: what is to go comes off the hidden units."""

    ratios: Ratios
    missed = None
    table = Table("kept", ["block"], [], ["right"])

    def save(self, path: Path) -> None:
        dump_ratios(self.ratios, path)


@dataclass(frozen=True)
class _Planner:
    out: Path
    settings = Ratios()

    def plan(self, budget: Budget) -> _Plan:
        assert not self.out.exists()  # a search that is broken off leaves nothing behind
        return _Plan(parse_ratios({"version": 1, "ffn": {"fc2": round(0.98 * (1 - budget.share), 3)}, "align": 1}))


def test_the_ratios_of_the_smallest_model_are_written_once(tmp_path: Path) -> None:
    dense, data, out = study(load_model(DIGITS)), str(TEST), tmp_path / "o.ratios.yaml"
    options = CalibrationOptions(preprocess="none", samples=160, hold=2, threads=1)
    asked = Asked(dense, data, None, options, {}, "any", False)
    statistics = measure_all(dense, data, tmp_path / "s.npz", options)
    planner: Any = _Planner(out)
    judged = write_plan(Goal("max_drop", 2.0), asked, out, tmp_path, planner, statistics, False)
    assert judged is not None
    assert judged.loss <= 2.0
    share = float(judged.text.partition(" ")[0])
    assert load_ratios(out).ffn.fc2 == Decimal(str(round(0.98 * (1 - share), 3)))


def test_a_loss_that_nothing_is_within_is_said_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="the nearest one had agreement 90 %"):
        smallest_within(Goal("max_drop", 1.0), lambda _: None, lambda _: Judged(10.0, "agreement 90 %"))


@pytest.mark.parametrize("labels", [None, str(TEST)])
def test_a_model_is_judged_with_its_interval(labels: str | None) -> None:
    reading = CalibrationOptions(preprocess="none", samples=160, hold=2, threads=1)
    found = judge_model(Goal("max_drop", 1.0), DIGITS, DIGITS, str(TEST), labels, {}, reading)
    assert found.loss == 0
    assert "80 held-back samples" in found.text
    if labels is None:
        low = binomtest(80, 80).proportion_ci(method="wilson").low
        assert f"agreement 100.0% (95 %: {low:.1%} to 100.0%)" in found.text


def test_the_recipe_is_kept_and_agreement_is_told(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\nffn: {fc2: 0.5, score: l2}\ncompensation: {kind: bias}\n")
    out, data = tmp_path / "o.onnx", str(DIGITS.with_name("digits_calibration.npz"))
    words = ["prune", str(DIGITS), "--ratios", str(tmp_path / "r.yaml"), "--data", data, "--preprocess", "none"]
    result = CliRunner().invoke(main, [*words, "--samples", "64", "--threads", "1", "-o", str(out)])
    assert result.exit_code == 0, result.stderr
    assert "on 8 held-back samples" in result.stdout
    document = json.loads(out.with_suffix(".json").read_text())
    assert document["agreement"]["held_back"] is True
    assert document["preprocessing"]["resize"] == [28, 28]
    found = CliRunner().invoke(main, ["eval", str(out), "--data", str(TEST), "--samples", "50", "--json"])
    assert json.loads(found.stdout)["preprocessing"] == document["preprocessing"]
    assert "as kept in the model" in found.stderr


def agreement(same: float) -> dict[str, object]:
    worst = {"block": 5, "part": "ffn", "error": 0.7}
    outputs = {"y": {"top1_agreement": same, "kl": 1.5}}
    return {"samples": 32, "held_back": True, "outputs": outputs, "worst": worst}


def test_a_bad_result_is_named_first_and_gets_advice() -> None:
    bad, middling, good = (_agreement_lines(agreement(same)) for same in (0.25, 0.75, 0.97))
    assert bad.alarm.startswith("HARDLY AGREES with the dense model, on 25.0% of 32 held-back samples")
    assert "block 5 costs most: try `blocks: {5: {ffn: {fc1: 0, fc2: 0}}}`" in bad.lines[1]
    assert (middling.alarm, len(middling.lines)) == ("", 2)
    assert (good.alarm, len(good.lines)) == ("", 1)
    assert _agreement_lines(None).lines == ()
