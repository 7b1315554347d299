"""ToaSt's run-time selection a second time, on timm's own modules in PyTorch: masks at full width, no graph involved.

Written from the formulas (arXiv 2602.15720 and its release's description of the masked form). Dropped channels are
multiplied by zero; fc1's selection also zeroes the residual stream (`masked`) or leaves it alone (`kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Masked:
    """What to select, and what was selected.

    Attributes:
        kept: (block, part) -> number of channels that stay.
        tokens: (block, part) -> sampled token numbers.
        residual: `masked` or `kept`.
        chosen: (block, part) -> channels that stayed in the last run, ascending.
    """

    kept: Mapping[tuple[int, str], int]
    tokens: Mapping[tuple[int, str], np.ndarray]
    residual: str = "masked"
    chosen: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)

    def mask(self, x: Tensor, key: tuple[int, str], row: Tensor | None) -> Tensor:
        """(channels,) of zeros and ones for tokens x (batch, tokens, channels); row (batch, tokens) or None."""
        picked = torch.from_numpy(self.tokens[key])
        scores = x[:, picked].abs()
        if row is not None:
            scores = scores * row[:, picked].mean(dim=0)[None, :, None]
        scores = scores.mean(dim=(0, 1))
        if row is not None:
            patches = x.shape[1] - 1
            scores = (2 * x[:, 0].abs().mean(dim=0) + patches * scores) / (1 + patches)
        best = torch.topk(scores, self.kept[key]).indices
        self.chosen[key] = np.sort(best.numpy())
        return torch.zeros_like(scores).index_fill(0, best, 1.0)

    def network(
        self, block: nn.Module, number: int, x: Tensor, row: Tensor | None, scale: Callable[..., Tensor]
    ) -> Tensor:
        """A block's second half: x (batch, tokens, channels) plus its feed-forward network."""
        first, second = (number, "fc1"), (number, "fc2")
        if first in self.kept and self.residual == "masked":
            x = x * self.mask(x, first, row)
        y = block.norm2(x)
        if first in self.kept and self.residual == "kept":
            y = y * self.mask(y, first, row)
        h = block.mlp.act(block.mlp.fc1(y))
        if second in self.kept:
            h = h * self.mask(h, second, row)
        return x + scale(block.mlp.fc2(h))


def vit(module: nn.Module, masked: Masked) -> None:
    """Make a timm VisionTransformer with a class token select in its blocks, in place."""
    for number, block in enumerate(module.blocks):

        def forward(x: Tensor, *_: object, block: nn.Module = block, number: int = number, **__: object) -> Tensor:
            branch, row = _attention(block.attn, block.norm1(x))
            return masked.network(block, number, x + block.ls1(branch), row, block.ls2)

        block.forward = forward


def _attention(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The branch's output, and (batch, tokens) what the class token attends to, averaged over heads."""
    batch, tokens, channels = x.shape
    q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    p = (q @ k.mT * attn.scale).softmax(dim=-1)
    return attn.proj((p @ v).transpose(1, 2).reshape(batch, tokens, channels)), p[:, :, 0].mean(dim=1)


def swin(module: nn.Module, masked: Masked) -> None:
    """Make a timm SwinTransformer select in its blocks, counted through the stages, in place."""
    blocks = [block for stage in module.layers for block in stage.blocks]
    for number, block in enumerate(blocks):

        def forward(x: Tensor, block: nn.Module = block, number: int = number) -> Tensor:
            shape = x.shape
            x = (x + block._attn(block.norm1(x))).reshape(shape[0], -1, shape[-1])
            return masked.network(block, number, x, None, nn.Identity()).reshape(shape)

        block.forward = forward
