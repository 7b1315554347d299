"""Writing a smaller feed-forward network into a graph.

fc1 loses outputs (and inputs, through a Gather), fc2 loses inputs; the nodes between stay, with their widths, split
sizes, slice bounds and per-channel constants cut to the units that are left.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper

from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Ffn
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.matching.linear import Linear, bias, weights
from toast_onnx.matching.probe import MOVEMENT
from toast_onnx.surgery.edit import GraphEdit, OldShape
from toast_onnx.surgery.shapes import own_origins, restored
from toast_onnx.surgery.weights import FfnWeights


def rewrite_ffn(
    edit: GraphEdit, view: GraphView, facts: Facts, other: Facts, ffn: Ffn, new: FfnWeights, name: str
) -> None:
    """Replace the layers of one feed-forward network and shrink what lies between.

    Args:
        edit: graph edit.
        view: the original graph.
        facts: facts at the probed shapes.
        other: facts at other shapes of the dynamic axes.
        ffn: the matched network.
        new: new weights.
        name: module path for new names.
    """
    keep = None
    if new.units is not None and not ffn.selects_at_exit:
        mask = np.zeros(ffn.width, bool)
        mask[new.units] = True
        keep = {tensor: mask[unit] for tensor, unit in ffn.unit_of.items()}
    x = ffn.entries[0].input
    if new.inputs is not None:
        first = min(e.node for e in ffn.entries)
        x = _gather(edit, first, x, new.inputs, f"{name}/fc1")
    if new.inputs is not None or keep is not None:
        for k, entry in enumerate(ffn.entries):
            _write_entry(edit, view, facts, entry, x, new, k, keep, f"{name}/fc1" if k == 0 else f"{name}/fc1_{k}")
    if keep is not None:
        for i in ffn.nodes:
            _shrink_node(edit, view, facts, other, ffn, keep, i)
        for tensor in ffn.unit_of:
            edit.changed[tensor] = OldShape(tensor, own_origins(facts, other, tensor))
    if new.fc2 is not None:
        hidden = ffn.fc2.input
        if new.units is not None and ffn.selects_at_exit:
            hidden = _gather(edit, ffn.fc2.node, hidden, new.units, f"{name}/fc2")
        _replace(edit, view, facts, ffn.fc2, hidden, *new.fc2, f"{name}/fc2")


def _gather(edit: GraphEdit, at: int, tensor: str, indices: np.ndarray, name: str) -> str:
    """Insert the selection of some of a tensor's last-axis channels."""
    index = edit.constant(f"{name}/inputs", indices.astype(np.int64))
    return edit.emit(at, "Gather", [tensor, index], edit.fresh(f"{name}/selected"), f"{name}/Gather", axis=-1)


def _write_entry(
    edit: GraphEdit,
    view: GraphView,
    facts: Facts,
    entry: Linear,
    x: str,
    new: FfnWeights,
    k: int,
    keep: dict[str, np.ndarray] | None,
    name: str,
) -> None:
    if new.entries is not None:
        w, b = new.entries[k]
    else:
        w = weights(view, facts, entry)
        old = bias(view, facts, entry)
        b = np.zeros(entry.out_features, w.dtype) if old is None else old
    if keep is not None:
        w, b = w[:, keep[entry.output]], b[keep[entry.output]]
    _replace(edit, view, facts, entry, x, w, b, name)


def _replace(
    edit: GraphEdit, view: GraphView, facts: Facts, linear: Linear, x: str, w: np.ndarray, b: np.ndarray, name: str
) -> None:
    """Put new weights into a layer's place; a bias appears only where there was one or the new one is not zero."""
    dtype = weights(view, facts, linear).dtype
    has_bias = linear.bias is not None or bool(b.any())
    edit.remove(linear.nodes)
    edit.linear(linear.node, linear, x, w.astype(dtype), b.astype(dtype) if has_bias else None, linear.output, name)


def _shrink_node(
    edit: GraphEdit, view: GraphView, facts: Facts, other: Facts, ffn: Ffn, keep: dict[str, np.ndarray], i: int
) -> None:
    """Cut one node between fc1 and fc2 to the kept units."""
    node = view.nodes[i]
    if node.output[0] not in keep:
        return
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    name = node.name or node.output[0]
    if node.op_type in MOVEMENT and node.domain in ("", "ai.onnx"):
        axis = ffn.channel_axes[node.input[0]]
        if node.op_type == "Reshape":
            if not _shrink_reshape(edit, facts, other, changed, ffn.channel_axes[node.output[0]], keep, i, name):
                return
        elif node.op_type == "Split":
            if int(attribute(node, "axis", 0)) % _rank(facts, node.input[0]) != axis:  # type: ignore[call-overload]
                return
            _shrink_split(edit, changed, [int(keep[o].sum()) for o in node.output], name)
        elif node.op_type == "Slice":
            _shrink_slice(edit, facts, changed, axis, keep[node.input[0]], name)
        elif node.op_type == "Gather":
            if int(attribute(node, "axis", 0)) % _rank(facts, node.input[0]) != axis:  # type: ignore[call-overload]
                return
            _shrink_gather(edit, facts, changed, keep[node.input[0]], name)
        elif node.op_type in ("Transpose", "Squeeze", "Unsqueeze", "Flatten"):
            return
        else:
            raise MatchError(f"{view.label(i)} moves hidden channels in a way that cannot be shrunk")
    elif not _shrink_constants(edit, facts, changed, ffn, keep, name):
        return
    edit.remove([i])
    edit.insert(i, changed)


