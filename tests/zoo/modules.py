"""A module's attention and feed-forward parts as views of (head, dim) and hidden units; dead dimensions in them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.zoo.described import Attention, Ffn


def _linear(part: nn.Module, *names: str) -> nn.Linear | None:
    found = (getattr(part, name, None) for name in names)
    return next((layer for layer in found if isinstance(layer, nn.Linear)), None)


def _rows(*layers: nn.Linear) -> tuple[Tensor, ...]:
    return tuple(t.data for layer in layers for t in (layer.weight, layer.bias) if t is not None)


def attentions(root: nn.Module) -> Iterator[Attention]:
    """Every attention module of timm, Hugging Face and torchvision as views of (head, dim) rows and columns."""
    for name, part in root.named_modules():
        if hasattr(part, "views"):
            yield part.views(name)
            continue
        heads = next((n for a in ("num_heads", "num_attention_heads", "heads") if (n := getattr(part, a, None))), None)
        q, k, v = (
            _linear(part, f"{c}_proj", word, c) for c, word in zip("qkv", ("query", "key", "value"), strict=True)
        )
        proj = _linear(part, "proj", "o_proj", "out_proj")
        if isinstance(part, nn.MultiheadAttention):
            packed = [part.in_proj_weight.data.chunk(3), part.in_proj_bias.data.chunk(3)]
            split = list(zip(*packed, strict=True))
        elif (qkv := _linear(part, "qkv")) is not None:
            split = list(zip(*(t.chunk(3) for t in _rows(qkv)), strict=True))
            for index, bias in ((0, "q_bias"), (2, "v_bias")):  # BEiT, EVA, timm's Swin v2; K has none
                if getattr(part, bias, None) is not None:
                    split[index] = (*split[index], getattr(part, bias).data)
        elif (query := _linear(part, "q")) is not None and (kv := _linear(part, "kv")) is not None:  # timm's pooling
            split = [_rows(query), *zip(*(t.chunk(2) for t in _rows(kv)), strict=True)]
        elif q is not None and k is not None and v is not None:
            split = [_rows(q), _rows(k), _rows(v)]
            heads = heads or q.out_features // part.head_dim
            if proj is None:  # BERT's layout: the projection sits beside the attention
                proj = root.get_submodule(f"{name.rpartition('.')[0]}.output.dense")
        else:
            continue
        assert heads is not None
        assert proj is not None
        yield Attention(name, heads, split[0][0].shape[0] // heads, *split, proj.weight.data)


def ffns(root: nn.Module) -> Iterator[Ffn]:
    """Every feed-forward network of timm, Hugging Face and torchvision as views of hidden units."""
    for name, part in root.named_modules():
        if hasattr(part, "network"):
            yield part.network(name)
            continue
        last = _linear(part, "fc2", "down_proj", "dense2")
        entries = [_linear(part, "fc1_g", "gate_proj"), _linear(part, "fc1_x", "up_proj")]
        if entries[0] is None:
            entries = [_linear(part, "fc1", "dense1")]
        if type(part).__name__ in ("MLP", "MLPBlock"):  # torchvision: a Sequential
            layers = [layer for layer in part.children() if isinstance(layer, nn.Linear)]
            entries, last = (layers[:1], layers[1]) if len(layers) == 2 else ([None], None)
        if isinstance(getattr(part, "intermediate", None), nn.Module) and hasattr(part, "output"):  # BERT's layout
            entries, last = [_linear(part.intermediate, "dense")], _linear(part.output, "dense")
        if last is None or entries[0] is None:
            continue
        rows = _rows(*(entry for entry in entries if entry is not None))
        width = last.in_features
        gated = sum(t.shape[0] for t in rows if t.ndim == 2) == 2 * width
        views = tuple(view for t in rows for view in t.split(width))
        yield Ffn(name, rows[0].shape[1], width, gated, views, last.weight.data)


def dead_dims(size: int, pairs: bool = False) -> Tensor:
    """Indices 1, 3, 5, ... below size; with pairs (rotary embedding) 2, 3, 6, 7, ..."""
    index = torch.arange(size)
    return index[(index // 2 if pairs else index) % 2 == 1]


def plant_dead(module: nn.Module) -> None:
    """Make every second dimension of each head and every second hidden unit exactly dead, in place.

    In Q, K and V the rows and biases of the dead dimensions become zero, and the output projection's columns; in the
    feed-forward networks the entries' rows and biases and the exit's columns. Removing them changes no output. Under
    rotary embedding, which turns dimensions in pairs, Q and K lose whole pairs.
    """
    # Halves are turned into each other elsewhere: every second dimension of each half is every second of all.
    rotary = any(type(part).__name__ == "EvaAttention" and not part.rotate_half for part in module.modules())
    with torch.no_grad():
        for attention in attentions(module):
            single, paired = (dead_dims(attention.head_dim, pairs) for pairs in (False, rotary))
            for tensor in (*attention.q, *attention.k):
                tensor.unflatten(0, (-1, attention.head_dim))[:, paired] = 0
            for tensor in (*attention.v, attention.proj.T):
                tensor.unflatten(0, (-1, attention.head_dim))[:, single] = 0
        for ffn in ffns(module):
            dead = dead_dims(ffn.width)
            for tensor in ffn.entries:
                tensor[dead] = 0
            ffn.exit[:, dead] = 0
