"""Shorthands for tests that prune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.matching.study import Study, study
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import Pruned, prune

#: Different widths for every part, so that no two can be mixed up; weights alone, so that it is quick.
UNEVEN: dict[str, Any] = {
    "version": 1,
    "attention": {"qk": 0.5, "vo": 0.25, "select": "index", "score": "l2"},
    "ffn": {"fc1": 0.1, "fc2": 0.5, "score": "l2"},
    "align": 1,
    "compensation": {"kind": "none"},
}


def look(path: Path, **shapes: tuple[int, ...]) -> Study:
    """Study of a model file."""
    return study(load_model(path), shapes)


def prune_file(path: Path, ratios: dict[str, Any], out: Path | None = None, **options: Any) -> tuple[Study, Pruned]:
    """Prune a model file; write the result where `out` is given."""
    dense = look(path)
    pruned = prune(dense, parse_ratios(ratios), SyntheticStatistics(dense), **options)
    if out is not None:
        save_model(pruned.model, out)
    return dense, pruned


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs of a model file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # idle threads would spin, and two tests run at a time
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def worst(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Largest difference over all outputs, as a fraction of each output's largest magnitude."""
    return max(
        float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True)
    )
