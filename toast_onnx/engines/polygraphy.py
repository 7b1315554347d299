"""A script that compares an engine with its model by NVIDIA's Polygraphy, for those who check engines with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import onnx.helper

from toast_onnx.engines.engine_check import TOLERANCES
from toast_onnx.engines.ortbench import shapes_at
from toast_onnx.engines.profiles import graph_inputs

_SCRIPT = '''\
#!/usr/bin/env python3
"""Compare an engine with the model it was built from, by Polygraphy: exit status 1 where they differ.

    pip install polygraphy numpy onnxruntime {package}

An element may differ by TOLERANCE of its output's largest magnitude, as in `toast-onnx check-engine`: in Polygraphy's
terms an absolute tolerance of its own for each output, and a relative one of 0.
"""

import os
import sys
from pathlib import Path
{environment}
import numpy as np
from polygraphy import comparator
from polygraphy.backend.common import BytesFromPath
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.backend.trt import EngineFromBytes, TrtRunner

HERE = Path(__file__).resolve().parent
MODEL = os.environ.get("MODEL") or str(HERE / {model!r})
ENGINE = os.environ.get("ENGINE") or str(HERE / {engine!r})
TOLERANCE = {tolerance!r}
INPUTS = {inputs}
ROUNDS = 4


def feeds():
    """Standard normal numbers, and ones for integers, in the shapes that the engine was tuned for."""
    random = np.random.default_rng(0)
    for _ in range(ROUNDS):
        yield {{
            name: (random.standard_normal(shape) if kind.startswith("float") else np.ones(shape)).astype(kind)
            for name, (kind, shape) in INPUTS.items()
        }}


def main():
    """Run both on the same inputs and compare."""
    runners = [
        OnnxrtRunner(SessionFromOnnx(MODEL, providers=["cpu"]), name="onnx"),
        TrtRunner(EngineFromBytes(BytesFromPath(ENGINE)), name="engine"),
    ]
    results = comparator.Comparator.run(runners, data_loader=list(feeds()))
    scale = {{}}
    for outputs in results["onnx"]:
        for name, value in outputs.items():
            scale[name] = max(scale.get(name, 0.0), float(np.abs(np.asarray(value)).max()))
    allowed = {{name: TOLERANCE * (largest or 1.0) for name, largest in scale.items()}}
    compare = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple  # by its release
    same = comparator.Comparator.compare_accuracy(results, compare_func=compare(atol=allowed, rtol=0.0))
    return 0 if bool(same) else 1


if __name__ == "__main__":
    sys.exit(main())
'''
_RTX = '\nos.environ.setdefault("POLYGRAPHY_USE_TENSORRT_RTX", "1")\n'


def comparison_script(script: Path, engine: Path, model: Path, graph: onnx.ModelProto, record: dict[str, Any]) -> str:
    """The script's text.

    Args:
        script: where it will lie; it finds engine and model from there.
        engine: the engine.
        model: the model it was built from, in float32.
        graph: the model's graph.
        record: what the JSON beside the engine holds: `backend`, `precision`, `profile`, `fp16_io`.

    Raises:
        ConfigError: an input has no rank, or an open dimension that no profile gives a size.
    """
    folder = script.resolve().parent
    usual = {name: tuple(shapes["opt"]) for name, shapes in record["profile"].items()}
    inputs = {}
    for spec in graph_inputs(graph):
        batch = usual[spec.name][0] if spec.name in usual else spec.dims[0] if spec.dims else None
        shape = shapes_at([spec], batch or 1, usual)[spec.name]
        inputs[spec.name] = (onnx.helper.tensor_dtype_to_np_dtype(spec.elem_type).name, shape)
    rows = "".join(f"    {name!r}: {entry!r},\n" for name, entry in inputs.items())
    return _SCRIPT.format(
        package="tensorrt_rtx" if record["backend"] == "tensorrt-rtx" else "tensorrt",
        environment=_RTX if record["backend"] == "tensorrt-rtx" else "",
        model=os.path.relpath(model.resolve(), folder),
        engine=os.path.relpath(engine.resolve(), folder),
        tolerance=TOLERANCES[record["precision"]],
        inputs=f"{{\n{rows}}}",
    )
