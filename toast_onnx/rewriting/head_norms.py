"""A norm over some of the dimensions of each head: the mean of all squares is told by those that stay."""

from __future__ import annotations

import numpy as np

from toast_onnx.edit import GraphEdit
from toast_onnx.matching.head_norms import HeadNorm
from toast_onnx.solving.weights import HeadWeights


def write_norm(edit: GraphEdit, norm: HeadNorm, new: HeadWeights, name: str) -> None:
    """Put a norm of the kept dimensions in the place of the old one.

    Args:
        edit: graph edit.
        norm: the norm as it was.
        new: new weights of the layer in front; all heads keep the same dimensions.
        name: module path for new names.
    """
    at, kept, x = norm.nodes[-1], new.slots[0], norm.start
    edit.remove(norm.nodes)
    share = kept.size / (norm.gain.size * new.energy)  # of the mean over those that stay, in the mean over all

    def emit(op: str, *inputs: str) -> str:
        return edit.emit(at, op, inputs, edit.fresh(f"{name}/{op}_output"), f"{name}/{op}")

    def number(what: str, value: object) -> str:
        return edit.constant(f"{name}/{what}", np.asarray(value, np.float32))

    square = emit("Mul", x, x)
    inputs, attributes = [square], {"axes": [-1]}
    if edit.opset >= 18:
        inputs, attributes = [square, edit.constant(f"{name}/axes", np.asarray([-1], np.int64))], {}
    over = f"{name}/ReduceMean"
    mean = edit.emit(at, "ReduceMean", inputs, edit.fresh(f"{over}_output"), over, keepdims=1, **attributes)
    whole = emit("Mul", mean, number("share", share))
    length = emit("Sqrt", emit("Add", whole, number("eps", norm.eps)))
    made = emit("Mul", emit("Div", x, length), number("gain", norm.gain[kept]))
    if norm.bias.any():
        made = emit("Add", made, number("bias", norm.bias[kept]))
    edit.rename(at, made, norm.end)
