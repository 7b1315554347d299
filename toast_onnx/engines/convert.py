"""The 16-bit graph as a file of its own: what a build reads, for ONNX Runtime and for eyes."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from toast_onnx.engines.build import record_bytes, with_weights
from toast_onnx.engines.precision import convert_precision
from toast_onnx.engines.record import described, record_path
from toast_onnx.errors import ConfigError
from toast_onnx.files import files_read
from toast_onnx.model import Model, load_model, opset_of, staged_model, stored_bytes


def convert_file(
    model_path: Path, output: Path, *, precision: str, fp16_io: bool = False, large: Collection[str] = ()
) -> dict[str, Any]:
    """Write the model with a precision in its graph's types, and a JSON beside it.

    Args:
        model_path: the ONNX file.
        output: the ONNX file to write; `build` takes it with the same precision and leaves its types alone.
        precision: `fp16` or `bf16`.
        fp16_io: float16 inputs and outputs too (with `fp16`).
        large: tensors that float16 cannot hold; the nodes around them stay in float32.

    Returns:
        What the JSON holds, as for `build`.

    Raises:
        ConfigError: another precision, `fp16_io` without `fp16`, or an output that is the model itself.
        ModelError: the model cannot be read, or the result cannot be written.
        BackendError: the converter failed on this graph.
    """
    if precision not in ("fp16", "bf16"):
        raise ConfigError(f"--format onnx writes a 16-bit graph: choose --precision fp16 or bf16, not {precision}")
    if output.resolve() == model_path.resolve():
        raise ConfigError(f"{output} is the model itself; choose another name with -o")
    model = load_model(model_path)
    started = time.perf_counter()
    converted, notes = convert_precision(with_weights(model), precision, fp16_io=fp16_io, large=large)
    with staged_model(Model(converted, output), output, record_path(output)) as staged:
        record = {
            **described(output, stored_bytes(staged.draft), model_path, "onnx", str(opset_of(converted))),
            "precision": precision,
            "converted": not notes,
            "fp16_io": fp16_io,
            "kept_fp32": sorted(large),
            "build_seconds": round(time.perf_counter() - started, 3),
            "notes": notes,
            "read": files_read(),
        }
        staged.beside = record_bytes(record)
    return record
