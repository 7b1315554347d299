"""A norm over some of the dimensions of each head: the mean of all squares is told by those that stay."""

from __future__ import annotations

import numpy as np

from toast_onnx.edit import GraphEdit, PlaceWriter
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
    write, kept, x = PlaceWriter(edit, norm.nodes[-1], name), new.slots[0], norm.start
    edit.remove(norm.nodes)
    share = kept.size / (norm.gain.size * new.energy)  # of the mean over those that stay, in the mean over all

    mean = write.reduce("ReduceMean", write.one("Mul", [x, x]), [-1], keep=True)
    whole = write.one("Mul", [mean, write.constant(share, "share", np.float32)])
    length = write.one("Sqrt", [write.one("Add", [whole, write.constant(norm.eps, "eps", np.float32)])])
    gain = write.constant(norm.gain[kept], "gain", np.float32)
    made = write.one("Mul", [write.one("Div", [x, length]), gain])
    if norm.bias.any():
        made = write.one("Add", [made, write.constant(norm.bias[kept], "bias", np.float32)])
    edit.rename(norm.nodes[-1], made, norm.end)
