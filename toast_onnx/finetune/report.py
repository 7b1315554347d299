"""The pruning report brought up to date after fine-tuning."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from toast_onnx import __version__
from toast_onnx.errors import ConfigError
from toast_onnx.finetune.trainer import Outcome
from toast_onnx.model import file_hash, stored_bytes
from toast_onnx.planning.strict_json import read_json
from toast_onnx.require import require_torch


def updated_report(pruned: Path, out: Path, outcome: Outcome, facts: dict[str, Any]) -> dict[str, Any]:
    """The report beside the pruned model with the new file's identity and a section `finetune`.

    The graph is the one that was proven, so `twin` stays, marked as of the weights before fine-tuning; `finetune.proof`
    compares the written file with the trained weights. Without a report beside the model a new one is begun.

    Args:
        pruned: the model that was fine-tuned.
        out: the written model.
        outcome: how training went.
        facts: settings, data, hashes and the proof.
    """
    beside = pruned.with_suffix(".json")
    document: dict[str, Any] = {"format": "toast-onnx/finetune/1"}
    with contextlib.suppress(ConfigError):  # nothing there, or something else's file
        read = read_json(beside)
        if isinstance(read, dict) and str(read.get("format", "")).startswith("toast-onnx/prune/"):
            document = read
    identity = {"file": out.name, "sha256": file_hash(out), "bytes": stored_bytes(out)}
    former = document.get("pruned")
    document["pruned"] = (former if isinstance(former, dict) else {}) | identity
    if isinstance(document.get("twin"), dict):
        document["twin"]["weights"] = (
            "before fine-tuning; finetune.proof compares the written file with the trained weights"
        )
    document["finetune"] = {
        "from": {"file": pruned.name, "sha256": file_hash(pruned)},
        "start": outcome.start,
        "best": outcome.best,
        "best_step": outcome.best_step,
        "steps": outcome.steps,
        "ended": outcome.reason,
        "history": outcome.history,
        "images_per_second": round(outcome.images_per_second, 2),
        **facts,
        "versions": {"toast-onnx": __version__, "torch": str(require_torch().__version__)},
    }
    return _without_infinities(document)  # type: ignore[no-any-return]


def _without_infinities(value: Any) -> Any:
    """JSON has no spelling for infinity, which marks an evaluation that diverged."""
    if isinstance(value, dict):
        return {k: _without_infinities(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_infinities(v) for v in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
