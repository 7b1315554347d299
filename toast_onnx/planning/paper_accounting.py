"""Multiply-accumulates of the paper's nine models, dense and under a schedule, in two ways of counting.

The paper counts what its run-time form computes; a static graph, whose weights really are smaller, computes less. Both
count a linear layer on N tokens as `N x in x out`, both attention products, patch embedding, patch merging and
classifier, and leave out norms, activations, softmax and biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from toast_onnx.planning.widths import paper_kept_channels, paper_kept_head_dims


@dataclass(frozen=True)
class BlockMacs:
    """The dense multiply-accumulates of one block, for one image, and the widths they scale with.

    Attributes:
        qkv: The Q, K and V projections.
        attention: The two products between activations, Q K^T and scores V.
        proj: The output projection.
        fc1: First FFN layer.
        fc2: Second FFN layer.
        head_dim: Dimensions of a head.
        width: Inputs of fc1.
        hidden: Inputs of fc2.
    """

    qkv: int
    attention: int
    proj: int
    fc1: int
    fc2: int
    head_dim: int
    width: int
    hidden: int

    @property
    def total(self) -> int:
        """All multiply-accumulates of the block."""
        return self.qkv + self.attention + self.proj + self.fc1 + self.fc2


@dataclass(frozen=True)
class ModelMacs:
    """The dense multiply-accumulates of a model, for one image.

    Attributes:
        blocks: One entry a block.
        rest: Everything outside the blocks, which no schedule changes.
    """

    blocks: tuple[BlockMacs, ...]
    rest: int

    @property
    def total(self) -> int:
        """All multiply-accumulates of the model."""
        return self.rest + sum(block.total for block in self.blocks)


def vit_macs(width: int, depth: int, heads: int, patch: int, *, image: int = 224, classes: int = 1000) -> ModelMacs:
    """Returns the counts of a ViT with a class token and an FFN four times as wide as the embedding."""
    patches = (image // patch) ** 2
    tokens = patches + 1
    block = _block_macs(tokens, seen=tokens, width=width, heads=heads)
    return ModelMacs((block,) * depth, rest=patches * 3 * patch**2 * width + width * classes)


def swin_macs(
    width: int,
    depths: Sequence[int],
    heads: Sequence[int],
    patch: int,
    window: int,
    *,
    image: int = 224,
    classes: int = 1000,
) -> ModelMacs:
    """Returns the counts of a Swin: every stage halves the sides, doubles the width, and attends within windows.

    Args:
        width: Width of the first stage.
        depths: Blocks of each stage.
        heads: Heads of each stage.
        patch: Side of a patch, in pixels.
        window: Side of a window, in tokens.
        image: Side of the image, in pixels.
        classes: Outputs of the classifier.
    """
    side = image // patch
    rest = side**2 * 3 * patch**2 * width
    blocks: list[BlockMacs] = []
    for stage, (depth, stage_heads) in enumerate(zip(depths, heads, strict=True)):
        if stage > 0:  # patch merging: four neighbours of `width` channels become one token of twice the width
            side //= 2
            rest += side**2 * (4 * width) * (2 * width)
            width *= 2
        blocks += [_block_macs(side**2, seen=window**2, width=width, heads=stage_heads)] * depth
    return ModelMacs(tuple(blocks), rest + width * classes)


def paper_gmacs(model: ModelMacs, head: Sequence[Decimal], fc1: Sequence[Decimal], fc2: Sequence[Decimal]) -> float:
    """Returns the GMACs of a schedule in the authors' accounting, which describes the run-time form.

    For every block: Q, K and V projections, both attention products and the output projection x kept/head_dim, where
    kept is the paper's rounded count; fc1 x (1 - r1); fc2 x (1 - r2), with the ratios themselves and not the rounded
    channel counts. fc1's outputs are all computed at run time, so r2 does not touch fc1. Everything else stays.

    Args:
        model: The dense counts.
        head: Fraction of head dimensions removed, one entry a block.
        fc1: Fraction of fc1 inputs removed (r1), one entry a block.
        fc2: Fraction of fc2 inputs removed (r2), one entry a block.

    Raises:
        ValueError: A list has another length than the model has blocks.
    """
    macs = float(model.rest)
    for block, head_ratio, r1, r2 in zip(model.blocks, head, fc1, fc2, strict=True):
        macs += _attention_macs(block, head_ratio) + block.fc1 * (1 - float(r1)) + block.fc2 * (1 - float(r2))
    return macs / 1e9


def static_gmacs(model: ModelMacs, head: Sequence[Decimal], fc1: Sequence[Decimal], fc2: Sequence[Decimal]) -> float:
    """Returns the GMACs of the graph that a schedule yields here: fc1 shrinks on both sides, by whole channels.

    Arguments and errors are those of `paper_gmacs`; kept channels are counted by the paper's rounding.
    """
    macs = float(model.rest)
    for block, head_ratio, r1, r2 in zip(model.blocks, head, fc1, fc2, strict=True):
        inputs = paper_kept_channels(block.width, r1) / block.width
        hidden = paper_kept_channels(block.hidden, r2) / block.hidden
        macs += _attention_macs(block, head_ratio) + block.fc1 * inputs * hidden + block.fc2 * hidden
    return macs / 1e9


def _attention_macs(block: BlockMacs, ratio: Decimal) -> float:
    kept = paper_kept_head_dims(block.head_dim, ratio)
    return (block.qkv + block.attention + block.proj) * kept / block.head_dim


def _block_macs(tokens: int, *, seen: int, width: int, heads: int) -> BlockMacs:
    """Returns the counts of a block of `tokens` tokens, each of which attends to `seen` of them."""
    hidden = 4 * width
    return BlockMacs(
        qkv=tokens * width * 3 * width,
        attention=2 * tokens * seen * width,
        proj=tokens * width * width,
        fc1=tokens * width * hidden,
        fc2=tokens * hidden * width,
        head_dim=width // heads,
        width=width,
        hidden=hidden,
    )
