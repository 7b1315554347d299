"""Which channels a graph will choose for itself, batch by batch: ToaSt's token channel selection at run time.

The score is that of arXiv 2602.15720 (`toast_onnx.importance.activation`): with a class token its boosted magnitude and
that of sampled patches, each weighted by the attention the class token pays it; without one, magnitudes alone (Swin).
The sampled tokens are drawn here, once, so that the same graph gives the same outputs for the same batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

import numpy as np

from toast_onnx.choosing.blocks import Widths
from toast_onnx.errors import ConfigError, MatchError
from toast_onnx.importance.activation import sample_patches
from toast_onnx.matching.blocks import Block, Ffn
from toast_onnx.matching.class_token import class_token
from toast_onnx.matching.graph import attribute
from toast_onnx.matching.span import residual_sum
from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import BlockRatios, Ratios
from toast_onnx.planning.schema import Residual
from toast_onnx.tokens.rewrite import WrittenMerge

Part = Literal["fc1", "fc2"]

#: Fractions of the tokens that the paper's release samples: of a ViT's patches, of a Swin's tokens.
CLASS_TOKEN_SAMPLE = 0.02
PLAIN_SAMPLE = 0.2


@dataclass(frozen=True)
class Selection:
    """One choice of channels that the graph makes for every batch.

    Attributes:
        block: number of the block.
        name: module path for the new nodes.
        part: `fc1` selects fc1's inputs, `fc2` its own (the hidden units).
        scored: tensor (batch, ..., channels) whose channels are scored.
        channels: their number.
        kept: how many stay.
        tokens: sampled token numbers, drawn with replacement; None takes all (there is no class token then).
        patches: tokens of one image without the class token; 0 where there is no class token.
        probabilities: attention probabilities (..., tokens, tokens) that weight the patches; None without class token.
        residual: for fc1, whether the dropped channels are zeroed in the residual stream, too, or it is kept.
        heads: of that attention.
        merge: the merge of tokens between that attention and the network; None where its tokens are the same.
    """

    block: int
    name: str
    part: Part
    scored: str
    channels: int
    kept: int
    tokens: np.ndarray | None
    patches: int = 0
    probabilities: str | None = None
    residual: Residual = "kept"
    heads: int = 1
    merge: WrittenMerge | None = None


def static_widths(width: Widths, setting: BlockRatios) -> Widths:
    """The kept counts that shrink weights: without those of a feed-forward network that selects at run time."""
    return replace(width, fc1=None, fc2=None) if setting.mode == "runtime" else width


def plan_selections(
    study: Study,
    settings: Sequence[BlockRatios],
    widths: Sequence[Widths],
    ratios: Ratios,
    seed: int,
    skip_unprunable: bool = False,
) -> tuple[Selection, ...]:
    """What the graph is to select while it runs, in graph order; empty where every block is static.

    Args:
        study: the model.
        settings: of every block.
        widths: kept counts of every block.
        ratios: how to sample tokens, and what happens to the residual stream.
        seed: of the sampled tokens.
        skip_unprunable: leave layers alone that should select and cannot.

    Raises:
        ConfigError: a setting contradicts selection at run time.
        MatchError: a layer that should select cannot, with the reason, unless skipped.
    """
    found: list[Selection] = []
    for block, setting, width in zip(study.match.blocks, settings, widths, strict=True):
        if setting.mode == "static" or block.ffn is None or (width.fc1 is None and width.fc2 is None):
            continue
        if setting.ffn_score != "activation" and "ffn_score" not in setting.defaults:
            raise ConfigError(
                f"block {block.index} ({block.name}) has ffn score {setting.ffn_score} with mode runtime, which knows "
                "one score only; remove it, or write score: activation"
            )
        for part, kept in (("fc1", width.fc1), ("fc2", width.fc2)):
            if kept is None:
                continue
            try:
                found.append(_selection(study, block, block.ffn, part, kept, ratios, seed))  # type: ignore[arg-type]
            except MatchError:
                if not skip_unprunable:
                    raise
    return tuple(found)


def among_merged(
    study: Study, selections: Sequence[Selection], merges: Sequence[WrittenMerge], ratios: Ratios, seed: int
) -> tuple[Selection, ...]:
    """The same selections in the graph with merged tokens: scored on those that are left, drawn among them.

    Args:
        study: the merged graph.
        selections: as planned for the unmerged one.
        merges: what was merged.
        ratios: how to sample tokens.
        seed: of the sampled tokens.

    Raises:
        MatchError: a layer cannot select there, with the reason.
    """
    found = []
    for each in selections:
        block = study.match.blocks[each.block]
        if block.ffn is None:
            raise MatchError(f"block {block.index} ({block.name}): its network is not found once tokens are merged")
        merge = next((m for m in merges if m.block == each.block), None)
        among = _Among(each.probabilities is not None, merge)
        found.append(_selection(study, block, block.ffn, each.part, each.kept, ratios, seed, among))
    return tuple(found)


def settled_widths(
    settings: Sequence[BlockRatios], widths: Sequence[Widths], selections: Sequence[Selection]
) -> tuple[Widths, ...]:
    """Kept counts of every block, without those that the graph should select and cannot."""
    selected = {(s.block, s.part) for s in selections}
    return tuple(
        replace(
            width,
            fc1=width.fc1 if (k, "fc1") in selected else None,
            fc2=width.fc2 if (k, "fc2") in selected else None,
        )
        if setting.mode == "runtime"
        else width
        for k, (setting, width) in enumerate(zip(settings, widths, strict=True))
    )


@dataclass(frozen=True)
class _Among:
    """What is known of merged tokens: whether the first one is a class token, and the merge in front of a network."""

    classed: bool
    merge: WrittenMerge | None


def _selection(
    study: Study,
    block: Block,
    ffn: Ffn,
    part: Part,
    kept: int,
    ratios: Ratios,
    seed: int,
    among: _Among | None = None,
) -> Selection:
    label = f"block {block.index} ({block.name}): {part} cannot select at run time"
    masks = part == "fc1" and ratios.ffn.residual == "masked"
    linear = ffn.fc2 if part == "fc2" else ffn.entries[0]
    scored = _stream(study, ffn, label) if masks else linear.input
    if linear.channel_axis != -1:
        raise MatchError(f"{label}: it is a convolution; use mode: static")
    count = _token_count(study, scored, label)
    if among is None:
        cls = class_token(study.view, study.facts)
        among = _Among(cls is not None and cls.tokens == count, None)
    classed = among.classed and count > 1
    # A network beside the attention, not behind it, still has the tokens that its attention sees.
    merge = among.merge if among.merge is not None and among.merge.counts.left == count else None
    tokens = _draw(ratios.ffn.tokens, count - classed, classed, seed, block.index, part)
    if tokens is not None and not _fixed(study, scored):
        raise MatchError(f"{label}: the number of tokens varies, so none can be drawn; export with a fixed image size")
    return Selection(
        block=block.index,
        name=f"{block.name}/ffn/{part}",
        part=part,
        scored=scored,
        channels=linear.in_features,
        kept=kept,
        tokens=tokens,
        patches=count - 1 if classed else 0,
        probabilities=_probabilities(study, block, count, label, merge) if classed else None,
        residual="masked" if masks else "kept",
        heads=block.attention.num_heads if classed and block.attention is not None else 1,
        merge=merge if classed else None,
    )


def _draw(
    wanted: Decimal | Literal["auto", "all"], patches: int, classed: bool, seed: int, block: int, part: Part
) -> np.ndarray | None:
    """Token numbers, of patches only where there is a class token (number 0); None for all of a model without one."""
    auto = CLASS_TOKEN_SAMPLE if classed else PLAIN_SAMPLE
    fraction = auto if wanted == "auto" else 1.0 if wanted == "all" else float(wanted)
    if fraction >= 1 and not classed:
        return None
    # Every layer has a draw of its own.
    own = int(np.random.SeedSequence([seed, block, int(part == "fc2")]).generate_state(1)[0])
    return sample_patches(patches, fraction, own) + int(classed)


def _token_count(study: Study, tensor: str, label: str) -> int:
    shape, other = study.facts.shape(tensor), study.other.shape(tensor)
    if shape is None or other is None or len(shape) < 3:
        raise MatchError(f"{label}: the tokens of '{tensor}' cannot be told from its batch; use mode: static")
    if study.dynamic_batch and shape[0] == other[0]:
        raise MatchError(f"{label}: the batch is not the first axis of '{tensor}'; use mode: static")
    return int(np.prod(shape[1:-1]))


def _fixed(study: Study, tensor: str) -> bool:
    """Whether the number of tokens is the same for all inputs."""
    shape, other = study.facts.shape(tensor) or (), study.other.shape(tensor) or ()
    return shape[1:-1] == other[1:-1]


def _probabilities(study: Study, block: Block, count: int, label: str, merge: WrittenMerge | None) -> str:
    """The attention probabilities of the block, whose row 0 says what the class token looks at."""
    seen = count if merge is None else merge.counts.count
    core = None if block.attention is None else block.attention.core
    if core is None or core.kind != "matmul":
        raise MatchError(
            f"{label}: a fused attention node hides what the class token attends to; export to an opset below 23 "
            "without attention fusion"
        )
    tensor = study.view.nodes[core.softmax].output[0]
    queries = count if merge is not None and merge.matched is None else seen
    if (study.facts.shape(tensor) or ())[-2:] != (queries, seen):
        raise MatchError(f"{label}: its attention does not run over the network's tokens; use mode: static")
    return str(tensor)


def _stream(study: Study, ffn: Ffn, label: str) -> str:
    """The residual stream before the norm in front of fc1, to which the network's output is added."""
    view, facts = study.view, study.facts
    norm = view.producer_of(ffn.entries[0].input)
    if norm is None or norm.op_type != "LayerNormalization":
        raise MatchError(
            f"{label} with residual: masked: no LayerNormalization node stands right before fc1; write it first (prune "
            "--normalize with nothing to remove), export to opset 17 or newer, or write residual: kept"
        )
    stream = str(norm.input[0])
    rank = len(facts.shape(stream) or ())
    last = int(attribute(norm, "axis", -1)) in (-1, rank - 1)  # type: ignore[call-overload]
    end = view.producer_of(residual_sum(view, facts, ffn.fc2))
    source = view.producer_of(stream)
    alone = source is not None and len([o for o in source.output if o]) == 1 and stream not in view.outputs
    if not last or end is None or stream not in end.input or not alone:
        raise MatchError(
            f"{label} with residual: masked: the norm before fc1 does not read the residual stream alone; "
            "write residual: kept"
        )
    return stream
