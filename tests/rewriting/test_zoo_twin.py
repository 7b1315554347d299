"""Every family and exporter of the zoo: all blocks found, the twin passes, planted dead dimensions change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import zoo
from tests.pruning import UNEVEN, look, prune_file, run, worst
from tests.test_zoo import CHOSEN, FAST, WIDER

Exported = Callable[[zoo.Case], Path]

CASES = [pytest.param(c, id=c.id, marks=() if c in FAST else pytest.mark.slow) for c in CHOSEN]
PLANTED = [
    pytest.param(
        zoo.Case(c.family, c.exporter, c.batch, planted=True),
        id=c.id,
        marks=() if c in FAST and c.exporter.startswith("torchscript") else pytest.mark.slow,
    )
    for c in CHOSEN
    # where dead dimensions lie is the module's matter; who exported it has been seen above
    if c.batch == "dynamic" and (c in FAST or c.exporter in ("torchscript-17", "dynamo-20"))
]
#: The planted dimensions are half of each head and half of the hidden units.
TRUE_RANK = {
    "version": 1,
    "attention": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "l2"},
    "ffn": {"fc2": 0.5, "score": "l2"},
    "align": 1,
    "compensation": {"kind": "none"},
}


WIDER_CASES = [
    pytest.param(c, id=c.id, marks=() if c.family in ("timm-beit", "torchvision-vit", "hf-bert") else pytest.mark.slow)
    for c in WIDER
]


@pytest.mark.parametrize("case", WIDER_CASES)
def test_wider_families_match_and_pass_the_twin(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    path = exported(case)
    dense, pruned = prune_file(path, UNEVEN, tmp_path / "pruned.onnx", skip_unprunable=True)
    expected = zoo.expected(case.family)
    blocks = dense.match.blocks
    assert sum(b.attention is not None for b in blocks) == len(expected.attentions)
    assert sum(b.ffn is not None for b in blocks) == len(expected.ffns)
    attentions = [b.attention for b in blocks if b.attention is not None]
    assert {(a.qk_reason, a.vo_reason) for a in attentions} <= {(None, None)}
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4


@pytest.mark.parametrize("case", WIDER_CASES)
def test_wider_families_lose_planted_dimensions_without_a_trace(
    case: zoo.Case, exported: Exported, tmp_path: Path
) -> None:
    path = exported(zoo.Case(case.family, case.exporter, case.batch, planted=True))
    prune_file(path, TRUE_RANK, tmp_path / "pruned.onnx", check=False, skip_unprunable=True)
    for batch in (1, 3) if case.batch == "dynamic" else (1,):
        feeds = zoo.inputs(path, batch)
        assert worst(run(tmp_path / "pruned.onnx", feeds), run(path, feeds)) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_those_of_the_module(case: zoo.Case, exported: Exported) -> None:
    found = look(exported(case)).match
    expected = zoo.expected(case.family)
    attentions = [b.attention for b in found.blocks if b.attention is not None]
    ffns = [b.ffn for b in found.blocks if b.ffn is not None]
    assert found.declined == {}
    assert [(a.num_heads, a.qk_dim, a.vo_dim, a.qk_reason, a.vo_reason) for a in attentions] == [
        (a.heads, a.head_dim, a.head_dim, None, None) for a in expected.attentions
    ]
    assert [(f.in_features, f.width, f.gated, f.fc1_reason, f.fc2_reason) for f in ffns] == [
        (f.in_features, f.width, f.gated, None, None) for f in expected.ffns
    ]
    assert len(found.blocks) == len(attentions)


@pytest.mark.parametrize("case", CASES)
def test_twin_passes_with_different_widths_for_q_and_v(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    _, pruned = prune_file(exported(case), UNEVEN, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert pruned.twin.batches == ((1, 3) if case.batch == "dynamic" else (1,))
    assert pruned.twin.worst < 1e-4
    for attention in (b.attention for b in look(tmp_path / "pruned.onnx").match.blocks):
        assert attention is not None
        assert attention.vo_dim > attention.qk_dim


@pytest.mark.parametrize("case", PLANTED)
def test_planted_dead_dimensions_go_without_a_trace(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    """A proof that shares nothing with the twin: the dimensions are dead in the PyTorch module itself."""
    path = exported(case)
    prune_file(path, TRUE_RANK, tmp_path / "pruned.onnx", check=False)
    for batch in (1, 3) if case.batch == "dynamic" else (1,):
        feeds = zoo.inputs(path, batch)
        assert worst(run(tmp_path / "pruned.onnx", feeds), run(path, feeds)) < 1e-4
