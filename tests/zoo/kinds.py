"""Kinds of attention that no family of the libraries here has alone: two blocks each between patches and classes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.zoo.described import Attention, Ffn, Subject, family
from tests.zoo.libraries import image

WIDTH, HEADS, DIM, HIDDEN, SIDE = 48, 4, 12, 96, 4


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, DIM)).transpose(1, 2)  # (batch, tokens, heads * dim) -> (batch, heads, tokens, dim)


def _weigh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Network(nn.Module):
    """Norm and feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(self.norm(x))))


class Contracted(nn.Module):
    """Every product an Einsum, heads on an axis of the kernels, as Keras and einops code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        for name in "qkv":
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(HEADS, DIM, WIDTH)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(HEADS, 1, DIM)))
        self.out_weight = nn.Parameter(torch.empty(WIDTH, HEADS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            torch.einsum("bnc,hdc->bhnd", y, getattr(self, f"{n}_weight")) + getattr(self, f"{n}_bias") for n in "qkv"
        )
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * DIM**-0.5).softmax(-1)
        return torch.einsum("bihd,chd->bic", torch.einsum("bhij,bhjd->bihd", weights, v), self.out_weight)

    def views(self, name: str) -> Attention:
        """The layers as rows and columns of (head, dim)."""
        layers = [
            (getattr(self, f"{n}_weight").data.view(-1, WIDTH), getattr(self, f"{n}_bias").data.view(-1)) for n in "qkv"
        ]
        return Attention(name, HEADS, DIM, *layers, self.out_weight.data.view(WIDTH, -1))


class Separate(nn.Module):
    """Layers of their own, with what a kind adds: norms of queries and keys, or keys and values that heads share."""

    def __init__(self, normed: bool = False, shared: int = 1) -> None:
        super().__init__()
        self.num_heads, self.shared = HEADS, shared
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, WIDTH // shared), nn.Linear(WIDTH, WIDTH // shared)
        self.q_norm, self.k_norm = (HeadNorm() if normed else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (_heads(layer(y)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k = self.k_norm(k)
        if self.shared > 1:
            k, v = (t.repeat_interleave(self.shared, dim=1) for t in (k, v))
        return self.proj(_weigh(self.q_norm(q), k, v))


class HeadNorm(nn.Module):
    """RMSNorm over the dimensions of a head, with gain, spelled out as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Convolved(nn.Module):
    """YOLO's: one packed 1x1 convolution; the values are also convolved depthwise and added to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.pe = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2).unflatten(-1, (SIDE, SIDE))
        q, k, v = (t.unflatten(1, (HEADS, DIM)) for t in self.qkv(y).flatten(2).chunk(3, dim=1))
        weights = (q.transpose(-2, -1) @ k * DIM**-0.5).softmax(-1)
        a = (v @ weights.transpose(-2, -1)).flatten(1, 2)
        a, v = (t.unflatten(-1, (SIDE, SIDE)) for t in (a, v.flatten(1, 2)))
        return self.proj(a + self.pe(v)).flatten(2).transpose(1, 2)

    def views(self, name: str) -> Attention:
        """The layers as rows and columns of (head, dim)."""
        w, b = self.qkv.weight.data.flatten(1).chunk(3), self.qkv.bias.data.chunk(3)
        return Attention(name, HEADS, DIM, *zip(w, b, strict=True), self.proj.weight.data.flatten(1))


class Parallel(nn.Module):
    """ViT-22B's: one layer in front of attention and network, one behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.both = nn.Linear(WIDTH, HIDDEN + 3 * WIDTH), nn.Linear(WIDTH + HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden, q, k, v = self.first(self.norm(x)).split([HIDDEN, WIDTH, WIDTH, WIDTH], dim=-1)
        return self.both(torch.cat([_weigh(*map(_heads, (q, k, v))), functional.gelu(hidden)], -1))

    def views(self, name: str) -> Attention:
        """The attention's share of both layers."""
        w, b = (t.data[HIDDEN:].chunk(3) for t in (self.first.weight, self.first.bias))
        return Attention(name, HEADS, DIM, *zip(w, b, strict=True), self.both.weight.data[:, :WIDTH])

    def network(self, name: str) -> Ffn:
        """The network's share of both layers."""
        rows = (self.first.weight.data[:HIDDEN], self.first.bias.data[:HIDDEN])
        return Ffn(name, WIDTH, HIDDEN, False, rows, self.both.weight.data[:, WIDTH:])


class Tower(nn.Module):
    """Patches, residual blocks, the mean over tokens, classes. With `times` the same blocks run that often (ALBERT)."""

    def __init__(self, attention: Callable[[], nn.Module], times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.position = nn.Parameter(torch.empty(1, SIDE * SIDE, WIDTH))
        made = [attention() for _ in range(2 // times)]
        self.branches = nn.ModuleList(p for a in made for p in ([a] if isinstance(a, Parallel) else [a, Network()]))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for branch in [*self.branches] * self.times:
            y = y + branch(y)
        return self.head(self.norm(y).mean(1))


def _tower(attention: Callable[[], nn.Module], times: int = 1) -> Subject:
    return Subject(Tower(attention, times), {"input": image(SIDE * 8)}, ("logits",))


for _name, _builder in (
    ("kind-einsum", functools.partial(_tower, Contracted)),
    ("kind-shared-weights", functools.partial(_tower, Separate, times=2)),
    ("kind-grouped-queries", functools.partial(_tower, functools.partial(Separate, shared=2))),
    ("kind-convolved-values", functools.partial(_tower, Convolved)),
    ("kind-qk-norm", functools.partial(_tower, functools.partial(Separate, normed=True))),
    ("kind-parallel-packed", functools.partial(_tower, Parallel)),
):
    family(_name, 2)(_builder)
