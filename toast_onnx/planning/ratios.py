"""The ratios file: read it, write it, and apply it to the blocks of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toast_onnx.errors import ConfigError
from toast_onnx.importance.scores import attention_score
from toast_onnx.planning.schema import (
    AttentionScore,
    BlockOverride,
    Coupling,
    FfnScore,
    Mode,
    Ratios,
    Select,
    check_attention,
    plain,
)
from toast_onnx.planning.settings import explain
from toast_onnx.planning.strict_yaml import format_document, read_document, write_text_atomically

__all__ = [
    "BlockRatios",
    "Ratios",
    "dump_ratios",
    "format_ratios",
    "load_ratios",
    "own_merges",
    "parse_ratios",
    "resolve",
]


def parse_ratios(document: object, source: str = "ratios") -> Ratios:
    """Checks a plain document (dicts, lists, numbers, strings) against the format of a ratios file.

    Args:
        document: What the file holds. A float stands for the shortest decimal that prints it.
        source: The name that error messages start with.

    Raises:
        ConfigError: In one line, the key at fault, its value and what is allowed.
    """
    if document is None:
        raise ConfigError(f"{source} is empty; a ratios file starts with the line `version: 1`")
    if not isinstance(document, Mapping):
        kind = "a list" if isinstance(document, list) else "a single value"
        raise ConfigError(f"{source} holds {kind}; a ratios file holds keys, starting with `version: 1`")
    if "version" not in document:
        raise ConfigError(f"{source} has no version; add the line `version: 1`")
    try:
        return Ratios.model_validate(dict(document))
    except ValidationError as e:
        raise ConfigError(f"{source}: {explain(e, document)}") from e


def load_ratios(path: str | os.PathLike[str]) -> Ratios:
    """Reads a ratios file; numbers are taken in exact decimal, as written.

    Raises:
        ConfigError: In one line, the file, the key at fault, its value and what is allowed.
    """
    return parse_ratios(read_document(path), str(Path(path)))


def format_ratios(ratios: Ratios, header_comment: str = "") -> str:
    """Returns the YAML text of a ratios file; only settings that were given are written, so defaults stay defaults."""
    return format_document({"version": ratios.version, **plain(ratios, given_only=True)}, header_comment)


def dump_ratios(ratios: Ratios, path: str | os.PathLike[str], header_comment: str = "") -> None:
    """Writes a file that `load_ratios` reads back equal; it appears whole or not at all.

    Raises:
        ConfigError: The destination cannot be written.
    """
    write_text_atomically(path, format_ratios(ratios, header_comment))


@dataclass(frozen=True)
class BlockRatios:
    """The settings that hold for one block, overrides applied.

    Attributes:
        index: The block's number.
        name: The block's name.
        qk: Fraction of each head's Q and K dimensions removed.
        vo: Fraction of each head's V and output projection dimensions removed.
        heads: Fraction of whole heads removed.
        fc1: Fraction of fc1's inputs removed.
        fc2: Fraction of fc2's inputs removed.
        select: Attention selection.
        score: Attention score.
        coupling: Attention coupling.
        ffn_score: FFN score.
        mode: FFN mode.
        defaults: Which of these names nobody set.
    """

    index: int
    name: str
    qk: Decimal
    vo: Decimal
    heads: Decimal
    fc1: Decimal
    fc2: Decimal
    select: Select
    score: AttentionScore
    coupling: Coupling
    ffn_score: FfnScore
    mode: Mode
    defaults: frozenset[str]


def resolve(ratios: Ratios, block_names: Sequence[str], node_names: Sequence[Sequence[str]]) -> tuple[BlockRatios, ...]:
    """Applies lists and overrides to the blocks of one model.

    Args:
        ratios: The settings.
        block_names: One name a block, in model order.
        node_names: For each block the names of its nodes; patterns match these and the block's name.

    Returns:
        One entry a block. Overrides are applied in file order.

    Raises:
        ConfigError: A list of the wrong length, a block number that does not exist, a pattern that matches nothing, or
            settings that contradict each other in some block.
        ValueError: `block_names` and `node_names` differ in length.
    """
    if len(block_names) != len(node_names):
        raise ValueError(f"{len(block_names)} block names but {len(node_names)} lists of node names")
    settings = [_common(ratios, index, len(block_names)) for index in range(len(block_names))]
    given = [
        {*ratios.attention.model_fields_set, *_ffn_names(ratios.ffn.model_fields_set)} for _ in range(len(block_names))
    ]
    for override in ratios.blocks:
        changes = _changes(override)
        for index in _addressed(override.block, block_names, node_names):
            settings[index] |= changes
            given[index] |= set(changes)
    known = {field.name for field in fields(BlockRatios)} - {"index", "name", "defaults"}
    blocks = []
    for index, (name, values, names) in enumerate(zip(block_names, settings, given, strict=True)):
        try:
            check_attention(values["select"], values["score"], values["coupling"])
        except ValueError as e:
            raise ConfigError(f"block {index} ({name}) {e}") from e
        blocks.append(BlockRatios(index=index, name=name, defaults=frozenset(known - names), **values))
    return tuple(blocks)


def own_merges(ratios: Ratios, block_names: Sequence[str], node_names: Sequence[Sequence[str]]) -> dict[int, Decimal]:
    """Block number -> share of the tokens to merge there, for blocks whose overrides give one; later ones win.

    Args:
        ratios: The settings.
        block_names: One name a block, in model order.
        node_names: For each block the names of its nodes; patterns match these and the block's name.

    Raises:
        ConfigError: A block number that does not exist, or a pattern that matches nothing.
    """
    return {
        index: override.tokens.merge
        for override in ratios.blocks
        if override.tokens.merge is not None
        for index in _addressed(override.block, block_names, node_names)
    }


def _common(ratios: Ratios, index: int, count: int) -> dict[str, Any]:
    """Returns the settings of block `index` before overrides."""

    def entry(key: str, value: Decimal | tuple[Decimal, ...]) -> Decimal:
        if isinstance(value, Decimal):
            return value
        if len(value) != count:
            raise ConfigError(
                f"{key} lists {len(value)} ratios but the model has {count} blocks; give one a block, or one number"
            )
        return value[index]

    attention, ffn = ratios.attention, ratios.ffn
    return {
        "qk": entry("attention.qk", attention.qk),
        "vo": entry("attention.vo", attention.vo),
        "heads": entry("attention.heads", attention.heads),
        "fc1": entry("ffn.fc1", ffn.fc1),
        "fc2": entry("ffn.fc2", ffn.fc2),
        "select": attention.select,
        "score": attention.score,
        "coupling": attention.coupling,
        "ffn_score": ffn.score,
        "mode": ffn.mode,
    }


def _ffn_names(names: set[str]) -> set[str]:
    """Returns FFN keys under the names they have in `BlockRatios`, where attention has a score too."""
    return {"ffn_score" if name == "score" else name for name in names}


def _changes(override: BlockOverride) -> dict[str, Any]:
    """Returns what an override sets, with what follows from it where the override is silent."""
    attention, ffn = override.attention, override.ffn
    changes: dict[str, Any] = {name: getattr(attention, name) for name in attention.model_fields_set}
    if changes.get("select") == "subspace":
        changes.setdefault("score", "energy")
    if "score" in changes and not attention_score(changes["score"]).couples:
        changes.setdefault("coupling", "coupled")
    for name in ffn.model_fields_set:
        changes["ffn_score" if name == "score" else name] = getattr(ffn, name)
    return changes


def _addressed(block: int | str, block_names: Sequence[str], node_names: Sequence[Sequence[str]]) -> list[int]:
    """Returns the indices of the blocks that a number or a pattern names."""
    count = len(block_names)
    if isinstance(block, int):
        if block >= count:
            raise ConfigError(f"blocks[{block}] does not exist: the model has {count} blocks, counted from 0")
        return [block]
    found = [
        index
        for index, (name, nodes) in enumerate(zip(block_names, node_names, strict=True))
        if any(fnmatchcase(candidate, block) for candidate in (name, *nodes))
    ]
    if not found:
        some = ", ".join(block_names[:3]) + (", ..." if count > 3 else "")
        raise ConfigError(f"blocks[{block!r}] matches no block or node name; the model's blocks are {some}")
    return found
