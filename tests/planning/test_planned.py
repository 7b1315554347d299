"""Plans as ratios files: exactly the planned counts, everything else of the settings kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toast_onnx.planning.planned import exact_ratio, planned_ratios, selection_only
from toast_onnx.planning.ratios import format_ratios, parse_ratios, resolve
from toast_onnx.planning.search import aligned_widths
from toast_onnx.planning.widths import kept_count


@given(st.integers(1, 6000), st.integers(1, 64), st.randoms())
def test_every_aligned_width_has_a_ratio(width: int, align: int, random: object) -> None:
    for kept in random.sample(aligned_widths(width, align), min(5, len(aligned_widths(width, align)))):  # type: ignore[attr-defined]
        ratio = exact_ratio(width, kept, align)
        assert kept_count(width, ratio, align) == kept
        assert (ratio == 0) == (kept == width)


def test_a_width_between_multiples_has_none() -> None:
    with pytest.raises(ValueError, match="no ratio keeps 13 of 64"):
        exact_ratio(64, 13, 8)


def test_planned_heads_are_exact_at_any_alignment() -> None:
    settings = parse_ratios({"version": 1, "attention": {"heads": 0.9}, "align": {"head_dim": 16, "width": 64}})
    dense = [{"heads": heads, "qk": 64} for heads in (3, 12, 16)]
    plan = planned_ratios(settings, {0: {"heads": 2}, 1: {"heads": 11, "qk": 48}, 2: {"heads": 1}}, dense)  # type: ignore[arg-type]
    found = resolve(plan, ["a", "b", "c"], [["x"], ["y"], ["z"]])
    assert [kept_count(d["heads"], s.heads, 1) for d, s in zip(dense, found, strict=True)] == [2, 11, 1]
    assert selection_only(settings).attention.heads == 0


def test_a_plan_keeps_the_settings_and_drops_their_ratios() -> None:
    settings = parse_ratios(
        {
            "version": 1,
            "attention": {"qk": 0.9, "select": "index", "score": "second-order"},
            "ffn": {"fc1": 0.3, "score": "variance"},
            "blocks": {1: {"attention": {"qk": 0.5}}, 0: {"ffn": {"score": "l2", "fc2": 0.9}}},
            "align": {"head_dim": 4, "width": 16},
            "compensation": {"kind": "bias"},
        }
    )
    dense = [{"qk": 64, "vo": 32, "fc1": 192, "fc2": 768}, {"fc1": 192, "fc2": 768}]
    plan = planned_ratios(settings, {0: {"qk": 36, "fc2": 496}, 1: {"fc2": 768}}, dense)  # type: ignore[arg-type]
    first, second = resolve(plan, ["a", "b"], [["x"], ["y"]])
    assert kept_count(64, first.qk, 4) == 36
    assert kept_count(768, first.fc2, 16) == 496
    assert (first.vo, first.fc1, second.qk, second.fc1, second.fc2) == (0, 0, 0, 0, 0)
    assert (first.select, first.score, first.ffn_score, second.ffn_score) == ("index", "second-order", "l2", "variance")
    assert plan.compensation.kind == "bias"
    assert (plan.align.head_dim, plan.align.width) == (4, 16)
    assert not any(
        ratio for s in resolve(selection_only(settings), ["a", "b"], [["x"], ["y"]]) for ratio in (s.qk, s.fc1)
    )
    assert "qk: [0.44, 0]" in format_ratios(plan)
