"""Cutting a node to the channels that are left: new widths, split sizes, slice bounds, indices and constants.

Used between fc1 and fc2, and between Q or K and the scores. The node stays what it is; only what names the old number
of channels changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import GraphEdit, drop_attributes
from toast_onnx.errors import MatchError
from toast_onnx.matching.facts import Facts, Probe, slice_operands
from toast_onnx.matching.graph import attribute, is_standard
from toast_onnx.matching.operators import MOVEMENT
from toast_onnx.rewriting.shapes import restored

Keep = Mapping[str, np.ndarray]


def shrink_node(
    edit: GraphEdit,
    probe: Probe,
    axes: Mapping[str, int],
    keep: Keep,
    i: int,
) -> None:
    """Cut one node to the kept channels; a node that names no number of channels stays untouched.

    Args:
        edit: graph edit.
        probe: the graph and its facts.
        axes: tensor name -> axis of its channels.
        keep: tensor name -> (extent of that axis,) whether each position stays.
        i: position of the node.

    Raises:
        MatchError: the node moves channels in a way that cannot be shrunk.
    """
    node = probe.view.nodes[i]
    if node.output[0] not in keep:
        return
    changed = edit.copy(i)
    name = node.name or node.output[0]
    if node.op_type in MOVEMENT and is_standard(node):
        names_width = _shrink_movement(edit, probe, changed, axes, keep, i, name)
    else:
        names_width = _shrink_operands(edit, probe.facts, changed, axes, keep, i)
    if names_width:
        edit.replace(i, changed)


def _shrink_movement(
    edit: GraphEdit, probe: Probe, node: onnx.NodeProto, axes: Mapping[str, int], keep: Keep, i: int, name: str
) -> bool:
    """Cut what moves channels; False where it names no number of them."""
    facts, source, made = probe.facts, node.input[0], node.output[0]
    axis = axes[source]
    along = int(attribute(node, "axis", 0)) % max(_rank(facts, source), 1)  # type: ignore[call-overload]
    if node.op_type in ("Split", "Gather") and along != axis:
        return False
    match node.op_type:
        case "Reshape":
            return _shrink_reshape(edit, probe, node, axes[made], keep, i, name)
        case "Expand":  # aligned on the right
            place = axes[made] - _rank(facts, made) + (facts.shape(node.input[1]) or (0,))[0]
            return place >= 0 and _shrink_reshape(edit, probe, node, place, keep, i, name)
        case "Split":
            _shrink_split(edit, node, [int(keep[o].sum()) for o in node.output], name)
        case "Slice":
            return _shrink_slice(edit, probe, node, axis, keep[source], name)
        case "Gather":
            _shrink_gather(edit, facts, node, keep[source], name)
        case "GatherND":
            batch = int(attribute(node, "batch_dims", 0))  # type: ignore[call-overload]
            if axis < batch + (facts.shape(node.input[1]) or (0,))[-1]:
                raise MatchError(f"{probe.view.label(i)} picks channels one by one, which cannot be shrunk")
            return False
        case "Transpose" | "Squeeze" | "Unsqueeze" | "Flatten" | "Concat" | "Tile":
            return False
        case _:
            raise MatchError(f"{probe.view.label(i)} moves channels in a way that cannot be shrunk")
    return True


def shrunk_operand(edit: GraphEdit, facts: Facts, at: int, tensor: str, axis: int, kept: np.ndarray) -> str:
    """An operand with the kept positions of one axis: a smaller constant, or a Gather where the graph computes it.

    What is computed from weights is not computed here: in half precision it would not be rounded as the graph does.

    Args:
        edit: graph edit.
        facts: facts of the original graph.
        at: position that reads the operand.
        tensor: name of the operand.
        axis: axis of the channels in it, not negative.
        kept: (extent,) whether each position stays.
    """
    if _is_stored(facts, tensor):
        return edit.constant(f"{tensor}/kept", np.compress(kept, facts.array(tensor), axis=axis))
    index = edit.constant(f"{tensor}/indices", np.flatnonzero(kept).astype(np.int64))
    return edit.emit(at, "Gather", [tensor, index], edit.fresh(f"{tensor}/kept"), f"{tensor}/Gather", axis=axis)


def _is_stored(facts: Facts, tensor: str) -> bool:
    """Whether a constant is a weight, moved at most."""
    view = facts.view
    while facts.is_constant(tensor):
        node = view.producer_of(tensor)
        if node is None or node.op_type == "Constant":
            return True
        if node.op_type not in MOVEMENT or node.op_type == "Concat" or not is_standard(node):
            return False
        tensor = node.input[0]
    return False


def _rank(facts: Facts, tensor: str) -> int:
    return len(facts.shape(tensor) or ())


def _shrink_reshape(
    edit: GraphEdit,
    probe: Probe,
    node: onnx.NodeProto,
    axis: int,
    keep: Keep,
    at: int,
    name: str,
) -> bool:
    """Write the new width into the target of a Reshape or Expand; False when the target names no width."""
    facts, other = probe.facts, probe.other
    target, elsewhere = facts.value(node.input[1]), other.value(node.input[1])
    if target is None or elsewhere is None:
        raise MatchError(f"the target shape of '{name}' depends on the input's contents")
    if target[axis] <= 0 or (node.op_type == "Expand" and target[axis] == 1):
        return False
    width = int(keep[node.output[0]].sum())
    fixed = np.arange(target.size) == axis
    if np.array_equal(target, elsewhere):
        node.input[1] = edit.constant(f"{name}/shape", np.where(fixed, width, target).astype(np.int64))
    else:
        shape = edit.fresh(f"{name}/shape")
        for made in restored(edit, node.input[1], ~fixed, np.where(fixed, width, 0), shape, name):
            edit.insert(at, made)
        node.input[1] = shape
    return True


def _shrink_split(edit: GraphEdit, node: onnx.NodeProto, sizes: list[int], name: str) -> None:
    drop_attributes(node, "split", "num_outputs")
    if edit.opset >= 13:
        del node.input[1:]
        node.input.append(edit.constant(f"{name}/sizes", np.asarray(sizes, np.int64)))
    else:
        node.attribute.append(onnx.helper.make_attribute("split", sizes))


def _shrink_slice(edit: GraphEdit, probe: Probe, node: onnx.NodeProto, axis: int, kept: np.ndarray, name: str) -> bool:
    """Move the bounds along the channel axis to where the kept channels now lie; False where they stay.

    channels        0 1 2 3 4 5 6 7       kept        0 2 3 6
    [2:6]               2 3 4 5           now lie     1 2        -> [1:3]
    """
    if edit.opset < 10:
        raise MatchError(f"'{name}' slices channels in an opset below 10; convert the model to opset 13 or newer")
    rank = _rank(probe.facts, node.input[0])
    starts, ends, axes, steps = slice_operands(probe.facts, node)
    old = starts.copy(), ends.copy(), steps.copy()
    for k, a in enumerate(axes):
        if int(a) % rank == axis:
            taken = np.arange(kept.size)[slice(int(starts[k]), int(ends[k]), int(steps[k]))]
            starts[k], ends[k], steps[k] = _bounds((np.cumsum(kept) - 1)[taken[kept[taken]]], name)
    if all(np.array_equal(a, b) for a, b in zip(old, (starts, ends, steps), strict=True)):
        return False
    elsewhere = [probe.other.value(n) for n in node.input[1:3]]
    same = [b is not None and np.array_equal(a, b.reshape(-1)) for a, b in zip(old[:2], elsewhere, strict=True)]
    if axes.size > 1 and not all(same):
        raise MatchError(f"'{name}' slices channels and a dynamic axis at once; export with a fixed image size")
    node.input[1] = edit.constant(f"{name}/starts", starts)
    node.input[2] = edit.constant(f"{name}/ends", ends)
    if not np.array_equal(steps, old[2]):
        del node.input[4:]
        node.input.append(edit.constant(f"{name}/steps", steps))
    return True


def _bounds(places: np.ndarray, name: str) -> tuple[int, int, int]:
    """(start, end, step) of a Slice that takes exactly these ascending places."""
    if places.size == 0:
        return 0, 0, 1
    step = int(places[1] - places[0]) if places.size > 1 else 1
    if step < 1 or (np.diff(places) != step).any():
        raise MatchError(f"'{name}' takes channels in a pattern that cannot be shrunk")
    return int(places[0]), int(places[-1]) + 1, step


def _shrink_gather(edit: GraphEdit, facts: Facts, node: onnx.NodeProto, kept: np.ndarray, name: str) -> None:
    indices = np.array(facts.value(node.input[1])) % kept.size
    if indices.ndim != 1:
        raise MatchError(f"'{name}' gathers channels into several axes, which cannot be shrunk")
    renumbered = np.cumsum(kept) - 1
    node.input[1] = edit.constant(f"{name}/indices", renumbered[indices[kept[indices]]].astype(np.int64))


def _shrink_operands(
    edit: GraphEdit, facts: Facts, node: onnx.NodeProto, axes: Mapping[str, int], keep: Keep, at: int
) -> bool:
    """Slice whatever enters a node with one value a channel; False when nothing does."""
    output = node.output[0]
    kept = keep[output]
    from_right = _rank(facts, output) - axes[output]
    changed = False
    for k, tensor in enumerate(node.input):
        shape = facts.shape(tensor) if tensor else None
        if not shape or tensor in keep:
            continue
        if node.op_type in ("Conv", "BatchNormalization"):
            axis = 0
        elif len(shape) >= from_right:
            axis = len(shape) - from_right
        else:
            continue
        if shape[axis] == 1:
            continue
        node.input[k] = shrunk_operand(edit, facts, at, tensor, axis, kept)
        changed = True
    if node.op_type == "Conv":
        drop_attributes(node, "group")
        node.attribute.append(onnx.helper.make_attribute("group", int(kept.sum())))
    return changed
