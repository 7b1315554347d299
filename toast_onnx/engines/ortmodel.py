"""ONNX Runtime's own deployment format: the model after its graph optimizer, as `.ort` or `.onnx`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from toast_onnx.engines.build import precise_file, write_with_record
from toast_onnx.engines.record import described
from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.files import files_read
from toast_onnx.model import load_model

#: Optimizer levels. `all` lays tensors out for the machine that builds; the others give a portable file.
ORT_LEVELS = ("basic", "extended", "all")


def build_ort(
    model_path: Path, output: Path, *, precision: str = "fp32", fp16_io: bool = False, level: str = "extended"
) -> dict[str, Any]:
    """Write the model as ONNX Runtime's optimizer leaves it, and a JSON beside it.

    Args:
        model_path: the ONNX file.
        output: the file to write; a name that ends in `.ort` gets ONNX Runtime's format, `.onnx` stays ONNX.
        precision: `fp32` or `fp16`.
        fp16_io: float16 inputs and outputs too (with `fp16`).
        level: one of `ORT_LEVELS`.

    Returns:
        What the JSON holds.

    Raises:
        ConfigError: another suffix, precision or level.
        ModelError: the model cannot be read, or the result cannot be written.
        BackendError: ONNX Runtime refuses the model.
    """
    from toast_onnx.ort import ort, session_options

    if output.suffix not in (".ort", ".onnx"):
        raise ConfigError(f"{output.name}: --format ort writes .ort or .onnx files; choose such a name with -o")
    if precision not in ("fp32", "fp16"):
        raise ConfigError(f"--format ort takes --precision fp32 or fp16, not {precision}")
    if level not in ORT_LEVELS:
        raise ConfigError(f"optimizer level '{level}' is unknown; use one of {', '.join(ORT_LEVELS)}")
    if output.resolve() == model_path.resolve():
        raise ConfigError(f"{output} is the model itself; choose another name with -o")
    model = load_model(model_path)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="toast-onnx-") as folder:
        source, notes = precise_file(model, precision, Path(folder), fp16_io=fp16_io)
        draft = Path(folder) / f"optimized{output.suffix}"
        options = session_options()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
        options.optimized_model_filepath = str(draft)
        if output.suffix == ".ort":
            options.add_session_config_entry("session.save_model_format", "ORT")
        elif model.has_external_data:
            raise ConfigError(f"{model_path} has external data; write it with an -o name that ends in .ort")
        try:
            ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        except Exception as e:
            raise BackendError(f"ONNX Runtime does not take {model_path}: {' '.join(str(e).split())}") from e
        written = draft.read_bytes()
    record = {
        **described(output, len(written), model_path, "onnxruntime", str(ort.__version__)),
        "precision": precision,
        "converted": precision == "fp16" and not notes,
        "fp16_io": fp16_io,
        "level": level,
        "build_seconds": round(time.perf_counter() - started, 3),
        "notes": notes,
        "read": files_read(),
    }
    write_with_record(output, written, record)
    return record
