from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toast_onnx.planning.widths import (
    fused_head_dim,
    kept_count,
    kept_width,
    paper_kept_channels,
    paper_kept_head_dims,
    tied_head_dims,
)

WIDTHS = st.integers(1, 8192)
RATIOS = st.decimals(0, "0.999999", places=6)
ALIGNS = st.sampled_from([1, 2, 3, 8, 16, 64])


@pytest.mark.parametrize(
    ("original", "ratio", "align", "kept"),
    [
        (64, "0.5", 8, 32),
        (64, "0.375", 8, 40),
        (64, "0.4375", 8, 40),  # 36 lies between 32 and 40: ties go up
        (64, "0.9", 8, 8),
        (64, "0.99", 8, 8),  # at least one multiple
        (20, "0", 8, 20),  # nothing removed, nothing rounded
        (17, "0", 8, 17),
        (17, "0.0001", 8, 16),
        (20, "0.05", 8, 16),
        (20, "0.9", 8, 8),
        (5, "0.5", 8, 5),  # one multiple would be more than there is
        (1280, "0.9", 1, 128),  # exact; double precision makes it 127.99999999999997
        (10, "0.35", 1, 7),  # 6.5, up
        (10, "0.3500000000000000000000000000001", 1, 6),  # a hair below 6.5
        (768, "0.1", 64, 704),
    ],
)
def test_kept_count_by_hand(original: int, ratio: str, align: int, kept: int) -> None:
    assert kept_count(original, Decimal(ratio), align) == kept


@given(original=WIDTHS, ratio=RATIOS, align=ALIGNS)
def test_kept_count_is_the_nearest_allowed_width(original: int, ratio: Decimal, align: int) -> None:
    kept = kept_count(original, ratio, align)
    if ratio == 0:
        assert kept == original
        return
    target = original * (1_000_000 - int(ratio * 1_000_000))  # exact, in millionths of a dimension
    below = target // (1_000_000 * align) * align
    above = below + align
    nearest = above if 1_000_000 * above - target <= target - 1_000_000 * below else below
    assert kept == min(max(nearest, align), original)


@given(original=WIDTHS, ratio=RATIOS, other=RATIOS, align=ALIGNS, floor=st.booleans())
def test_removing_more_never_keeps_more(original: int, ratio: Decimal, other: Decimal, align: int, floor: bool) -> None:
    low, high = sorted((ratio, other))
    assert kept_count(original, low, align, floor=floor) >= kept_count(original, high, align, floor=floor) >= 1


@given(original=WIDTHS, ratio=RATIOS, align=ALIGNS)
def test_floor_never_exceeds_the_target(original: int, ratio: Decimal, align: int) -> None:
    kept = kept_count(original, ratio, align, floor=True)
    assert kept <= original
    if kept > align:
        assert kept * 1_000_000 <= original * (1_000_000 - int(ratio * 1_000_000))


def test_paper_rules_differ_between_heads_and_channels() -> None:
    assert paper_kept_channels(1280, Decimal("0.9")) == 127
    assert paper_kept_channels(5120, Decimal("0.9")) == 511
    assert paper_kept_channels(3072, Decimal("0.5")) == 1536
    assert paper_kept_channels(3, Decimal("0.9")) == 1
    assert paper_kept_head_dims(80, Decimal("0.9")) == 8
    assert paper_kept_head_dims(64, Decimal("0.9")) == 6
    assert paper_kept_head_dims(32, Decimal("0.9")) == 3
    assert paper_kept_head_dims(4, Decimal("0.9")) == 1


@given(width=WIDTHS, percent=st.integers(0, 99))
def test_paper_rules_stay_within_one_of_the_exact_floor(width: int, percent: int) -> None:
    ratio = Decimal(percent) / 100
    exact = max(1, width * (100 - percent) // 100)
    assert paper_kept_head_dims(width, ratio) == exact
    assert paper_kept_channels(width, ratio) in (exact - 1, exact, exact + 1)


def test_kept_width_picks_the_rule_of_the_file() -> None:
    ratio = Decimal("0.9")
    assert kept_width("width", 1280, ratio, align=8) == 128
    assert kept_width("width", 1280, ratio, align=1, rounding="paper") == 127
    assert kept_width("head_dim", 80, ratio, align=1, rounding="paper") == 8
    with pytest.raises(ValueError, match="align must be 1"):
        kept_width("width", 1280, ratio, align=8, rounding="paper")


@pytest.mark.parametrize(("original", "ratio", "align"), [(0, "0.5", 8), (64, "1", 8), (64, "-0.1", 8), (64, "0.5", 0)])
def test_arguments_out_of_range_are_refused(original: int, ratio: str, align: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        kept_count(original, Decimal(ratio), align)


@pytest.mark.parametrize(("size", "fused"), [(1, 16), (16, 16), (17, 24), (48, 48), (250, 256), (257, None)])
def test_the_next_head_size_of_a_fused_kernel(size: int, fused: int | None) -> None:
    assert fused_head_dim(size) == fused


@given(st.integers(1, 320), st.data())
def test_tied_widths_are_the_least_that_fuse_and_hold_both_wishes(dense: int, data: st.DataObject) -> None:
    wishes = data.draw(st.tuples(st.integers(1, dense), st.integers(1, dense)))
    qk, vo = tied_head_dims((dense, dense), wishes)
    sizes = {s for s in range(1, dense) if s % 8 == 0 and 16 <= s <= 256} | {dense}
    if max(wishes) > 256:
        assert (qk, vo) == wishes  # no kernel is as wide
    else:
        assert qk == vo == min(s for s in sizes if s >= max(wishes))


@pytest.mark.parametrize("kept", [(0, 8), (8, 65), (65, 8)])
def test_ties_refuse_widths_that_are_none(kept: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a kept width must be from 1 to 64"):
        tied_head_dims((64, 64), kept)


def test_heads_uneven_from_the_start_are_not_tied() -> None:
    assert tied_head_dims((16, 32), (8, 16)) == (8, 16)
