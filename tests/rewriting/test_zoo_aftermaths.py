"""What people do to an export first: simplifiers, ONNX Runtime's optimizer, half precision. All blocks are still found,
the twin passes, and planted dead dimensions go without a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import zoo
from tests.pruning import UNEVEN, prune_file, run, worst
from tests.rewriting.test_zoo_twin import TRUE_RANK

Exported = Callable[[zoo.Case], Path]

FAMILIES = ("timm-vit", "hf-vit", "hf-swin", "timm-swinv2", "hf-dinov2", "hf-bert")
AFTERMATHS = ("onnxsim", "onnxslim", "ort-basic", "ort-extended", "fp16", "external")
CASES = [
    pytest.param(
        case, id=f"{family}/{after}", marks=() if (family, after) == ("timm-vit", "onnxsim") else pytest.mark.slow
    )
    for family in FAMILIES
    for after in AFTERMATHS
    for case in [zoo.Case(family, after=after)]
]
#: After dynamo, onnxsim leaves the biases of Q, K and V behind a Split.
CASES += [
    pytest.param(zoo.Case(family, "dynamo-20", after="onnxsim"), id=f"{family}/dynamo/onnxsim", marks=pytest.mark.slow)
    for family in ("hf-dinov2-registers", "timm-eva02-base", "hf-vit")
]
#: ONNX Runtime moves the transposes around mixed heads through the Softmax.
CASES += [pytest.param(zoo.Case("timm-cait", after="ort-basic"), id="timm-cait/ort-basic", marks=pytest.mark.slow)]
#: Largest change of an output, as a fraction of its scale, that planted dimensions may leave: rounding.
ROUNDING = {"fp16": 1e-2}


@pytest.mark.parametrize("case", CASES)
def test_found_proven_and_planted(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    dense, pruned = prune_file(exported(case), UNEVEN)
    expected = zoo.expected(case.family)
    blocks = dense.match.blocks
    assert [b.attention.num_heads for b in blocks if b.attention] == [a.heads for a in expected.attentions]
    assert [b.ffn.width for b in blocks if b.ffn] == [f.width for f in expected.ffns]
    assert all(b.attention.qk_reason is b.attention.vo_reason is None for b in blocks if b.attention)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4

    planted, out = exported(dataclasses.replace(case, planted=True)), tmp_path / "pruned.onnx"
    prune_file(planted, TRUE_RANK, out, check=False)
    for batch in (1, 3):
        feeds = zoo.inputs(planted, batch)
        assert worst(run(out, feeds), run(planted, feeds)) < ROUNDING.get(case.after, 1e-4)
