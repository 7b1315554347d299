"""The written graph against the trained module: what ships is what was trained."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toast_onnx.errors import ModelError
from toast_onnx.finetune.module import GraphModule
from toast_onnx.model import Model, write_draft
from toast_onnx.proof.precision import to_float32
from toast_onnx.runtime import run_model

#: Largest allowed difference, as a fraction of each output's largest magnitude.
TOLERANCE = 1e-4


def compare_with_module(
    model: Model, module: GraphModule, feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]]
) -> float:
    """Largest difference between a model in ONNX Runtime and the module, relative to each output's scale.

    Half-precision graphs are compared in a float32 copy.

    Raises:
        ModelError: it is above `TOLERANCE`.
    """
    names = list(module.output_names)
    with tempfile.TemporaryDirectory(prefix="toast-finetune-") as folder:
        path = write_draft(to_float32(model), Path(folder), "model.onnx")
        wanted = run_model(path, names, [_single(f) for f in feeds])
    device = next(module.parameters()).device
    worst = 0.0
    for given, want in zip(feeds, wanted, strict=True):
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(value).to(device) for name, value in _single(given).items()}
            found = module(**tensors, keep=names)
        for name in names:
            scale = max(float(np.abs(want[name]).max()), 1e-30)
            worst = max(worst, float(np.abs(found[name].cpu().numpy().astype(np.float64) - want[name]).max()) / scale)
    # Values stored in half precision round away from the trained ones; the comparison says so with its own limit.
    limit = TOLERANCE if to_float32(model) is model else 1e-2
    if not worst <= limit:
        raise ModelError(
            f"the written graph differs from the trained module by {worst:.1e} of its scale (allowed {limit:.0e}); "
            "nothing was written. Please report the model"
        )
    return worst


def _single(feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    return {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in feeds.items()}
