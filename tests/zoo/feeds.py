"""Feeds for a graph, and the module's own outputs for them."""

from __future__ import annotations

import os

import numpy as np
import onnx
import torch

from tests.zoo.described import Subject

SIZES = {"sequence": 16, "height": 64, "width": 96}  # what a symbolic dimension other than the batch becomes


def inputs(
    path: str | os.PathLike[str], batch: int = 1, seed: int = 0, sizes: dict[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Deterministic feeds for a model file, by its own input names, shapes and types.

    Images are N(0, 1), token ids lie in 1..99, segment ids are 0 or 1, masks keep a prefix of at least half the
    sequence, noise is uniform in [0, 1).

    Args:
        path: The ONNX file.
        batch: What a symbolic first dimension becomes.
        seed: Of the random generator.
        sizes: What other symbolic dimensions become, by name; `SIZES` where not given.
    """
    graph = onnx.load(os.fspath(path), load_external_data=False).graph
    random, known = np.random.default_rng(seed), SIZES | (sizes or {})
    weights = {tensor.name for tensor in graph.initializer}
    feeds = {}
    for value in graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        dims = enumerate(tensor.shape.dim)
        shape = [d.dim_value or (batch if axis == 0 else known.get(d.dim_param, 16)) for axis, d in dims]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if "mask" in value.name:
            lengths = random.integers((shape[-1] + 1) // 2, shape[-1] + 1, size=(*shape[:-1], 1))
            array = np.arange(shape[-1]) < lengths
        elif "token_type" in value.name:
            array = random.integers(0, 2, size=shape)
        elif np.issubdtype(dtype, np.integer):
            array = random.integers(1, 100, size=shape)
        elif "noise" in value.name:
            array = random.random(shape)
        else:
            array = random.standard_normal(shape)
        feeds[value.name] = array.astype(dtype)
    return feeds


def reference(subject: Subject, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The PyTorch module's outputs for the same feeds, in the order of the graph's outputs."""
    with torch.no_grad():
        result = subject.module(*(torch.from_numpy(feeds[name]) for name in subject.inputs))
    return [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]
