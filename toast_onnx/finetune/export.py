"""The trained module through `torch.onnx.export`: a graph written anew by PyTorch instead of the one that was read."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toast_onnx.errors import BackendError
from toast_onnx.files import drafts
from toast_onnx.finetune.module import GraphModule
from toast_onnx.model import load_model, save_model

#: The oldest opset the dynamo exporter writes without converting down.
_OLDEST = 18


def torch_export(
    module: GraphModule,
    path: Path,
    feeds: Mapping[str, np.ndarray[Any, Any]],
    *,
    opset: int,
    dynamic_batch: bool,
) -> None:
    """Write a module with PyTorch's dynamo exporter; names of inputs and outputs are kept.

    Args:
        module: made by `to_torch`.
        path: target file, written whole or not at all.
        feeds: example inputs, at least two samples where the batch is dynamic.
        opset: of the original model; graphs below 18 are written at 18.
        dynamic_batch: whether the first axis of every input stays symbolic.

    Raises:
        BackendError: the exporter or `onnxscript` is missing, or it fails on this graph.
        ModelError: the file cannot be written.
    """
    example = tuple(torch.from_numpy(feeds[name]) for name in module.input_names)
    batch = torch.export.Dim("batch") if dynamic_batch else None
    shapes = tuple({0: batch} if dynamic_batch else {} for _ in example)
    wrapper = _Positional(module.cpu().eval())
    with drafts(path) as folder:
        draft = folder / path.name
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    wrapper,
                    example,
                    draft,
                    input_names=list(module.input_names),
                    output_names=list(module.output_names),
                    opset_version=max(opset, _OLDEST),
                    dynamo=True,
                    dynamic_shapes=(shapes,),
                    external_data=False,
                    verbose=False,
                )
        except ImportError as e:
            raise BackendError("torch.onnx.export needs onnxscript: pip install onnxscript") from e
        except Exception as e:  # the exporter's errors share no public base
            reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
            raise BackendError(f"torch.onnx.export fails on this graph: {reason.strip()}") from e
        save_model(load_model(draft), path)


class _Positional(torch.nn.Module):
    """The exporter wants a forward without keyword tricks."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.module(*inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
