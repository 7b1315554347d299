"""A latency table: how long the model runs when one part of its blocks keeps another width, on one machine.

Every entry is the whole model's latency with one part of a group of equal blocks at one width and everything else
dense. What a part of one block saves is the difference from the dense model, divided by the number of blocks; savings
of different parts add up. Where tokens can be merged, the model is timed with few and with many merged: latency is
taken to grow evenly with the multiply-accumulates that are left, from what the merges themselves cost. The table is a
JSON file, so that it can be measured where the model will run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from toast_onnx.errors import ConfigError
from toast_onnx.files import read_limited, write_bytes
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study
from toast_onnx.planning.search import aligned_widths
from toast_onnx.planning.settings import first_problem
from toast_onnx.planning.strict_json import MAX_BYTES, parse_json
from toast_onnx.planning.width_costs import Part, dense_widths, prunable_widths

FORMAT = "toast-onnx/costs/1"
_HINT = "measure the table again with `toast-onnx costs`"
#: Where less of the latency than this follows the multiply-accumulates of merged models, merging gains nothing.
LEAST_SLOPE = 0.02
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class PartTimes(_Strict):
    """Latency by width of one part, in a group of blocks of the same shape.

    Attributes:
        blocks: numbers of the blocks that had this width together.
        part: heads, qk, vo, fc1 or fc2.
        dense: the part's dense width.
        milliseconds: kept count -> latency of the whole model.
    """

    blocks: Annotated[tuple[int, ...], Field(min_length=1)]
    part: Part
    dense: Annotated[int, Field(ge=1)]
    milliseconds: Annotated[dict[int, Positive], Field(min_length=1)]

    @model_validator(mode="after")
    def _within(self) -> PartTimes:
        wrong = [k for k in self.milliseconds if not 1 <= k < self.dense]
        if wrong:
            raise ValueError(f"has a time for {wrong[0]} of {self.dense} kept")
        return self


class MergedTime(_Strict):
    """Latency with tokens merged, at dense widths.

    Attributes:
        removed: block number -> tokens merged away behind its attention.
        macs_share: multiply-accumulates that are left, of the dense model's.
        milliseconds: latency of the whole model.
    """

    removed: Annotated[dict[int, Annotated[int, Field(ge=1)]], Field(min_length=1)]
    macs_share: Annotated[float, Field(gt=0, le=1)]
    milliseconds: Positive


class MergedLine(NamedTuple):
    """Latency of a merged model, of the dense one's: `fixed + slope * share` at a share of the multiply-accumulates."""

    fixed: float
    slope: float

    def latency(self, macs_share: float) -> float:
        """Share of the dense model's latency."""
        return self.fixed + self.slope * macs_share

    def macs(self, latency_share: float) -> float:
        """Share of the multiply-accumulates that takes a share of the latency; not above 0 where none does."""
        return (latency_share - self.fixed) / self.slope


