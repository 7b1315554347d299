"""Token merging on timm's Vision Transformers, written on its own in PyTorch: what a merged graph must compute.

Match, merge and attend are pure functions; nothing here comes from the library that the tests put beside it. Token
axes are split once a block: the special tokens in front stay, of the others every second one (the odd ones) is a source
and may merge, the rest are destinations. Behind a merge the order is special tokens, sources left over, destinations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: keys (batch, heads, tokens, width), sizes (batch, tokens) -> metric (batch, tokens, any)
Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """How pairs are scored.

    Args:
        metric: what alike is measured on, from the keys.
        attended: whether a pair's distance counts by v·w/(v+w) of both tokens' `class_weights`, so that what the class
            token reads merges late.
    """

    metric: Metric
    attended: bool


@dataclass(frozen=True)
class Matches:
    """Which sources merge into which destinations.

    Args:
        sources: (batch, r) positions among the sources, best pair first.
        destinations: (batch, r) positions among the destinations.
        left: (batch, sources - r) positions of the sources left over, in order.
    """

    sources: Tensor
    destinations: Tensor
    left: Tensor


def all_keys(keys: Tensor) -> Tensor:
    """(batch, heads, tokens, width) -> (batch, tokens, heads·width): keys of every head side by side."""
    return keys.transpose(1, 2).flatten(2)


def mean_key(keys: Tensor) -> Tensor:
    """(batch, heads, tokens, width) -> (batch, tokens, width): keys averaged over the heads."""
    return keys.mean(dim=1)


#: The published rule: cosine of the mean keys alone.
PLAIN = Rule(mean_key, attended=False)
#: The rule that measures best without training: cosine distance of all keys, weighted by the class token's attention.
ATTENDED = Rule(all_keys, attended=True)


def split(tokens: Tensor, special: int) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, special + n, ...) -> special tokens, the n // 2 sources, the n - n // 2 destinations."""
    others = tokens[:, special:]
    return tokens[:, :special], others[:, 1::2], others[:, 0::2]


def class_weights(queries: Tensor, keys: Tensor, sizes: Tensor) -> Tensor:
    """Root of the share of the first token's attention that each token gets, averaged over heads, times the tokens.

    Args:
        queries, keys: (batch, heads, tokens, width), queries scaled.
        sizes: (batch, tokens).

    Returns:
        (batch, tokens).
    """
    scores = (queries[:, :, :1] @ keys.transpose(2, 3)).squeeze(2) + sizes.log().unsqueeze(1)
    return (scores.softmax(dim=-1).mean(dim=1) * sizes.shape[1]).sqrt()


def pair_scores(metric: Tensor, weights: Tensor | None, special: int) -> Tensor:
    """The score of each pair, higher is merged earlier.

    Args:
        metric: (batch, tokens, any).
        weights: (batch, tokens), or None where all pairs count alike.

    Returns:
        (batch, sources, destinations): cos - 1.0001, times v·w/(v+w) of the two weights.
    """
    _, a, b = split(functional.normalize(metric, dim=-1), special)
    scores = a @ b.transpose(1, 2) - 1.0001  # above one: of equal pairs the smaller weights merge first
    if weights is None:
        return scores
    _, v, w = split(weights, special)
    v, w = v.unsqueeze(2), w.unsqueeze(1)
    return scores * (v * w / (v + w))


def match(scores: Tensor, count: int) -> Matches:
    """The `count` sources whose best destination scores highest; equal scores go to the lower position."""
    best, nearest = scores.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    sources, left = order[:, :count], order[:, count:].sort(dim=1).values
    return Matches(sources, nearest.gather(1, sources), left)


def merge(tokens: Tensor, sizes: Tensor, matches: Matches, special: int) -> tuple[Tensor, Tensor]:
    """Destinations become size-weighted means of themselves and what merges into them.

    Args:
        tokens: (batch, n, channels).
        sizes: (batch, n).

    Returns:
        (batch, n - r, channels) and (batch, n - r).
    """
    kept, a, b = split(torch.cat([tokens * sizes.unsqueeze(2), sizes.unsqueeze(2)], dim=2), special)
    moved = _take(a, matches.sources)
    sums = b.scatter_add(1, _wide(matches.destinations, b), moved)
    sums = torch.cat([kept, _take(a, matches.left), sums], dim=1)
    return sums[..., :-1] / sums[..., -1:], sums[..., -1]


def attend(queries: Tensor, keys: Tensor, values: Tensor, sizes: Tensor) -> Tensor:
    """Softmax attention in which a key of size s counts as s keys.

    Args:
        queries, keys, values: (batch, heads, tokens, width), queries scaled.
        sizes: (batch, tokens).

    Returns:
        (batch, tokens, heads·width).
    """
    scores = queries @ keys.transpose(2, 3) + sizes.log()[:, None, None, :]
    return (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)


def merged_block(
    block: Any, tokens: Tensor, sizes: Tensor, count: int, rule: Rule, special: int
) -> tuple[Tensor, Tensor]:
    """One pre-norm block of timm that merges `count` tokens between its attention and its feed-forward network.

    Args:
        tokens: (batch, n, channels).
        sizes: (batch, n).

    Returns:
        (batch, n - count, channels) and (batch, n - count).
    """
    attention = block.attn
    packed = attention.qkv(block.norm1(tokens)).unflatten(2, (3, attention.num_heads, -1))
    queries, keys, values = packed.permute(2, 0, 3, 1, 4)
    queries = queries * attention.scale
    mixed = attend(queries, keys, values, sizes)
    tokens = tokens + block.ls1(attention.proj(mixed))
    if count:
        weights = class_weights(queries, keys, sizes) if rule.attended else None
        scores = pair_scores(rule.metric(keys), weights, special)
        tokens, sizes = merge(tokens, sizes, match(scores, count), special)
    return tokens + block.ls2(block.mlp(block.norm2(tokens))), sizes


def merged_tokens(model: Any, images: Tensor, counts: Sequence[int], rule: Rule) -> tuple[Tensor, Tensor]:
    """(batch, 3, height, width) images -> (batch, n, channels) tokens behind the last norm, (batch, n) sizes."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    sizes = tokens.new_ones(tokens.shape[:2])
    for block, count in zip(model.blocks, counts, strict=True):
        tokens, sizes = merged_block(block, tokens, sizes, count, rule, model.num_prefix_tokens)
    return model.norm(tokens), sizes


def merged_logits(model: Any, images: Tensor, counts: Sequence[int], rule: Rule = ATTENDED) -> Tensor:
    """(batch, classes) scores of a timm Vision Transformer that reads its class token; `counts` are tokens a block."""
    tokens, _ = merged_tokens(model, images, counts, rule)
    return model.head(model.fc_norm(tokens[:, 0]))


def _wide(positions: Tensor, like: Tensor) -> Tensor:
    return positions.unsqueeze(2).expand(-1, -1, like.shape[2])


def _take(tokens: Tensor, positions: Tensor) -> Tensor:
    return tokens.gather(1, _wide(positions, tokens))
