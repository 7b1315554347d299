"""Statistics measured on samples, for the solvers: read from statistics.npz one block at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import DataError, MatchError
from toast_onnx.importance.activation import token_channel_scores
from toast_onnx.importance.moments import Moments
from toast_onnx.importance.synthetic import AttentionStatistics
from toast_onnx.matching.blocks import Attention, Block
from toast_onnx.matching.study import Study
from toast_onnx.model import file_hash
from toast_onnx_calibration.needs import GRADIENT
from toast_onnx_calibration.store import StatisticsFile, check_model, open_statistics

Array = NDArray[np.float64]


class CalibratedStatistics:
    """Statistics of real samples (implements `toast_onnx.importance.statistics.Statistics`)."""

    def __init__(self, study: Study, path: str | Path, folder: object = None) -> None:
        """Open a statistics file for a model.

        Args:
            study: the model.
            path: the file, which is read block by block.
            folder: a temporary one around the file, kept for as long as the statistics.

        Raises:
            DataError: it cannot be read or was taken from another model.
        """
        self._study, self._folder = study, folder
        self.file: StatisticsFile = open_statistics(path)
        check_model(self.file, file_hash(study.view.model.path), study.view.model.path)
        _check_widths(self.file, study)

    @property
    def source(self) -> str:
        """Where the statistics come from."""
        header = self.file.header
        weight = f", class token weighted {header.class_weight:g}" if header.class_weight != 1 else ""
        counted = header.data.startswith(f"{header.samples} ")  # `64 images of photos` has said how many
        data = header.data if counted else f"{header.samples} samples: {header.data}"
        share = header.share
        part = f", {share.text} alone" if share is not None and share.missing else ""
        return f"{data}{part} (seed {header.seed}{weight})"

    def to_document(self) -> dict[str, Any]:
        """Plain data for the report."""
        header = self.file.header
        return {
            "source": self.source,
            "model_sha256": header.model_sha256,
            "data": header.data,
            "fingerprints": list(header.fingerprints),
            "preprocessing": header.preprocessing,
            "samples": header.samples,
            "seed": header.seed,
            "tokens": header.tokens,
            "class_weight": header.class_weight,
            "notes": list(header.notes),
        }

    def attention(self, block: int) -> AttentionStatistics:
        """Statistics of a block's attention; what was not measured is NaN, so that no solver takes it for data."""
        attention = self._study.match.blocks[block].attention
        if attention is None:
            raise MatchError(f"block {block} has no attention")
        parts = self._parts(block)
        if not parts & {"qk", "context"}:
            raise self._missing(block, "attention")
        measured = "qk" in parts
        return AttentionStatistics(
            self._average(block, "qq", attention, measured),
            self._average(block, "kk", attention, measured),
            self._context(block, attention, "context" in parts),
            self.file.tokens(f"{block}.qq") if measured else math.inf,
        )

    def hidden(self, block: int) -> Moments:
        """Moments of fc2's input."""
        return self._moments(block, "hidden")

    def inputs(self, block: int) -> Moments:
        """Moments of fc1's input."""
        return self._moments(block, "inputs")

    def metric(self, block: int) -> Array:
        """Mean of g g^T of the gradients at fc2's output, (C_out, C_out)."""
        if GRADIENT not in self._parts(block):
            raise self._missing(block, "gradients")
        gram: Array = self.file.array(f"{block}.{GRADIENT}.gram")[0] / self.file.count(f"{block}.{GRADIENT}")
        return (gram + gram.T) / 2

    def activation_scores(self, block: int, part: str) -> Array:
        """Scores (channels,) of the paper's token channel selection for `part` fc1 or fc2."""
        if part not in self._parts(block):
            raise self._missing(block, f"activation scores of {part}")
        images = float(self.file.array(f"{block}.{part}.images").reshape(-1)[0])
        magnitude = self.file.array(f"{block}.{part}.magnitude") / images  # (tokens, channels), mean of |x|
        if f"{block}.{part}.attention" not in self.file.names():
            return token_channel_scores(magnitude.mean(axis=0))
        attended = self.file.array(f"{block}.{part}.attention")[1:] / images  # (patches,)
        patches = (magnitude[1:] * attended[:, None]).mean(axis=0)
        return token_channel_scores(patches, magnitude[0], attended.size)

    def _parts(self, block: int) -> set[str]:
        return set(self.file.header.parts.get(str(block), ()))

    def _missing(self, block: int, what: str) -> DataError:
        return DataError(
            f"{self.file.path}: has no statistics of block {block}'s {what}; run `toast-onnx calibrate` with the same "
            "--ratios, or give --data instead"
        )

    def _moments(self, block: int, part: str) -> Moments:
        if part not in self._parts(block):
            raise self._missing(block, f"{part} activations")
        return self.file.moments(f"{block}.{part}")

    def _average(self, block: int, part: str, attention: Attention, measured: bool) -> Array:
        if not measured:
            return np.full((attention.num_heads, attention.qk_dim, attention.qk_dim), np.nan)
        gram: Array = self.file.array(f"{block}.{part}.gram") / self.file.count(f"{block}.{part}")
        return (gram + np.swapaxes(gram, -1, -2)) / 2

    def _context(self, block: int, attention: Attention, measured: bool) -> Moments:
        if measured:
            return self.file.moments(f"{block}.context")
        n = attention.num_heads * attention.vo_dim
        return Moments.known(np.full(n, np.nan), np.full((n, n), np.nan))


def _check_widths(file: StatisticsFile, study: Study) -> None:
    """Make sure that entries have the sizes of the blocks they speak of.

    Raises:
        DataError: one has not, or speaks of a block that the model does not have.
    """
    for name, shape in file.shapes().items():
        index, part, quantity = name.split(".")
        wanted = _extents(study.match.blocks[int(index)], part) if int(index) < len(study.match.blocks) else None
        if wanted is None or (quantity in ("gram", "mean", "magnitude") and shape[-len(wanted) :] != wanted):
            raise DataError(f"{file.path}: '{name}' has shape {shape}, which no such part has; calibrate again")


def _extents(block: Block, part: str) -> tuple[int, ...] | None:
    """The last extents of what is measured of a part of a block; None where it has no such part."""
    attention, ffn = block.attention, block.ffn
    if part in ("qq", "kk"):
        return None if attention is None else (attention.num_heads, attention.qk_dim, attention.qk_dim)
    if part == "context":
        return None if attention is None else (attention.num_heads * attention.vo_dim,)
    if ffn is None:
        return None
    if part == GRADIENT:
        return (1, ffn.fc2.out_features, ffn.fc2.out_features)
    return (ffn.in_features,) if part in ("inputs", "fc1") else (ffn.width,)
