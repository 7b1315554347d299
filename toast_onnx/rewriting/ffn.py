"""Writing a smaller feed-forward network into a graph.

fc1 loses outputs (and inputs, through a Gather), fc2 loses inputs; the nodes between stay, with their widths, split
sizes, slice bounds and per-channel constants cut to the units that are left.
"""

from __future__ import annotations

import numpy as np

from toast_onnx.edit import GraphEdit
from toast_onnx.filling import Filling, ffn_fillings
from toast_onnx.matching.blocks import Ffn
from toast_onnx.matching.facts import Facts, Probe
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.linear import bias, weights
from toast_onnx.rewriting.shapes import keep_own_shapes
from toast_onnx.rewriting.shrinking import shrink_node
from toast_onnx.solving.weights import FfnWeights


def rewrite_ffn(edit: GraphEdit, probe: Probe, ffn: Ffn, new: FfnWeights, name: str) -> None:
    """Replace the layers of one feed-forward network and shrink what lies between.

    Args:
        edit: graph edit.
        probe: the graph and its facts.
        ffn: the matched network.
        new: new weights.
        name: module path for new names.
    """
    view, facts = probe.view, probe.facts
    keep = None
    if new.units is not None and not ffn.selects_at_exit:
        mask = np.zeros(ffn.width, bool)
        mask[new.units] = True
        keep = {tensor: mask[unit] for tensor, unit in ffn.unit_of.items()}
    x = ffn.entries[0].input
    if new.inputs is not None:
        first = min(e.node for e in ffn.entries)
        x = _gather(edit, first, x, new.inputs, f"{name}/fc1")
    layers = list(ffn_fillings(ffn, new))
    for k, layer in enumerate(layers[: len(ffn.entries)]):
        if layer.new is not None or layer.gone is not None:
            _replace(edit, view, facts, layer, x, f"{name}/fc1" if k == 0 else f"{name}/fc1_{k}")
    if keep is not None:
        for i in ffn.nodes:
            shrink_node(edit, probe, ffn.channel_axes, keep, i)
        keep_own_shapes(edit, probe, ffn.unit_of)
    if new.fc2 is not None:
        hidden = ffn.fc2.input
        if new.units is not None and ffn.selects_at_exit:
            hidden = _gather(edit, ffn.fc2.node, hidden, new.units, f"{name}/fc2")
        _replace(edit, view, facts, layers[-1], hidden, f"{name}/fc2")


def _gather(edit: GraphEdit, at: int, tensor: str, indices: np.ndarray, name: str) -> str:
    """Insert the selection of some of a tensor's last-axis channels."""
    index = edit.constant(f"{name}/inputs", indices.astype(np.int64))
    return edit.emit(at, "Gather", [tensor, index], edit.fresh(f"{name}/selected"), f"{name}/Gather", axis=-1)


def _replace(edit: GraphEdit, view: GraphView, facts: Facts, layer: Filling, x: str, name: str) -> None:
    """Put new weights into a layer's place; a bias appears only where there was one or the new one is not zero."""
    linear, old = layer.linear, weights(view, facts, layer.linear)
    w, b = layer.new or (old, bias(view, facts, linear))
    if layer.gone is not None:
        w, b = np.delete(w, layer.gone, axis=1), None if b is None else np.delete(b, layer.gone)
    has_bias = b is not None and (linear.bias is not None or bool(b.any()))
    edit.remove(linear.nodes)
    # Not copied where the type is right: new weights are kept beside the new graph.
    new_bias = np.asarray(b, old.dtype) if has_bias else None
    edit.linear(linear.node, linear, x, np.asarray(w, old.dtype), new_bias, linear.output, name)
