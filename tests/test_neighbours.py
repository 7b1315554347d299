"""Other tools around this one, for real: each test is skipped, with the reason, where the tool is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def accuracy(model: Path) -> float:
    """Accuracy on the shipped test images."""
    with np.load(EXAMPLES / "digits_test.npz") as file:
        pixels, labels = file["images"][:, None].astype(np.float32) / 255, file["labels"]
    logits = np.asarray(
        ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"pixels": pixels})[0]
    )
    return float(np.mean(logits.argmax(axis=1) == labels))


@pytest.mark.skipif(importlib.util.find_spec("olive") is None, reason="Olive is not installed: pip install olive-ai")
def test_olive_prunes_and_quantizes_in_one_workflow(tmp_path: Path) -> None:
    environment = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "olive_workflow.py"), "--out", str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = tmp_path / "digits_vit.int8.onnx"
    proto = onnx.load(model)
    ops = Counter(node.op_type for node in proto.graph.node)
    assert ops["QuantizeLinear"] > 50
    widths = {tuple(t.dims) for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert (96, 192) in widths  # fc1 of a pruned block, 96 x 384 before: it was pruned first
    assert (96, 384) not in widths
    assert accuracy(model) > 0.95
