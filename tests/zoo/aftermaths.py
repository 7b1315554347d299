"""What people do to an exported file."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from tests.zoo.described import Unavailable


def _simplifier(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise Unavailable(f"{name} is not installed: pip install {name}") from e


def _onnxsim(source: Path, target: Path) -> None:
    onnxsim = _simplifier("onnxsim")
    onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def _onnxslim(source: Path, target: Path) -> None:
    onnxslim = _simplifier("onnxslim")
    onnx.save(onnxslim.slim(onnx.load(source)), target)


def _ort(level: str, source: Path, target: Path) -> None:
    """ONNX Runtime's own optimised model: basic folds constants, extended fuses into com.microsoft operators."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _ort_fused(multi_head: bool, source: Path, target: Path) -> None:
    """ONNX Runtime's transformer optimiser for 3 heads of 64; it fuses attention itself in ``hf-bert-eager`` only."""
    from onnxruntime.transformers import fusion_options, optimizer

    options = fusion_options.FusionOptions("bert")
    options.use_multi_head_attention = multi_head
    fused = optimizer.optimize_model(
        str(source), model_type="bert", num_heads=3, hidden_size=192, opt_level=0, optimization_options=options
    )
    fused.save_model_to_file(str(target))


def _fp16(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _constants(source: Path, target: Path) -> None:
    """Weights as Constant nodes, as graphs without initializers have them."""
    model = onnx.load(source)
    nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def _external(source: Path, target: Path) -> None:
    data = {"save_as_external_data": True, "location": f"{target.name}.data", "size_threshold": 0}
    onnx.save(onnx.load(source), target, **data)


AFTERMATHS: dict[str, Callable[[Path, Path], None]] = {
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "ort-basic": functools.partial(_ort, "BASIC"),
    "ort-extended": functools.partial(_ort, "EXTENDED"),
    "ort-fused": functools.partial(_ort_fused, False),  # com.microsoft Attention
    "ort-fused-mha": functools.partial(_ort_fused, True),  # com.microsoft MultiHeadAttention
    "fp16": _fp16,
    "constants": _constants,
    "external": _external,
}
