"""Merged graphs: the averaging twin across the zoo, a reference in PyTorch, and what the proof catches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests import zoo
from tests.pruning import UNEVEN, look, prune_file, run, worst
from tests.tokens import torch_merging as reference
from toast_onnx.errors import ConfigError, MatchError, TwinError
from toast_onnx.matching.study import study
from toast_onnx.model import Model, save_model
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.proof.inputs import twin_inputs
from toast_onnx.tokens import nodes
from toast_onnx.tokens.metrics import METRICS
from toast_onnx.tokens.points import study_tokens
from toast_onnx.tokens.rewrite import WrittenMerge, write_merging
from toast_onnx.tokens.twin import compose, prove_merging

Exported = Callable[[zoo.Case], Path]

#: family -> (tokens, learned tokens in front, whether the last block reads these alone)
MERGEABLE = {
    "timm-vit": (17, 1, True),
    "timm-vit-unfused": (17, 1, True),
    "timm-deit-distilled": (18, 2, True),
    "timm-mae-finetuned": (17, 1, False),
    "timm-clip": (17, 1, True),
    "timm-siglip": (16, 0, False),
    "timm-dinov2-registers": (30, 5, True),
    "hf-vit": (17, 1, False),
    "hf-vit-eager": (17, 1, False),
    "hf-dinov2": (26, 1, False),
    "hf-clip": (17, 1, False),
    "torchvision-vit": (17, 1, True),
}
FAST = {
    ("timm-vit", "torchscript-17"),
    ("hf-dinov2", "torchscript-17"),
    ("timm-deit-distilled", "torchscript-17"),
    ("torchvision-vit", "torchscript-17"),
    ("hf-vit", "dynamo-23"),
}
CASES = [
    pytest.param(
        family, exporter, id=f"{family}-{exporter}", marks=() if (family, exporter) in FAST else pytest.mark.slow
    )
    for family in MERGEABLE
    for exporter in ("torchscript-17", "dynamo-18", "dynamo-20", "dynamo-23")
    if exporter in ("torchscript-17", "dynamo-23") or family in ("timm-vit", "timm-deit-distilled", "hf-dinov2")
]
AFTERMATHS = [
    pytest.param(name, marks=() if name == "onnxsim" else pytest.mark.slow)
    for name in ("onnxsim", "onnxslim", "ort-basic", "fp16", "constants", "external")
]


def merge_file(
    path: Path, removed: int, out: Path, metric: str = "auto"
) -> tuple[Any, Model, tuple[WrittenMerge, ...]]:
    """Merge some tokens in every block that can."""
    dense = look(path)
    tokens = study_tokens(dense)
    merged, merges = write_merging(dense, tokens, dict.fromkeys(tokens.mergeable, removed), metric)
    save_model(merged, out)
    return dense, merged, merges


@pytest.mark.parametrize(("family", "exporter"), CASES)
def test_merged_families_agree_with_their_twin(family: str, exporter: str, exported: Exported, tmp_path: Path) -> None:
    count, special, unread = MERGEABLE[family]
    path = exported(zoo.Case(family, exporter))
    dense, merged, merges = merge_file(path, 2, tmp_path / "merged.onnx")
    sequence = merges[0].sequence
    assert (sequence.count, sequence.front, sequence.back) == (count, special, 0)
    assert any(m.matched is None for m in merges) == unread
    proof = prove_merging(dense, merged, merges, twin_inputs(dense))
    assert proof.worst < 1e-5
    assert proof.choices > 0
    assert proof.batches == (1, 3)
    after = look(tmp_path / "merged.onnx")
    assert graph_macs(after.view, after.counted) < graph_macs(dense.view, dense.counted)


@pytest.mark.parametrize("family", ["hf-vit", "timm-siglip"])
def test_all_that_may_go_goes_at_once(family: str, exported: Exported) -> None:
    dense = look(exported(zoo.Case(family)))
    merged, merges = write_merging(dense, study_tokens(dense), {0: 8}, "auto")
    assert merges[0].counts.kept == 0
    assert prove_merging(dense, merged, merges, twin_inputs(dense)).worst < 1e-5


@pytest.mark.parametrize("after", AFTERMATHS)
def test_optimized_graphs_merge(after: str, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-deit-distilled", after=after))
    dense, merged, merges = merge_file(path, 3, tmp_path / "merged.onnx")
    assert prove_merging(dense, merged, merges, twin_inputs(dense)).worst < 1e-5


@pytest.mark.parametrize("metric", [pytest.param(m, marks=() if m == "tokens" else pytest.mark.slow) for m in METRICS])
def test_every_metric_chooses_what_the_twin_finds_best(metric: str, exported: Exported, tmp_path: Path) -> None:
    dense, merged, merges = merge_file(exported(zoo.Case("timm-deit")), 3, tmp_path / "merged.onnx", metric)
    assert {m.features.metric.name for m in merges if m.features is not None} == {metric}
    assert prove_merging(dense, merged, merges, twin_inputs(dense)).furthest < 1e-6


@pytest.mark.parametrize(
    ("metric", "rule"), [("attended-keys", reference.ATTENDED), ("keys", reference.PLAIN)], ids=["attended", "tome"]
)
def test_a_merged_graph_is_the_merged_module(metric: str, rule: reference.Rule, tmp_path: Path) -> None:
    subject = zoo.build("timm-deit")
    module = subject.module
    path = zoo.export(zoo.Case("timm-deit"))
    _, _, _ = merge_file(path, 3, tmp_path / "merged.onnx", metric)
    feeds = zoo.inputs(path, 3)
    images = torch.from_numpy(next(iter(feeds.values())))
    inner = module.model if hasattr(module, "model") else module
    counts = [3, 3, 0]  # what the last block merges nothing reads
    with torch.no_grad():
        expected = reference.merged_logits(inner.double(), images.double(), counts, rule).numpy()
    assert worst(run(tmp_path / "merged.onnx", feeds)[:1], [expected]) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif("TOAST_DATA" not in os.environ, reason="needs TOAST_DATA with the weights of DeiT-Tiny")
def test_trained_weights_merge_as_the_module_does(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("deit-tiny-real"))
    merge_file(path, 8, tmp_path / "merged.onnx", "keys")
    inner = zoo.build("deit-tiny-real").module
    inner = inner.model if hasattr(inner, "model") else inner
    feeds = zoo.inputs(path, 2)
    images = torch.from_numpy(next(iter(feeds.values())))
    with torch.no_grad():
        expected = reference.merged_logits(inner.double(), images.double(), [8] * 11 + [0], reference.PLAIN).numpy()
    assert worst(run(tmp_path / "merged.onnx", feeds)[:1], [expected]) < 1e-4


def test_tokens_that_nothing_reads_go_without_a_trace(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-deit-distilled"))
    dense = look(path)
    tokens = study_tokens(dense)
    model, merges = write_merging(dense, tokens, {1: 1}, "auto")  # the last block: dropping replaces its merge
    save_model(model, tmp_path / "dropped.onnx")
    assert [m.matched for m in merges] == [None]
    feeds = zoo.inputs(path, 3)
    assert worst(run(tmp_path / "dropped.onnx", feeds), run(path, feeds)) < 1e-5


def test_no_merging_is_the_same_file(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    prune_file(path, UNEVEN, tmp_path / "plain.onnx")
    prune_file(path, UNEVEN | {"tokens": {"merge": 0}}, tmp_path / "zero.onnx")
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "zero.onnx").read_bytes()


@pytest.mark.parametrize("family", ["timm-vit", pytest.param("hf-vit", marks=pytest.mark.slow)])
def test_widths_and_tokens_in_one_run(family: str, exported: Exported, tmp_path: Path) -> None:
    _, pruned = prune_file(exported(zoo.Case(family)), UNEVEN | {"tokens": {"merge": 0.2}}, tmp_path / "both.onnx")
    assert pruned.twin is not None
    assert pruned.merging is not None
    assert max(pruned.twin.worst, pruned.merging.worst) < 1e-4
    assert pruned.merges[0].counts.removed == 3  # 0.2 of 17, rounded


def test_heads_go_with_tokens(exported: Exported, tmp_path: Path) -> None:
    ratios = {"version": 1, "attention": {"heads": 0.34, "qk": 0.25}, "tokens": {"merge": 0.1}}
    _, pruned = prune_file(exported(zoo.Case("timm-vit")), ratios, tmp_path / "both.onnx")
    assert pruned.merging is not None
    assert pruned.merging.worst < 1e-4


@pytest.mark.slow
def test_bases_of_their_own_for_every_head_go_with_tokens(exported: Exported, tmp_path: Path) -> None:
    ratios = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5, "select": "subspace"}, "tokens": {"merge": 0.1}}
    for family in ("timm-vit", "timm-mae-finetuned"):
        _, pruned = prune_file(exported(zoo.Case(family)), ratios, tmp_path / "both.onnx")
        assert pruned.merging is not None
        assert pruned.merging.worst < 1e-4


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("timm-swin", "grid"),
        pytest.param("timm-beit", "entry for every token|position bias", marks=pytest.mark.slow),
        pytest.param("timm-eva02", "every token|entry", marks=pytest.mark.slow),
        pytest.param("hf-vitdet", "grid|every token|window|regroups|size", marks=pytest.mark.slow),
    ],
)
def test_windows_and_tables_are_declined_with_the_reason(family: str, reason: str, exported: Exported) -> None:
    dense = look(exported(zoo.Case(family)))
    tokens = study_tokens(dense)
    assert tokens.mergeable == ()
    for point in tokens.points:
        assert point.reason is not None
    ratios = {"version": 1, "tokens": {"merge": 0.1}}
    with pytest.raises(MatchError, match=f"tokens cannot be merged in this model: .*({reason})"):
        prune_file(exported(zoo.Case(family)), ratios)


def test_one_block_that_cannot_merge_is_named(exported: Exported) -> None:
    path = exported(zoo.Case("timm-siglip"))
    for document in ({"tokens": {"merge": [0, 0, 0.1]}}, {"blocks": {2: {"tokens": {"merge": 0.1}}}}):
        with pytest.raises(MatchError, match="behind block 2: nothing is added"):
            prune_file(path, {"version": 1} | document)


@pytest.mark.parametrize(
    ("document", "counts"),
    [
        ({"blocks": {1: {"tokens": {"merge": 0.2}}}}, {1: 3}),
        ({"tokens": {"merge": 0.1}, "blocks": {0: {"tokens": {"merge": 0}}}}, {1: 2}),
        ({"tokens": {"merge": [0.2, 0, 0]}, "blocks": {"*blocks.0*": {"tokens": {"merge": 0.1}}}}, {0: 2}),
        ({"tokens": {"merge": 0.1}, "blocks": {"*": {"tokens": {"merge": 0.2}}, 1: {"ffn": {"fc2": 0}}}}, {0: 3, 1: 3}),
    ],
)
def test_a_block_may_have_a_share_of_its_own(
    document: dict[str, Any], counts: dict[int, int], exported: Exported
) -> None:
    """Of 17 tokens, rounded; the last block drops what nothing reads, which is no share."""
    _, pruned = prune_file(exported(zoo.Case("timm-deit")), {"version": 1} | document)
    assert {m.block: m.counts.removed for m in pruned.merges if m.matched is not None} == counts


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"merge": 1.5}, "tokens.merge"),
        ({"merge": "a"}, "tokens.merge"),
        ({"metric": "cosine"}, "choose one of: auto, keys"),
        ({"merging": 0.1}, "unknown key 'merging'"),
    ],
)
def test_settings_are_read_strictly(tokens: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_ratios({"version": 1, "tokens": tokens})


@pytest.mark.parametrize(
    ("own", "message"),
    [({"merge": [0.1, 0.2]}, "give one number"), ({"metric": "keys"}, "unknown key 'metric'"), (0.1, "is 0.1")],
)
def test_shares_of_single_blocks_are_read_strictly(own: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_ratios({"version": 1, "blocks": {0: {"tokens": own}}})


# --- what the proof catches: each of these is a way to write a wrong graph ---


def _without_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that does not know the sizes."""
    from toast_onnx.tokens import rewrite

    monkeypatch.setattr(rewrite._Sequence, "_sized", lambda self, i, node: None)


