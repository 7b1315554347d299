"""The PyTorch reference of token merging: nothing merged is the plain model, sizes add up, alike tokens go first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tokens import torch_merging as reference
from tests.zoo.libraries import declare_torchvision_operators, image

RULES = {"plain": reference.PLAIN, "attended": reference.ATTENDED}


@pytest.fixture(scope="module")
def vit() -> Any:
    """A seeded Vision Transformer of two blocks on 7 x 7 patches."""
    declare_torchvision_operators()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 112, "depth": 2, "num_classes": 10}
    return timm.create_model("deit_tiny_patch16_224", pretrained=False, **options).double().eval()


@pytest.fixture(scope="module")
def distilled() -> Any:
    """The same with a distillation token beside the class token."""
    declare_torchvision_operators()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 112, "depth": 2, "num_classes": 10}
    return timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, **options).double().eval()


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_nothing_merged_is_the_plain_model(vit: Any, rule: str) -> None:
    images = image(112, 2).double()
    found = reference.merged_logits(vit, images, [0, 0], RULES[rule])
    torch.testing.assert_close(found, vit(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", ["vit", "distilled"])
@torch.no_grad()
def test_sizes_sum_to_the_tokens_and_special_tokens_stay(model: str, rule: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(model)
    special = module.num_prefix_tokens
    tokens, sizes = reference.merged_tokens(module, image(112, 2).double(), [20, 12], RULES[rule])
    assert tokens.shape[:2] == sizes.shape == (2, special + 49 - 32)
    assert (sizes[:, :special] == 1).all()
    assert (sizes.sum(dim=1) == special + 49).all()


@torch.no_grad()
def test_a_merge_keeps_the_weighted_sum_and_one_loop_finds_the_same_pairs() -> None:
    tokens, metric = _random(1, 24, 4), _random(1, 24, 3)
    sizes, weights = torch.arange(1.0, 25.0).double().unsqueeze(0), _random(1, 24).abs()
    matches = reference.match(reference.pair_scores(metric, weights, 1), 6)
    merged, counts = reference.merge(tokens, sizes, matches, 1)
    want = _by_loops(tokens[0], metric[0], weights[0], sizes[0], 6)
    torch.testing.assert_close(merged[0], want)
    assert counts.sum() == sizes.sum()


@torch.no_grad()
def test_equal_tokens_merge_without_changing_the_attention() -> None:
    queries, keys, values = (_random(1, 2, 6, 4).clone() for _ in range(3))
    keys[:, :, 5], values[:, :, 5] = keys[:, :, 4], values[:, :, 4]
    whole = reference.attend(queries, keys, values, torch.ones(1, 6).double())
    merged = reference.attend(
        queries, keys[:, :, :5], values[:, :, :5], torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0]]).double()
    )
    torch.testing.assert_close(whole, merged)


@torch.no_grad()
def test_weights_are_the_class_tokens_attention() -> None:
    queries, keys, sizes = (
        _random(1, 2, 5, 4),
        _random(1, 2, 5, 4) / 2,
        torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]]).double(),
    )
    copies = keys.repeat_interleave(sizes[0].long(), dim=2)
    share = (queries[0, :, 0].unsqueeze(1) * copies[0]).sum(dim=2).softmax(dim=1).mean(dim=0)
    want = torch.stack([part.sum() for part in share.split([int(s) for s in sizes[0]])])
    torch.testing.assert_close(reference.class_weights(queries, keys, sizes)[0], (5 * want).sqrt())


@torch.no_grad()
def test_equal_scores_go_to_the_lower_position() -> None:
    matches = reference.match(torch.zeros(1, 4, 4), 2)
    assert matches.sources.tolist() == [[0, 1]]
    assert matches.destinations.tolist() == [[0, 0]]
    assert matches.left.tolist() == [[2, 3]]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def _by_loops(tokens: Tensor, metric: Tensor, weights: Tensor, sizes: Tensor, count: int) -> Tensor:
    """(n, channels) tokens with one special token, merged one by one from the definition."""
    sources, destinations = range(2, len(tokens), 2), range(1, len(tokens), 2)
    best = []
    for i in sources:
        cost = [
            (1 - float(torch.cosine_similarity(metric[i], metric[j], dim=0))) / float(1 / weights[i] + 1 / weights[j])
            for j in destinations
        ]
        best.append((min(cost), i, destinations[cost.index(min(cost))]))
    chosen = {i: j for _, i, j in sorted(best)[:count]}
    left = [tokens[0]] + [tokens[i] for i in sources if i not in chosen]
    for j in destinations:
        members = [j] + [i for i, to in chosen.items() if to == j]
        left.append(sum(tokens[m] * sizes[m] for m in members) / sum(sizes[m] for m in members))
    return torch.stack(left)
