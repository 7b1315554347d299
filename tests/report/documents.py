"""Documents of a made-up run, as the commands would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DENSE, PRUNED = "d" * 64, "e" * 64


def sizes(qk: int, width: int) -> dict[str, Any]:
    return {
        "heads": 3,
        "qk_dim": qk,
        "vo_dim": 64,
        "attention_macs": 1_000_000 * qk,
        "attention_params": 1,
        "in_features": 192,
        "width": width,
        "ffn_macs": 100_000 * width,
        "ffn_params": 1,
    }


def pruning(blocks: int = 3) -> dict[str, Any]:
    """A report of a run that halves Q/K and keeps 100, 101, ... hidden units."""
    return {
        "format": "toast-onnx/prune/1",
        "dense": {"file": "m.onnx", "sha256": DENSE, "bytes": 4_000_000, "macs": 2_000_000, "params": 1_000_000},
        "pruned": {"file": "m.pruned.onnx", "sha256": PRUNED, "bytes": 1_000_000, "macs": 500_000, "params": 300_000},
        "inputs": {"x": [1, 3, 224, 224]},
        "blocks": [
            {"index": i, "name": f"block.{i}", "before": sizes(64, 768), "after": sizes(32, 100 + i)}
            for i in range(blocks)
        ],
        "declined": [{"node": "/odd<b>", "reason": "its scale is data"}],
        "statistics": {"source": "256 images"},
        "twin": {"batches": [1], "tolerance": 1e-4, "worst": 2.5e-7, "differences": [{}, {}, {}]},
        "options": {"ratios": {"attention": {"qk": [0.5, 0.25]}}},
        "versions": {"onnx": "1.2.3"},
    }


def evaluation(model: str, top1: float) -> dict[str, Any]:
    found = {"accuracy": top1, "interval95": [top1 - 0.01, top1 + 0.01], "correct": 1}
    return {"model": model, "fingerprint": "f", "accuracy": {"samples": 500, "top1": found}, "metrics": None}


def comparison(sha256: str = PRUNED) -> dict[str, Any]:
    figures = {"top1_agreement": 0.875, "kl": 0.0625, "cosine": 0.99, "relative_error": 0.125}
    blocks = [{"index": i, "attention": {"relative_error": 0.1}, "ffn": {"relative_error": 0.2}} for i in range(3)]
    models = {"dense": {"file": "m.onnx", "sha256": DENSE}, "pruned": {"file": "m.pruned.onnx", "sha256": sha256}}
    return {"models": models, "samples": 64, "outputs": {"logits": figures}, "blocks": blocks}


def timing(model: str, median: float, speedup: float) -> dict[str, Any]:
    return {
        "model": model,
        "batch": 8,
        "median_ms": median,
        "spread": 0.02,
        "images_per_second": 8000 / median,
        "speedup": speedup,
        "speedup_quartiles": [speedup, speedup],
    }


def put(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path
