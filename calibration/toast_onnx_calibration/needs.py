"""Which statistics a run needs, and in which passes over the data to collect them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from toast_onnx.errors import ConfigError
from toast_onnx.importance.scores import attention_score, ffn_score
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study
from toast_onnx.planning.ratios import BlockRatios, Ratios, resolve
from toast_onnx.solving.compensations import compensation as compensation_named

Wanted = dict[int, frozenset[str]]

#: What `calibrate` collects without a ratios file: enough for every attention setting and for the hidden units.
DEFAULT_PARTS = frozenset({"qk", "context", "hidden"})

#: What gradients tell of a block: the Fisher information at fc2's output.
GRADIENT = "gradient"

#: Bytes for every element of a Gram matrix while a pass runs: float32 in the session, float64 in the sum.
BYTES_PER_ELEMENT = 12


def everything(study: Study, parts: Iterable[str] = DEFAULT_PARTS) -> Wanted:
    """The given parts of all blocks that have them."""
    return _present({b.index: _available(b) & frozenset(parts) for b in study.match.blocks})


def needed(study: Study, ratios: Ratios) -> Wanted:
    """What pruning with these ratios asks statistics for.

    Raises:
        ConfigError: the ratios do not fit the model.
    """
    blocks = study.match.blocks
    settings = resolve(ratios, [b.name for b in blocks], [b.node_names for b in blocks])
    kind = ratios.compensation.kind
    return _present({b.index: _available(b) & _parts(s, kind) for b, s in zip(blocks, settings, strict=True)})


def passes(study: Study, wanted: Mapping[int, frozenset[str]], budget: int) -> list[Wanted]:
    """Groups of blocks whose statistics fit into `budget` bytes together; a block is never split.

    Raises:
        ConfigError: nothing is wanted.
    """
    if not wanted:
        raise ConfigError(
            "no block needs statistics: none can be pruned (see `toast-onnx inspect`), every ratio is 0, or what is "
            "asked for reads the weights alone"
        )
    groups: list[Wanted] = []
    used = 0
    for index, parts in sorted(wanted.items()):
        size = statistics_bytes(study.match.blocks[index], parts)
        if not groups or used + size > budget:
            groups.append({})
            used = 0
        groups[-1][index] = parts
        used += size
    return groups


def statistics_bytes(block: Block, parts: Iterable[str]) -> int:
    """Memory that the Gram matrices of one block take while a pass runs, in bytes."""
    a, f, elements = block.attention, block.ffn, 0
    for part in parts:
        if a is not None and part == "qk":
            elements += 2 * a.num_heads * a.qk_dim**2
        elif a is not None and part == "context":
            elements += (a.num_heads * a.vo_dim) ** 2
        elif f is not None and part == "hidden":
            elements += f.width**2
        elif f is not None and part == "inputs":
            elements += f.in_features**2
    return elements * BYTES_PER_ELEMENT


def _available(block: Block) -> frozenset[str]:
    """The parts of a block that can be pruned and so can be measured."""
    parts = set()
    if block.attention is not None:
        parts |= {"qk"} if block.attention.qk_reason is None else set()
        parts |= {"context"} if block.attention.vo_reason is None else set()
    if block.ffn is not None:
        parts |= {"hidden", "fc2", GRADIENT} if block.ffn.fc2_reason is None else set()
        parts |= {"inputs", "fc1"} if block.ffn.fc1_reason is None else set()
    return frozenset(parts)


def _parts(ratio: BlockRatios, compensation: str) -> frozenset[str]:
    parts = set()
    compensated = compensation_named(compensation).needs_moments
    if attention_score(ratio.score).needs == "moments" or compensated:
        parts |= {"qk"} if ratio.qk else set()
        parts |= {"context"} if ratio.vo or ratio.heads else set()
    if ratio.mode == "runtime":  # scores the batch that it is given
        return frozenset(parts)
    needs = ffn_score(ratio.ffn_score).needs
    for removed, moments, magnitude in ((ratio.fc1, "inputs", "fc1"), (ratio.fc2, "hidden", "fc2")):
        if removed:
            parts |= {moments} if ffn_score(ratio.ffn_score).reads_moments or compensated else set()
            parts |= {magnitude} if needs == "tokens" else set()
    parts |= {GRADIENT} if ratio.fc2 and needs == "gradients" else set()
    return frozenset(parts)


def _present(wanted: Mapping[int, frozenset[str]]) -> Wanted:
    return {index: parts for index, parts in wanted.items() if parts}
