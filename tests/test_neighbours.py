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


def run_example(name: str, out: Path) -> onnx.ModelProto:
    """Run a script of examples/ into a folder; the int8 model it leaves there."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--out", str(out)],
        env={**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"},
        cwd=out,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return onnx.load(out / "digits_vit.int8.onnx")


def is_pruned_and_quantized(model: onnx.ModelProto) -> bool:
    """Whether it has QDQ pairs, and fc1 weights of 96 x 192 where the dense model's are 96 x 384."""
    ops = Counter(node.op_type for node in model.graph.node)
    shapes = {tuple(t.dims) for t in model.graph.initializer}
    return ops["QuantizeLinear"] >= 36 and (96, 192) in shapes and (96, 384) not in shapes


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("olive") is None, reason="Olive is not installed: pip install olive-ai")
def test_olive_prunes_and_quantizes_in_one_workflow(tmp_path: Path) -> None:
    assert is_pruned_and_quantized(run_example("olive_workflow.py", tmp_path))
    assert accuracy(tmp_path / "digits_vit.int8.onnx") > 0.95


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None,
    reason="NVIDIA ModelOpt is not installed: pip install 'nvidia-modelopt[onnx]'",
)
def test_modelopt_quantizes_the_pruned_model(tmp_path: Path) -> None:
    assert is_pruned_and_quantized(run_example("modelopt_quantize.py", tmp_path))
    assert accuracy(tmp_path / "digits_vit.int8.onnx") > 0.95