def _rank(facts: Facts, tensor: str) -> int:
    return len(facts.shape(tensor) or ())


def _shrink_reshape(
    edit: GraphEdit,
    facts: Facts,
    other: Facts,
    node: onnx.NodeProto,
    axis: int,
    keep: dict[str, np.ndarray],
    at: int,
    name: str,
) -> bool:
    """Write the new width into a Reshape's target; False when the target names no width."""
    target, elsewhere = facts.value(node.input[1]), other.value(node.input[1])
    if target is None or elsewhere is None:
        raise MatchError(f"the target shape of '{name}' depends on the input's contents")
    if target[axis] <= 0:
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
    _drop_attributes(node, "split", "num_outputs")
    if edit.opset >= 13:
        del node.input[1:]
        node.input.append(edit.constant(f"{name}/sizes", np.asarray(sizes, np.int64)))
    else:
        node.attribute.append(onnx.helper.make_attribute("split", sizes))


def _shrink_slice(edit: GraphEdit, facts: Facts, node: onnx.NodeProto, axis: int, kept: np.ndarray, name: str) -> None:
    """Move the bounds along the channel axis to where the kept channels now begin and end."""
    if edit.opset < 10:
        raise MatchError(
            f"'{name}' slices hidden channels in an opset below 10; convert the model to opset 13 or newer"
        )
    rank = _rank(facts, node.input[0])
    starts, ends = (np.array(facts.value(node.input[k])).reshape(-1) for k in (1, 2))
    given = [facts.value(n) if n else None for n in node.input[3:]]
    axes = given[0].reshape(-1) if given and given[0] is not None else np.arange(starts.size)
    steps = given[1].reshape(-1) if len(given) > 1 and given[1] is not None else np.ones(starts.size, np.int64)
    before = np.concatenate([[0], np.cumsum(kept)])
    for k, a in enumerate(axes):
        if int(a) % rank != axis:
            continue
        if steps[k] != 1:
            raise MatchError(f"'{name}' takes every {int(steps[k])}th hidden channel, which cannot be shrunk")
        begin, end, _ = slice(int(starts[k]), int(ends[k])).indices(kept.size)
        starts[k], ends[k] = before[begin], before[end]
    node.input[1] = edit.constant(f"{name}/starts", starts)
    node.input[2] = edit.constant(f"{name}/ends", ends)


def _shrink_gather(edit: GraphEdit, facts: Facts, node: onnx.NodeProto, kept: np.ndarray, name: str) -> None:
    indices = np.array(facts.value(node.input[1])) % kept.size
    if indices.ndim != 1:
        raise MatchError(f"'{name}' gathers hidden channels into several axes, which cannot be shrunk")
    renumbered = np.cumsum(kept) - 1
    node.input[1] = edit.constant(f"{name}/indices", renumbered[indices[kept[indices]]].astype(np.int64))


def _shrink_constants(
    edit: GraphEdit, facts: Facts, node: onnx.NodeProto, ffn: Ffn, keep: dict[str, np.ndarray], name: str
) -> bool:
    """Slice a node's per-channel constants; False when it has none."""
    output = node.output[0]
    kept = keep[output]
    from_right = _rank(facts, output) - ffn.channel_axes[output]
    changed = False
    for k, tensor in enumerate(node.input):
        shape = facts.shape(tensor) if tensor else None
        if not shape or tensor in keep or not facts.is_constant(tensor):
            continue
        if node.op_type in ("Conv", "BatchNormalization"):
            axis = 0
        elif len(shape) >= from_right:
            axis = len(shape) - from_right
        else:
            continue
        if shape[axis] == 1:
            continue
        value = np.compress(kept, facts.array(tensor), axis=axis)
        node.input[k] = edit.constant(f"{tensor}/kept", value)
        changed = True
    if node.op_type == "Conv":
        _drop_attributes(node, "group")
        node.attribute.append(onnx.helper.make_attribute("group", int(kept.sum())))
    return changed


def _drop_attributes(node: onnx.NodeProto, *names: str) -> None:
    for a in [a for a in node.attribute if a.name in names]:
        node.attribute.remove(a)
