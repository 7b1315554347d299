"""Multiply-accumulates of merged graphs, counted without writing them, against the counts of written ones."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from tests import zoo
from tests.pruning import look
from toast_onnx.matching.study import Study, study
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.merged_macs import MergedMacs
from toast_onnx.tokens.points import study_tokens
from toast_onnx.tokens.rewrite import write_merging
from toast_onnx.tokens.schedule import exact_shares, removed_counts

Exported = Callable[[zoo.Case], Path]
FAMILIES = ("timm-vit", "timm-deit-distilled", "timm-siglip", "hf-dinov2", "torchvision-vit")
FAST = {("timm-siglip", False), ("hf-dinov2", False), ("timm-deit-distilled", True)}
CASES = [
    pytest.param(name, unread, marks=() if (name, unread) in FAST else pytest.mark.slow)
    for name in FAMILIES
    for unread in (True, False)
]


def written(dense: Study, removed: dict[int, int], metric: str, unread: bool) -> int:
    model, _ = write_merging(dense, study_tokens(dense), removed, metric, unread)
    merged = study(model, dense.counted_shapes)
    return graph_macs(merged.view, merged.counted)


@pytest.mark.parametrize(("name", "unread"), CASES)
def test_counts_are_those_of_the_written_graph(name: str, unread: bool, exported: Exported) -> None:
    dense = look(exported(zoo.Case(name)))
    tokens = study_tokens(dense)
    metric = "auto" if name != "hf-dinov2" else "keys"
    macs = MergedMacs(dense, tokens, metric, unread)
    assert macs.total({}) == graph_macs(dense.view, dense.counted) == macs.dense
    for removed in (dict.fromkeys(macs.blocks, 2), {macs.blocks[0]: 3}):
        assert macs.total(removed) == written(dense, removed, metric, unread), removed
    every = dict.fromkeys(macs.blocks, 2)
    # halves are whole numbers only in the written graph
    assert macs.smooth(macs.shares(every)) == pytest.approx(macs.total(every), rel=1e-4)
    assert macs.whole(macs.shares(every)) == every


def test_whole_tokens_are_never_more_than_half(exported: Exported) -> None:
    dense = look(exported(zoo.Case("timm-vit")))
    macs = MergedMacs(dense, study_tokens(dense), "auto")
    assert macs.whole(np.full(len(macs.blocks), 0.5)) == {0: 8}  # of 16 tokens besides the class token


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_exact_shares_give_exact_counts(count: int, exported: Exported) -> None:
    tokens = study_tokens(look(exported(zoo.Case("timm-vit"))))
    shares = exact_shares(tokens, {0: count})
    assert shares[1] == 0
    assert removed_counts(tokens, shares) == {0: count}
    assert removed_counts(tokens, [Decimal(0)] * 2) == {}
