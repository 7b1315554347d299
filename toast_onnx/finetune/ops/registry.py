"""The table of operators: ONNX name -> PyTorch function, and which inputs are read on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Value = Tensor | np.ndarray | None
Function = Callable[..., Any]


class Unsupported(RuntimeError):
    """A form of an operator that has no PyTorch implementation here; the message names it."""


@dataclass(frozen=True)
class Node:
    """One operator of a graph, its attributes decoded.

    Attributes:
        op: operator name, with `domain/` before it outside the default domain.
        label: its name in messages.
        inputs: tensor names, "" where an optional input is absent.
        outputs: tensor names, "" where an optional output is not wanted.
        attributes: decoded attributes; subgraphs are decoded to `toast_onnx.finetune.plan.Plan`.
        opset: version of the operator's domain.
    """

    op: str
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 1

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute's value, or `default`."""
        return self.attributes.get(name, default)


@dataclass(frozen=True)
class Operator:
    """A PyTorch implementation.

    Attributes:
        function: called with the node and its inputs (None where absent); returns one tensor or a tuple.
        host: positions of the inputs that are read as numbers (sizes, axes, pads); no gradient flows through them.
        blocked: positions of all inputs through which no gradient flows: those of `host`, indices, conditions, stored
            statistics.
    """

    function: Function
    host: tuple[int, ...] = ()
    blocked: tuple[int, ...] = ()


OPS: dict[str, Operator] = {}


def op(*names: str, host: Sequence[int] = (), discrete: Sequence[int] = ()) -> Callable[[Function], Function]:
    """Enter a function in the table under each of `names`; no gradient flows through `host` and `discrete` inputs."""

    def enter(function: Function) -> Function:
        for name in names:
            OPS[name] = Operator(function, tuple(host), (*host, *discrete))
        return function

    return enter


def numbers(value: Value) -> list[Any]:
    """A host input as a flat list of Python numbers (or symbolic sizes while a graph is traced)."""
    if value is None:
        return []
    return list(value.reshape(-1).tolist())


def number(value: Value, default: Any = None) -> Any:
    """A host input of one element as a Python number; `default` where it is absent."""
    found = numbers(value)
    return found[0] if found else default


DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""ONNX element type (TensorProto.DataType) -> PyTorch's."""
