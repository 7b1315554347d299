"""Channels chosen while the graph runs, among tokens that were merged: against PyTorch in float64, and the proof."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tests.pace import mostly_slow
from tests.pruning import worst
from tests.selection import masked_form
from tests.selection.test_runtime_tcs import images, prune_at_run_time, ratios, run_and_choose
from tests.tokens import torch_merging
from toast_onnx.errors import TwinError
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import Pruned
from toast_onnx.selection import nodes
from toast_onnx.selection.plan import among_merged

Exported = Callable[[zoo.Case], Path]


def merged_ratios(**ffn: Any) -> dict[str, Any]:
    return ratios(**ffn) | {"tokens": {"merge": [0.2, 0.1, 0]}}


def reference(pruned: Pruned, x: np.ndarray, residual: str) -> tuple[np.ndarray, dict[tuple[int, str], np.ndarray]]:
    """Outputs and choices of a timm DeiT that merges and masks, in float64."""
    module = zoo.build("timm-deit").module.double()
    counts = {m.block: m.counts.removed for m in pruned.merges if m.matched is not None}
    kept = {(s.block, s.part): s.kept for s in pruned.selections}
    # Behind the last attention nothing but the class token is read, so it alone is scored.
    tokens = {(s.block, s.part): np.asarray([0]) if s.tokens is None else s.tokens for s in pruned.selections}
    alone = {s.block for s in pruned.selections if s.tokens is None}
    masked = masked_form.Masked(kept, tokens, residual)
    with torch.no_grad():
        stream = module.norm_pre(module._pos_embed(module.patch_embed(torch.from_numpy(x).double())))
        sizes = stream.new_ones(stream.shape[:2])
        for number, block in enumerate(module.blocks):
            stream, sizes, row = _attended(block, stream, sizes, counts.get(number, 0))
            stream = masked.network(block, number, stream, None if number in alone else row, block.ls2)
        return module.head(module.fc_norm(module.norm(stream)[:, 0])).numpy(), masked.chosen


def _attended(block: nn.Module, x: Tensor, sizes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A block's first half and its merge: tokens, sizes, and the class token's attention to each (batch, tokens)."""
    attention = block.attn
    packed = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1))
    queries, keys, values = packed.permute(2, 0, 3, 1, 4)
    queries = queries * attention.scale
    row = ((queries[:, :, :1] @ keys.mT).squeeze(2) + sizes.log()[:, None]).softmax(-1).mean(1)
    x = x + block.ls1(attention.proj(torch_merging.attend(queries, keys, values, sizes)))
    if not count:
        return x, sizes, row
    weights = torch_merging.class_weights(queries, keys, sizes)
    matches = torch_merging.match(torch_merging.pair_scores(torch_merging.all_keys(keys), weights, 1), count)
    means, members = torch_merging.merge(row[..., None], torch.ones_like(row), matches, 1)
    return *torch_merging.merge(x, sizes, matches, 1), means[..., 0] * members


@pytest.mark.parametrize("residual", mostly_slow(["masked", "kept"], "masked".__eq__))
def test_equals_merging_and_masking_in_pytorch(residual: str, exported: Exported, tmp_path: Path) -> None:
    _, pruned = prune_at_run_time(exported(zoo.Case("timm-deit")), merged_ratios(residual=residual, tokens="all"))
    scored = {s.block: (s.patches, s.merge is not None) for s in pruned.selections}
    assert scored == {1: (16 - 3 - 2, True), 2: (0, False)}
    x = images(64)
    ours, ours_kept = run_and_choose(pruned, x, tmp_path)
    theirs, theirs_kept = reference(pruned, x, residual)
    assert worst([ours], [theirs]) < 1e-4
    assert {key: list(value) for key, value in ours_kept.items()} == {k: list(v) for k, v in theirs_kept.items()}


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        [
            zoo.Case("timm-deit", "dynamo-20"),
            zoo.Case("timm-deit", after="fp16"),
            zoo.Case("timm-deit-distilled"),
            zoo.Case("timm-mae-finetuned"),
            zoo.Case("timm-vit", batch="static"),
            zoo.Case("hf-vit"),
        ],
        lambda c: c.family == "timm-mae-finetuned",
        lambda c: c.id,
    ),
)
def test_widths_tokens_and_choices_in_one_run(case: zoo.Case, exported: Exported) -> None:
    document = ratios() | {"attention": {"qk": 0.5, "vo": 0.25}, "tokens": {"merge": 0.1}}
    _, pruned = prune_at_run_time(exported(case), document)
    assert pruned.twin is not None
    assert pruned.merging is not None
    assert max(pruned.twin.worst, pruned.merging.worst) < 1e-4
    assert pruned.selections
    assert pruned.merges


def test_attention_given_to_the_wrong_tokens_is_seen(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are computed anew from the graph's own merges, not from what it made of the attention."""
    right = nodes.write_sums

    def turned(w: Any, total: str, *rest: Any) -> str:
        once = right(w, total, *rest)
        return w.one("Concat", [w.slice(once, 1, 1), w.slice(once, 1, 0, 1)], "turned", axis=1)

    path = exported(zoo.Case("timm-deit"))
    document = merged_ratios(tokens="all", residual="kept")
    prune_at_run_time(path, document)
    monkeypatch.setattr(nodes, "write_sums", turned)
    with pytest.raises(TwinError, match="the graph keeps a channel"):
        prune_at_run_time(path, document)


def test_a_network_that_has_all_tokens_is_scored_on_all(exported: Exported) -> None:
    """Beside an attention that merges, not behind it: as if the dense graph's networks stood there."""
    document = merged_ratios(tokens="all", residual="kept")
    dense, pruned = prune_at_run_time(exported(zoo.Case("timm-deit")), document, check=False)
    found = among_merged(dense, pruned.selections[:1], pruned.merges, parse_ratios(document), 0)
    assert (pruned.selections[0].merge is not None, pruned.selections[0].patches) == (True, 11)
    assert (found[0].merge, found[0].patches) == (None, 16)
