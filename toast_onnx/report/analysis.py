"""What `analyze` says of a model's feed-forward networks, as one plain document."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from toast_onnx.importance.moments import Moments
from toast_onnx.importance.redundancy import DEAD, redundancy
from toast_onnx.importance.statistics import Statistics
from toast_onnx.matching.blocks import Ffn
from toast_onnx.matching.norms import norm_before
from toast_onnx.matching.study import Study
from toast_onnx.reasons import Reason


def analysis(
    study: Study, statistics: Statistics, dead: float = DEAD, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Redundancy of the inputs of fc1 and fc2 in every block.

    Args:
        study: the model.
        statistics: measured on samples.
        dead: as for `toast_onnx.importance.redundancy.dead_share`.
        progress: called with the block's name after each.

    Returns:
        `{"format", "model", "source", "dead_below", "blocks": [{"index", "name", "fc1", "fc2"}]}`. A layer has
        `width`, `dead` (share), `r2_mean`, `r2_median` (None where no channel varies), `effective_rank` and
        `rank_share` (of the width), or `reason` where its channels cannot be told apart.
    """
    blocks = []
    for block in study.match.blocks:
        if block.ffn is not None:
            layers = {
                "fc1": _layer(block.ffn.fc1_reason, statistics.inputs, block.index, dead, _tied(study, block.ffn)),
                "fc2": _layer(block.ffn.fc2_reason, statistics.hidden, block.index, dead),
            }
            blocks.append({"index": block.index, "name": block.name} | layers)
        progress(block.name)
    return {
        "format": "toast-onnx/analyze/1",
        "model": study.view.model.path.name,
        "source": statistics.source,
        "dead_below": dead,
        "blocks": blocks,
    }


def _tied(study: Study, ffn: Ffn) -> np.ndarray | None:
    """Weights of the sum that a LayerNorm in front of fc1 makes constant, where every channel has a gain."""
    norm = norm_before(study.view, study.facts, ffn.entries[0].input, ffn.in_features)
    return 1 / norm.gain if norm.found and bool((norm.gain != 0).all()) else None


def _layer(
    reason: Reason | None,
    moments: Callable[[int], Moments],
    block: int,
    dead: float,
    tied: np.ndarray | None = None,
) -> dict[str, Any]:
    if reason is not None:
        return {"reason": str(reason)}
    found = redundancy(moments(block), dead, tied)
    return {
        "width": found.width,
        "dead": found.dead,
        "r2_mean": None if math.isnan(found.r2_mean) else found.r2_mean,
        "r2_median": None if math.isnan(found.r2_median) else found.r2_median,
        "effective_rank": found.effective_rank,
        "rank_share": found.effective_rank / found.width,
    }
