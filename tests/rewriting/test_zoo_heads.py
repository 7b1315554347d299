"""Whole heads out of every family and exporter of the zoo: the twin passes, or the heads are declined with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import zoo
from tests.pace import mostly_slow
from tests.pruning import look, prune_file, run, worst
from tests.test_zoo import FAST, SPREAD
from toast_onnx.reasons import Kind

Exported = Callable[[zoo.Case], Path]

#: Fewer heads with fewer dimensions each, everything by magnitude.
FEWER = {
    "version": 1,
    "attention": {"heads": 0.5, "qk": 0.5, "vo": 0.25, "select": "index", "score": "l2"},
    "ffn": {"fc2": 0.5, "score": "l2"},
    "align": 1,
    "compensation": {"kind": "none"},
}
#: Attentions that keep their heads, and why; all others lose half of them.
DECLINED = {
    # masks of cross-attention, predicted for every query and repeated for every head
    ("hf-mask2former", "dynamic"): {Kind.DYNAMIC: 2},
    **{
        (family, batch): {Kind.ONE_HEAD: 1}
        for family in ("timm-hiera", "hf-segformer")
        for batch in ("static", "dynamic")
    },
    **{
        (family, batch): {kind: 2}
        for family, kind in (
            ("timm-cait", Kind.MEET),
            ("kind-grouped-queries", Kind.GROUPED),
            ("kind-convolved-values", Kind.CONVOLVED),
        )
        for batch in ("static", "dynamic")
    },
    # queries that are pooled as an image, heads and dimensions being its channels
    **{("timm-sam2", batch): {Kind.ONE_HEAD: 1, Kind.UNKNOWN: 3} for batch in ("static", "dynamic")},
}
QUICK = {c for c in FAST if c.family in ("timm-vit", "hf-vit", "timm-swin", "hf-dinov2")}
CASES = [pytest.param(c, id=c.id, marks=() if c in QUICK else pytest.mark.slow) for c in SPREAD]


@pytest.mark.parametrize("case", CASES)
def test_half_of_the_heads_go_or_are_declined(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    dense, pruned = prune_file(exported(case), FEWER, tmp_path / "pruned.onnx", skip_unprunable=True)
    before = [b.attention for b in dense.match.blocks if b.attention is not None]
    after = [b.attention for b in look(tmp_path / "pruned.onnx").match.blocks if b.attention is not None]
    declined = Counter(a.heads_reason.kind for a in before if a.heads_reason)
    assert declined == DECLINED.get((case.family, case.batch), {})
    for old, new in zip(before, after, strict=True):
        stay = old.num_heads if old.heads_reason else -(-old.num_heads // 2)
        assert new.num_heads == stay
        if old.heads_reason is None:
            assert (new.qk_dim, new.vo_dim) < (old.qk_dim, old.vo_dim)
    assert pruned.twin is not None
    assert pruned.twin.batches == ((1, 3) if case.batch == "dynamic" else (1,))
    assert pruned.twin.worst < 1e-4


AFTERMATHS = [
    pytest.param(zoo.Case(family, after=after), id=f"{family}-{after}", marks=() if fast else pytest.mark.slow)
    for family, after, fast in (
        ("timm-vit", "ort-fused", True),
        ("timm-vit", "ort-fused-mha", True),
        ("hf-bert-eager", "ort-fused", True),
        ("hf-swin", "ort-fused", False),
        ("hf-swin", "ort-fused-mha", False),
        ("timm-swinv2", "fp16", False),
        ("timm-vit", "fp16", False),
    )
]


@pytest.mark.parametrize("case", AFTERMATHS)
def test_one_head_is_left_of_optimized_graphs(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    """A fused node names the number of heads itself, and may hold the position bias of all heads."""
    path = exported(case)
    one = FEWER | {"attention": FEWER["attention"] | {"heads": 0.9}}  # type: ignore[operator]
    dense, pruned = prune_file(path, one, tmp_path / "pruned.onnx")
    assert {a.num_heads for b in look(tmp_path / "pruned.onnx").match.blocks if (a := b.attention)} == {1}
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    kinds = [Counter(n.op_type for n in m.proto.graph.node if n.domain) for m in (dense.source, pruned.model)]
    assert kinds[0] == kinds[1]  # what was fused stays fused


@pytest.mark.parametrize("family", mostly_slow(["timm-vit", "torchvision-vit", "timm-swin"], "timm-vit".__eq__))
def test_dynamic_batch_and_image_size_stay(family: str, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case(family))
    prune_file(path, FEWER, tmp_path / "pruned.onnx", check=False)
    dense, small = look(path), look(tmp_path / "pruned.onnx")
    assert small.dynamic_batch
    assert [(i.name, str(i.type)) for i in dense.source.proto.graph.input] == [
        (i.name, str(i.type)) for i in small.source.proto.graph.input
    ]
    # items of a batch do not touch each other
    feeds = zoo.inputs(path, 5)
    together = run(tmp_path / "pruned.onnx", feeds)
    alone = run(tmp_path / "pruned.onnx", {name: array[3:4] for name, array in feeds.items()})
    assert worst([t[3:4] for t in together], alone) < 1e-5
