"""Keeping shape arithmetic true: whatever reads a shrunken tensor's shape goes on seeing the old extents.

Exporters compute reshape targets and even attention scales from `Shape` nodes. After pruning, a Shape of a shrunken
tensor would leak the new width into arithmetic that was written for the old one (a scale 1/sqrt(head_dim), say).
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from toast_onnx.errors import MatchError
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.model import Model
from toast_onnx.surgery.edit import GraphEdit, tidy


def settle_shapes(model: Model, edit: GraphEdit, view: GraphView, facts: Facts, other: Facts) -> None:
    """Make the surviving Shape nodes of shrunken or replaced tensors return the old extents (in place).

    Args:
        model: the edited model, tidied.
        edit: the edit it came from; says which tensors changed.
        view: the original graph.
        facts: facts of the original graph at the probed shapes.
        other: the same at other shapes of the dynamic axes.

    Raises:
        MatchError: a dynamic shape is read of a tensor that has no counterpart in the new graph.
    """
    nodes: list[onnx.NodeProto] = []
    made = {name for node in model.proto.graph.node for name in node.output}
    settled = False
    for node in model.proto.graph.node:
        original = bool(node.output) and node.output[0] in view.producer
        tensor = node.input[0] if node.input else ""
        touched = tensor in edit.changed or (tensor in view.producer and tensor not in made)
        if original and node.op_type in ("Shape", "Size") and touched:
            nodes.extend(_frozen(edit, facts, other, node, tensor, tensor in made))
            settled = True
        else:
            nodes.append(node)
    if settled:
        del model.proto.graph.node[:]
        model.proto.graph.node.extend(nodes)
        tidy(model)


def _frozen(
    edit: GraphEdit, facts: Facts, other: Facts, node: onnx.NodeProto, tensor: str, survives: bool
) -> list[onnx.NodeProto]:
    """Nodes that give a Shape node's output the old extents."""
    shape, other_shape = facts.shape(tensor), other.shape(tensor)
    name = node.name or node.output[0]
    if shape is None or other_shape is None:
        raise MatchError(f"the shape of '{tensor}' is read by '{name}' and cannot be inferred")
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    old = np.asarray(shape, np.int64)[start:end]
    moving = (np.asarray(shape) != np.asarray(other_shape))[start:end]
    if not moving.any():
        value = old if node.op_type == "Shape" else np.asarray(np.prod(shape), np.int64)
        return [_constant(value, node.output[0], edit.fresh(f"{name}/frozen"))]
    if tensor not in edit.changed or node.op_type == "Size":
        raise MatchError(f"'{name}' reads the dynamic shape of '{tensor}', which has no counterpart after pruning")
    stand_in, axis = edit.changed[tensor]
    keep = (np.arange(len(shape)) != axis % len(shape))[start:end]
    moved = onnx.NodeProto()
    moved.CopyFrom(node)
    moved.input[0] = tensor if survives else stand_in
    moved.output[0] = edit.fresh(f"{name}/new_shape")
    return [moved, *restored(edit, moved.output[0], keep, np.where(keep, 0, old), node.output[0], name)]


def restored(
    edit: GraphEdit, shape: str, keep: np.ndarray, values: np.ndarray, output: str, name: str
) -> list[onnx.NodeProto]:
    """Nodes for output = shape * keep + values: entries of a shape vector replaced by fixed numbers."""
    mask = edit.fresh(f"{name}/kept_axes")
    fixed = edit.fresh(f"{name}/fixed_axes")
    masked = edit.fresh(f"{name}/masked")
    return [
        _constant(keep.astype(np.int64), mask, edit.fresh(f"{name}/Constant")),
        _constant(values.astype(np.int64), fixed, edit.fresh(f"{name}/Constant")),
        onnx.helper.make_node("Mul", [shape, mask], [masked], name=edit.fresh(f"{name}/Mul")),
        onnx.helper.make_node("Add", [masked, fixed], [output], name=edit.fresh(f"{name}/Add")),
    ]


def _constant(value: np.ndarray, output: str, name: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], [output], name=name, value=onnx.numpy_helper.from_array(value))