def _plain_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of merged tokens that do not count how many each stands for."""
    original = nodes.write_merge

    def unweighted(w: Any, x: str, size: str, matched: Any, merge: Any) -> tuple[str, str]:
        return original(w, x, w.one("Div", [size, size]), matched, merge)

    monkeypatch.setattr("toast_onnx.tokens.rewrite.write_merge", unweighted)


def _half_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that are alike in eight channels only."""
    original = nodes.write_match

    def masked(w: Any, metric: str, merge: Any, weights: str | None) -> Any:
        seen = w.edit.constant(f"{w.name}/seen", np.float32([1] * 8 + [0] * 184))
        return original(w, w.one("Mul", [metric, seen]), merge, weights)

    monkeypatch.setattr("toast_onnx.tokens.rewrite.write_match", masked)


def _wrong_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens given back at the wrong places."""
    original = nodes.write_places

    def shifted(w: Any, matched: Any, merge: Any, before: str | None) -> str:
        return w.one("Max", [original(w, matched, merge, before), w.numbers([3], "three")])

    monkeypatch.setattr("toast_onnx.tokens.rewrite.write_places", shifted)


@pytest.mark.parametrize(
    ("fault", "family"),
    [
        (_without_sizes, "timm-deit"),
        (_plain_mean, "timm-deit"),
        (_half_blind, "timm-deit"),
        (_wrong_places, "hf-vit"),
    ],
)
def test_a_wrong_graph_does_not_pass(
    fault: Callable[[pytest.MonkeyPatch], None],
    family: str,
    monkeypatch: pytest.MonkeyPatch,
    exported: Exported,
    tmp_path: Path,
) -> None:
    fault(monkeypatch)
    dense, merged, merges = merge_file(exported(zoo.Case(family)), 4, tmp_path / "wrong.onnx", "keys-by-head")
    with pytest.raises(TwinError):
        prove_merging(dense, merged, merges, twin_inputs(dense))


def test_a_mean_that_forgets_sizes_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, exported: Exported, tmp_path: Path
) -> None:
    from toast_onnx.tokens import rewrite

    monkeypatch.setattr(rewrite._Sequence, "_weighted", lambda self, i, node: None)
    dense, merged, merges = merge_file(exported(zoo.Case("timm-mae-finetuned")), 4, tmp_path / "wrong.onnx")
    with pytest.raises(TwinError, match="output"):
        prove_merging(dense, merged, merges, twin_inputs(dense))


def test_choices_that_lose_a_token_are_refused(exported: Exported, tmp_path: Path) -> None:
    _, _, merges = merge_file(exported(zoo.Case("timm-deit")), 2, tmp_path / "merged.onnx")
    first = next(m for m in merges if m.matched is not None)
    gone, stays, into = first.matched.names if first.matched is not None else ("", "", "")
    made = {gone: np.array([[0, 1]]), stays: np.array([[0, 2, 3, 4, 5, 6]]), into: np.array([[0, 0]])}
    with pytest.raises(TwinError, match="takes a token twice"):
        compose([first], made)


def test_shapes_that_are_read_stay_what_they_were(exported: Exported, tmp_path: Path) -> None:
    """No Shape node of a merged graph tells another number of tokens than before."""
    path = exported(zoo.Case("timm-vit"))
    merge_file(path, 2, tmp_path / "merged.onnx")
    model = onnx.load(str(tmp_path / "merged.onnx"))
    onnx.checker.check_model(model, full_check=True)
    again = study(look(tmp_path / "merged.onnx").view.model)
    assert len(again.match.blocks) == len(look(path).match.blocks)


@pytest.mark.parametrize("metric", ["attended-keys", pytest.param("keys", marks=pytest.mark.slow)])
def test_tensorrt_rtx_builds_merged_graphs(metric: str, exported: Exported, tmp_path: Path) -> None:
    """TensorRT refuses graphs whose packed layer is read by the matching, too; operands of the attention it takes."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from toast_onnx.engines.build import BuildRequest, build

    _, _, merges = merge_file(exported(zoo.Case("timm-deit")), 3, tmp_path / "merged.onnx", metric)
    assert any(m.matched is not None for m in merges)
    request = BuildRequest(backend="tensorrt-rtx", precision="fp16", batch=(1, 8, 32))
    build(tmp_path / "merged.onnx", tmp_path / "merged.engine", request)
    assert (tmp_path / "merged.engine").stat().st_size > 0
