"""Steps of a run of pruning by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from toast_onnx.choosing.shared import Sharing
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import _Asked, _refined
from toast_onnx.solving.weights import BlockWeights, FfnWeights

ASKED = _Asked((), (), (), Sharing({}, {}, {}), (), ())


def weights(value: int) -> BlockWeights:
    return BlockWeights(None, FfnWeights(units=np.asarray([value])))


def corrected(given: Mapping[int, BlockWeights]) -> Any:
    return {index: weights(10 + index) for index in given}, ("said",)


@pytest.mark.parametrize(("kind", "refined"), [("ridge", True), ("local", True), ("bias", False), ("none", False)])
def test_weights_are_corrected_where_the_compensation_fits_means(kind: str, refined: bool) -> None:
    ratios = parse_ratios({"version": 1, "compensation": {"kind": kind}})
    old = {0: weights(0), 1: weights(1)}
    new, said = _refined(ratios, ASKED, old, corrected)
    assert said == (("said",) if refined else ())
    assert [int(w.ffn.units[0]) for w in new.values() if w.ffn and w.ffn.units is not None] == (
        [10, 11] if refined else [0, 1]
    )


def test_nothing_is_corrected_of_a_graph_that_selects_or_without_samples() -> None:
    ratios, old = parse_ratios({"version": 1}), {0: weights(0)}
    selecting: Any = replace(ASKED, selections=("a selection",))  # type: ignore[arg-type]
    assert _refined(ratios, selecting, old, corrected) == (old, ())
    assert _refined(ratios, ASKED, old, None) == (old, ())
    assert _refined(ratios, ASKED, {}, corrected) == ({}, ())
