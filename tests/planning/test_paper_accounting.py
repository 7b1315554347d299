"""The counts against layers worked out here from the architectures' dimensions, and against the published totals."""

from __future__ import annotations

from decimal import Decimal

import pytest

from toast_onnx.planning.paper_accounting import BlockMacs, ModelMacs, paper_gmacs, static_gmacs, swin_macs, vit_macs


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return tokens * inputs * outputs


def test_vit_counts_layer_by_layer() -> None:
    macs = vit_macs(192, depth=12, heads=3, patch=16)
    block = macs.blocks[0]
    assert block.qkv == _linear(197, 192, 576)
    assert block.attention == 3 * (197 * 64 * 197 + 197 * 197 * 64)
    assert block.proj == _linear(197, 192, 192)
    assert block.fc1 == block.fc2 == _linear(197, 192, 768)
    assert (block.head_dim, block.width, block.hidden, len(macs.blocks)) == (64, 192, 768, 12)
    assert macs.rest == _linear(196, 768, 192) + _linear(1, 192, 1000)


def test_swin_counts_stage_by_stage() -> None:
    macs = swin_macs(96, (2, 2, 6, 2), (3, 6, 12, 24), patch=4, window=7)
    tokens, widths = (3136, 784, 196, 49), (96, 192, 384, 768)
    first_of_stage = [macs.blocks[index] for index in (0, 2, 4, 10)]
    for block, n, c in zip(first_of_stage, tokens, widths, strict=True):
        assert block.qkv == _linear(n, c, 3 * c)
        assert block.attention == n // 49 * 2 * 49 * 49 * c  # windows of 49 tokens, two products each
        assert block.fc2 == _linear(n, 4 * c, c)
        assert block.head_dim == 32
    merging = sum(_linear(n, 4 * c, 2 * c) for n, c in zip(tokens[1:], widths[:3], strict=True))
    assert macs.rest == _linear(3136, 48, 96) + merging + _linear(1, 768, 1000)


@pytest.mark.parametrize(
    ("macs", "gmacs"),
    [
        (vit_macs(192, 12, 3, 16), 1.254),
        (vit_macs(384, 12, 6, 16), 4.599),
        (vit_macs(768, 12, 12, 16), 17.564),
        (vit_macs(1024, 24, 16, 16), 61.555),
        (vit_macs(1280, 32, 16, 14), 167.296),
        (swin_macs(96, (2, 2, 6, 2), (3, 6, 12, 24), 4, 7), 4.491),
        (swin_macs(96, (2, 2, 18, 2), (3, 6, 12, 24), 4, 7), 8.741),
        (swin_macs(128, (2, 2, 18, 2), (4, 8, 16, 32), 4, 7), 15.431),
    ],
)
def test_dense_totals_are_the_published_ones(macs: ModelMacs, gmacs: float) -> None:
    assert macs.total / 1e9 == pytest.approx(gmacs, rel=1e-3)


# One token, one head of 10 dimensions, embedding 10, hidden 40.
TINY = ModelMacs(
    (BlockMacs(qkv=300, attention=20, proj=100, fc1=400, fc2=400, head_dim=10, width=10, hidden=40),), 1000
)


def _schedule(*ratios: str) -> tuple[list[Decimal], ...]:
    return tuple([Decimal(ratio)] for ratio in ratios)


def test_both_ways_of_counting_by_hand() -> None:
    head, fc1, fc2 = _schedule("0.5", "0.5", "0.75")
    # attention (300 + 20 + 100) x 5/10
    assert paper_gmacs(TINY, head, fc1, fc2) == pytest.approx((1000 + 210 + 400 * 0.5 + 400 * 0.25) / 1e9)
    # fc1 becomes 5 x 10, fc2 10 x 10
    assert static_gmacs(TINY, head, fc1, fc2) == pytest.approx((1000 + 210 + 5 * 10 + 10 * 10) / 1e9)


def test_a_schedule_of_zeros_counts_the_dense_model() -> None:
    zeros = _schedule("0", "0", "0")
    assert paper_gmacs(TINY, *zeros) == static_gmacs(TINY, *zeros) == TINY.total / 1e9


def test_static_counts_whole_channels_and_the_paper_fractions() -> None:
    head, fc1, fc2 = _schedule("0", "0", "0.99")  # 0.4 of a channel; one stays
    assert paper_gmacs(TINY, head, fc1, fc2) == pytest.approx((1000 + 420 + 400 + 4) / 1e9)
    assert static_gmacs(TINY, head, fc1, fc2) == pytest.approx((1000 + 420 + 10 + 10) / 1e9)


def test_a_schedule_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paper_gmacs(TINY, *_schedule("0", "0"), [Decimal(0)] * 2)
