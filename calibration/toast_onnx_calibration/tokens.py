"""A linear layer's input seen as (batch, tokens, channels), whatever its rank."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from toast_onnx.matching.operators import ELEMENTWISE
from toast_onnx.matching.study import Study
from toast_onnx_calibration.graph_writer import GraphWriter

#: Operators that keep the rows of a 2-D tensor: what happens to a token stays with the token.
_ROW_KEEPING = ELEMENTWISE | {"Gemm", "MatMul"}


@dataclass(frozen=True)
class Tokens:
    """A float tensor with channels on its last axis.

    Attributes:
        tensor: its name in the measuring graph.
        channels: extent of the last axis.
        rank: number of axes.
        axis: axis of the tokens, 0 or 1 of three; None where rows cannot be told apart (the tensor is then 2-D).
        count: number of tokens of one item at the probed shapes; 0 where `axis` is None.
        batch: extent of the other axis at the probed shapes.
        fixed: whether the number of tokens is the same for all inputs.
    """

    tensor: str
    channels: int
    rank: int = 3
    axis: int | None = None
    count: int = 0
    batch: int = 0
    fixed: bool = False


def as_tokens(writer: GraphWriter, study: Study, tensor: str, channel_axis: int) -> Tokens:
    """Append what it takes to see `tensor` as (batch, tokens, channels) in float32.

    Args:
        writer: the measuring graph.
        study: of the model.
        tensor: a linear layer's input.
        channel_axis: its axis of channels.
    """
    shape = study.facts.shape(tensor) or ()
    other = study.other.shape(tensor) or ()
    order = list(range(len(shape)))
    order.append(order.pop(channel_axis % len(shape)))
    x = as_float(writer, study, tensor)
    if order != sorted(order):
        x = writer.one("Transpose", [x], perm=order)
    shape, other = tuple(shape[k] for k in order), tuple(other[k] for k in order) if other else ()
    channels = shape[-1]
    if len(shape) == 2:
        return _rows(writer, study, tensor, x, channels)
    fixed = shape[1:-1] == other[1:-1] or not other
    if len(shape) == 3 and study.dynamic_batch and other and shape[0] == other[0] and shape[1] != other[1]:
        return Tokens(x, channels, 3, 0, shape[0], shape[1], True)  # (tokens, batch, channels), as torch.nn has it
    count = 1
    for extent in shape[1:-1]:
        count *= extent
    if len(shape) > 3:
        x = writer.reshape(x, [0, -1, channels])
    return Tokens(x, channels, 3, 1, count, shape[0], fixed)


def as_float(writer: GraphWriter, study: Study, tensor: str) -> str:
    """The tensor in float32: half precision could not hold the sums."""
    if study.facts.elem_type(tensor) in (onnx.TensorProto.FLOAT, 0):
        return tensor
    return writer.one("Cast", [tensor], to=onnx.TensorProto.FLOAT)


def _rows(writer: GraphWriter, study: Study, tensor: str, x: str, channels: int) -> Tokens:
    """A 2-D tensor: its rows are items times tokens, in the order of the reshape that made them."""
    source = _reshaped_from(study, tensor)
    if source is None:
        return Tokens(x, channels, 2)
    shape, other = study.facts.shape(source) or (), study.other.shape(source) or ()
    rows = (study.facts.shape(tensor) or (0,))[0]
    if len(shape) < 3 or shape[0] * shape[1] != rows or not other:
        return Tokens(x, channels, 2)
    if shape[1] == other[1]:
        return Tokens(writer.reshape(x, [-1, shape[1], channels]), channels, 3, 1, shape[1], shape[0], True)
    if shape[0] == other[0]:
        return Tokens(writer.reshape(x, [shape[0], -1, channels]), channels, 3, 0, shape[0], shape[1], True)
    return Tokens(x, channels, 2)


def _reshaped_from(study: Study, tensor: str) -> str | None:
    """The tensor of rank 3 or more that was flattened into the rows of `tensor`."""
    while (node := study.view.producer_of(tensor)) is not None:
        data = [n for n in node.input if n and not study.facts.is_constant(n) and len(study.facts.shape(n) or ()) > 1]
        if not data:
            return None
        if node.op_type in ("Reshape", "Flatten"):
            if len(study.facts.shape(data[0]) or ()) > 2:
                return data[0]
        elif node.op_type not in _ROW_KEEPING:
            return None
        tensor = data[0]
    return None