class CostTable(_Strict):
    """Measured latencies of one model.

    Attributes:
        format: version of this format.
        model: file name of the model.
        model_sha256: its hash.
        runtime: what was measured with: program, version, provider, threads, machine.
        batch: items in one call.
        dense_milliseconds: latency of the dense model.
        parts: latencies by part and width.
        merged: latencies with tokens merged; none where they cannot be, or were not asked for.
    """

    format: str = FORMAT
    model: str
    model_sha256: str
    runtime: dict[str, str]
    batch: Annotated[int, Field(ge=1)]
    dense_milliseconds: Positive
    parts: tuple[PartTimes, ...]
    merged: tuple[MergedTime, ...] = ()

    @model_validator(mode="after")
    def _enough(self) -> CostTable:
        if self.merged and len({m.macs_share for m in self.merged}) < 2:
            raise ValueError("has times with merged tokens at one share of the multiply-accumulates; a line needs two")
        return self

    def merged_line(self) -> MergedLine | None:
        """Latency by multiply-accumulates of merged models, by least squares.

        Returns:
            None where no merged model was timed, where merging more is not faster here, or where what the merges take
            is more than all they save.
        """
        if not self.merged:
            return None
        shares = [m.macs_share for m in self.merged]
        times = [m.milliseconds / self.dense_milliseconds for m in self.merged]
        slope, fixed = (float(x) for x in np.polyfit(shares, times, 1))
        line = MergedLine(fixed, slope)
        return line if slope > LEAST_SLOPE and line.latency(min(shares)) < 1 else None

    def widths(self, block: int, part: Part) -> tuple[int, ...]:
        """Kept counts that were measured for a part of a block, and its dense width; nothing where it was not."""
        return next(
            ((*sorted(p.milliseconds), p.dense) for p in self.parts if p.part == part and block in p.blocks), ()
        )

    def saved(self, block: int, part: Part, kept: int) -> float:
        """Milliseconds that a block gains when one part keeps so many; 0 at the dense width.

        Raises:
            KeyError: that width was not measured.
        """
        for p in self.parts:
            if p.part == part and block in p.blocks:
                return 0.0 if kept == p.dense else (self.dense_milliseconds - p.milliseconds[kept]) / len(p.blocks)
        raise KeyError((block, part))

    def saved_together(self, block: int, kept: Mapping[Part, int]) -> float:
        """Milliseconds that a block gains at several kept counts: the sum, dimensions of dropped heads not counted.

        Args:
            block: number of the block.
            kept: part -> kept count.

        Raises:
            KeyError: one of them was not measured.
        """
        gains = {part: self.saved(block, part, count) for part, count in kept.items()}
        share = kept["heads"] / max(self.widths(block, "heads")) if "heads" in kept else 1.0
        return sum(gain * (share if part in ("qk", "vo") else 1.0) for part, gain in gains.items())


def alike(blocks: Sequence[Block], shapes: Mapping[int, object]) -> list[tuple[int, ...]]:
    """Numbers of blocks with the same parts, widths and tensor shapes: they cost the same.

    Args:
        blocks: the matched blocks.
        shapes: block number -> anything hashable that its cost depends on besides its widths.
    """
    groups: dict[Any, list[int]] = {}
    for b in blocks:
        dense, prunable = (tuple(f(b).items()) for f in (dense_widths, prunable_widths))
        groups.setdefault((dense, prunable, shapes[b.index]), []).append(b.index)
    return [tuple(g) for g in groups.values()]


def table_widths(dense: int, align: int, most: int = 24) -> tuple[int, ...]:
    """Widths to measure below the dense one: all aligned ones, or `most` of them evenly spread."""
    every = aligned_widths(dense, align)[:-1]
    if len(every) <= most:
        return every
    return tuple(sorted({every[round(i * (len(every) - 1) / (most - 1))] for i in range(most)}))


def write_table(table: CostTable, path: Path) -> None:
    """Write a table whole or not at all."""
    write_bytes(path, (json.dumps(table.model_dump(mode="json"), indent=1) + "\n").encode())


def read_table(path: Path, study: Study, model_sha256: str) -> CostTable:
    """A table for a model.

    Raises:
        ConfigError: the file cannot be read, is no such table, or speaks of another model.
    """
    data = read_limited(path, MAX_BYTES, ConfigError, _HINT)
    parse_json(data, str(path), ConfigError, _HINT)
    try:
        table = CostTable.model_validate_json(data)
    except ValidationError as e:
        where, what = first_problem(e)
        raise ConfigError(
            f"{path}: {where or 'the file'}: {what}; measure the table again with `toast-onnx costs`"
        ) from e
    if table.format != FORMAT:
        raise ConfigError(f"{path}: cost table format {table.format}, but this release reads {FORMAT}; measure again")
    if table.model_sha256 != model_sha256:
        raise ConfigError(
            f"{path}: was measured on another model than {study.view.model.path}; run `toast-onnx costs` on this one"
        )
    return table
