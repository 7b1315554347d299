"""Keeping shape arithmetic true: whatever reads a shrunken tensor's shape goes on seeing the old extents.

Exporters compute reshape targets and even attention scales from `Shape` nodes. After pruning, a Shape of a shrunken
tensor would leak the new width into arithmetic that was written for the old one (a scale 1/sqrt(head_dim), say).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from toast_onnx.edit import GraphEdit, OldShape, tidy
from toast_onnx.errors import MatchError
from toast_onnx.matching.facts import Probe
from toast_onnx.matching.graph import attribute
from toast_onnx.matching.operators import MEASURING
from toast_onnx.model import Model


def settle_shapes(model: Model, edit: GraphEdit, probe: Probe) -> None:
    """Make the surviving Shape nodes of shrunken or replaced tensors return the old extents (in place).

    Args:
        model: the edited model, tidied.
        edit: the edit it came from; says which tensors changed.
        probe: the graph and its facts.

    Raises:
        MatchError: a dynamic shape is read of a tensor that has no counterpart in the new graph.
    """
    view = probe.view
    nodes: list[onnx.NodeProto] = []
    made = {name for node in model.proto.graph.node for name in node.output}
    settled = False
    for node in model.proto.graph.node:
        original = bool(node.output) and node.output[0] in view.producer
        tensor = node.input[0] if node.input else ""
        touched = tensor in edit.changed or (tensor in view.producer and tensor not in made)
        if original and node.op_type in MEASURING and touched:
            nodes.extend(_frozen(edit, probe, node, tensor))
            settled = True
        else:
            nodes.append(node)
    if settled:
        del model.proto.graph.node[:]
        model.proto.graph.node.extend(nodes)
        tidy(model)


def _frozen(edit: GraphEdit, probe: Probe, node: onnx.NodeProto, tensor: str) -> list[onnx.NodeProto]:
    """Nodes that give a Shape node's output the old extents."""
    facts, other = probe.facts, probe.other
    shape, other_shape = facts.shape(tensor), other.shape(tensor)
    name = node.name or node.output[0]
    if shape is None or other_shape is None:
        raise MatchError(f"the shape of '{tensor}' is read by '{name}' and cannot be inferred")
    start: Any = attribute(node, "start", 0)
    end: Any = attribute(node, "end", None)
    if shape == other_shape:
        value = (
            np.asarray(shape, np.int64)[start:end] if node.op_type == "Shape" else np.asarray(np.prod(shape), np.int64)
        )
        return [_constant(value, node.output[0], edit.fresh(f"{name}/frozen"))]
    if tensor not in edit.changed or node.op_type == "Size":
        raise MatchError(f"'{name}' reads the dynamic shape of '{tensor}', which has no counterpart after pruning")
    origins = edit.changed[tensor].origins[start:end]
    axes = np.asarray([0 if isinstance(o, int) else o[0] for o in origins], np.int64)
    times = np.asarray([0 if isinstance(o, int) else o[1] for o in origins], np.int64)
    fixed = np.asarray([o if isinstance(o, int) else 0 for o in origins], np.int64)
    extents, picked, index = (edit.fresh(f"{name}/{part}") for part in ("extents", "picked", "axes"))
    return [
        onnx.helper.make_node("Shape", [edit.changed[tensor].tensor], [extents], name=edit.fresh(f"{name}/Shape")),
        _constant(axes, index, edit.fresh(f"{name}/Constant")),
        onnx.helper.make_node("Gather", [extents, index], [picked], name=edit.fresh(f"{name}/Gather"), axis=0),
        *restored(edit, picked, times, fixed, node.output[0], name),
    ]


def own_origins(probe: Probe, tensor: str) -> tuple[int | tuple[int, int], ...]:
    """Origins of a tensor's old extents where the tensor itself survives: dynamic axes are its own.

    Raises:
        MatchError: its shape is unknown.
    """
    facts, other = probe.facts, probe.other
    shape, other_shape = facts.shape(tensor), other.shape(tensor)
    if shape is None or other_shape is None:
        raise MatchError(f"the shape of '{tensor}' cannot be inferred")
    return tuple(a if a == b else (k, 1) for k, (a, b) in enumerate(zip(shape, other_shape, strict=True)))


def keep_own_shapes(edit: GraphEdit, probe: Probe, tensors: Iterable[str]) -> None:
    """Note for tensors that survive that their old extents can be read on themselves."""
    for tensor in tensors:
        edit.changed[tensor] = OldShape(tensor, own_origins(probe, tensor))


def restored(
    edit: GraphEdit, shape: str, times: np.ndarray, values: np.ndarray, output: str, name: str
) -> list[onnx.NodeProto]:
    """Nodes for output = shape * times + values: entries of a shape vector scaled, or replaced by fixed numbers."""
    mask = edit.fresh(f"{name}/times")
    fixed = edit.fresh(f"{name}/fixed_axes")
    masked = edit.fresh(f"{name}/masked")
    return [
        _constant(times.astype(np.int64), mask, edit.fresh(f"{name}/Constant")),
        _constant(values.astype(np.int64), fixed, edit.fresh(f"{name}/Constant")),
        onnx.helper.make_node("Mul", [shape, mask], [masked], name=edit.fresh(f"{name}/Mul")),
        onnx.helper.make_node("Add", [masked, fixed], [output], name=edit.fresh(f"{name}/Add")),
    ]


def _constant(value: np.ndarray, output: str, name: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], [output], name=name, value=onnx.numpy_helper.from_array(value))
