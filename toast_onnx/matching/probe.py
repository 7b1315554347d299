"""Which channel goes where: label a tensor's elements with their own numbers and run the nodes that only move data.

Whatever an exporter writes between a linear layer and the attention core (Reshape, Transpose, Split, Slice, Gather,
...), the labels that arrive say exactly where every channel went.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.operators import MOVEMENT, PASSING, QUANTIZED
from toast_onnx.reasons import Decline, Kind, Reason


@dataclass(frozen=True)
class Walk:
    """The way between a linear layer and one operand of an attention core.

    Attributes:
        linear: the layer at the far end.
        target: the operand's tensor name.
        nodes: positions of the nodes on the way, in graph order.
        scale: product of the constant factors on the way.
        blocked: what computes between `target` and the core, None where nothing does.
        repeats: whether heads are repeated between `target` and the core, for several queries each.
    """

    linear: Linear
    target: str
    nodes: tuple[int, ...]
    scale: float
    blocked: Reason | None = None
    repeats: bool = False

    @property
    def ends_early(self) -> bool:
        """Whether `target` is not the core's operand itself."""
        return self.blocked is not None or self.repeats


def data_inputs(view: GraphView, i: int) -> list[str]:
    """The inputs of a movement or passing node that carry data."""
    node = view.nodes[i]
    return list(node.input) if node.op_type == "Concat" else [node.input[0]]


def is_plain(view: GraphView, i: int) -> bool:
    """Whether a node only moves or passes its data on."""
    node = view.nodes[i]
    return is_standard(node) and (node.op_type in MOVEMENT or node.op_type in PASSING)


def scalar_factor(view: GraphView, facts: Facts, i: int) -> tuple[str, float] | None:
    """(data tensor, factor) when a node multiplies or divides its data by one known number, or adds nothing (1.0)."""
    node = view.nodes[i]
    if not is_standard(node):
        return None
    if node.op_type in ("Add", "Sub"):
        data = _unchanged_by_sum(facts, node)
        return None if data is None else (data, 1.0)
    if node.op_type not in ("Mul", "Div"):
        return None
    for k in (1, 0) if node.op_type == "Mul" else (1,):
        value = facts.value(node.input[k])
        if value is not None and value.size == 1 and _is_data(facts, node.input[1 - k]):
            factor = float(value.reshape(()))
            return node.input[1 - k], factor if node.op_type == "Mul" else 1.0 / factor
    return None


def _unchanged_by_sum(facts: Facts, node: onnx.NodeProto) -> str | None:
    """The operand that a sum or difference passes on as it is, because the other is all zeros; else None."""
    for k in (1, 0) if node.op_type == "Add" else (1,):
        zeros, data = facts.value(node.input[k]), node.input[1 - k]
        if zeros is None or zeros.dtype.kind != "f" or zeros.any() or not _is_data(facts, data):
            continue
        if facts.shape(data) == facts.shape(node.output[0]):
            return data
    return None


def passes(view: GraphView, facts: Facts, i: int) -> bool:
    """Whether a node computes nothing: it moves its data, passes it on, multiplies it by one or adds zero."""
    scaled = scalar_factor(view, facts, i)
    return is_plain(view, i) or (scaled is not None and scaled[1] == 1.0)


def walk_back(view: GraphView, facts: Facts, linears: Mapping[str, Linear], target: str, what: str) -> Walk:
    """Follow a core's operand back to the one linear layer it comes from.

    Where something on the way computes (a q/k norm, a rotary embedding), the walk ends at the last tensor before it
    that everything passes through, and says what blocks it.

    Raises:
        Decline: there is no such layer, there are several, or the way cannot be followed.
    """
    found, nodes, opaque, constants = _sources(view, facts, linears, target, what)
    if not found:
        raise Kind.CONSTANT.decline("{part} is made of constants (learned queries), not by a linear layer", part=what)
    if constants:
        raise Kind.CONSTANT.decline("{part} holds constants besides what a linear layer makes", part=what)
    if len(found) > 1:
        raise Kind.NO_LAYER.decline("{part} comes from {layers} linear layers", part=what, layers=len(found))
    (linear,) = found
    if linear.small is not None:
        raise Decline(linear.small.within("the weights of {part} are {}", what))
    if not opaque:
        return Walk(linear, target, tuple(sorted(nodes)), _total_scale(view, facts, nodes, what))
    reason = _computing(view, min(opaque), "{part} passes through {node}, which computes on it", what)
    boundary, before = _last_common(view, facts, linear, target, nodes, what)
    return Walk(linear, boundary, tuple(sorted(before)), 1.0, reason)


def _sources(
    view: GraphView, facts: Facts, linears: Mapping[str, Linear], target: str, what: str
) -> tuple[list[Linear], set[int], set[int], bool]:
    """The layers that a tensor comes from, all nodes on the way, those that compute, and whether constants join."""
    found: dict[str, Linear] = {}
    nodes: set[int] = set()
    opaque: set[int] = set()
    constants = False
    pending = [target]
    while pending:
        tensor = pending.pop()
        if tensor in linears:
            found[tensor] = linears[tensor]
            continue
        i = view.producer.get(tensor)
        if facts.is_constant(tensor) and i not in nodes:
            constants = True
            continue
        if i is None:
            text = "{part} comes from the graph input '{tensor}', not from a linear layer"
            raise Kind.NO_LAYER.decline(text, part=what, tensor=tensor)
        if i not in nodes:
            nodes.add(i)
            data = _followed(view, facts, i)
            if data is None and view.nodes[i].op_type in QUANTIZED:
                text = "{part} passes through {node}; prune first, then quantize"
                raise view.decline(i, Kind.QUANTIZED, text, part=what)
            if data is None:
                opaque.add(i)
                data = _activations(view, facts, i)
            pending.extend(data)
    return list(found.values()), nodes, opaque, constants


def _followed(view: GraphView, facts: Facts, i: int) -> list[str] | None:
    """The data of a node that moves it, passes it on or multiplies it by one number; None of one that computes."""
    if is_plain(view, i):
        return data_inputs(view, i)
    scaled = scalar_factor(view, facts, i)
    return None if scaled is None else [scaled[0]]


def _activations(view: GraphView, facts: Facts, i: int) -> list[str]:
    return [name for name in view.nodes[i].input if name and _is_data(facts, name)]


def _is_data(facts: Facts, name: str) -> bool:
    """Whether a tensor is neither a weight nor shape arithmetic; small tokens that are repeated for the batch are."""
    value = facts.value(name)
    return not facts.is_constant(name) and (value is None or (value.size > 1 and value.dtype.kind == "f"))


def _total_scale(view: GraphView, facts: Facts, nodes: Iterable[int], what: str) -> float:
    factors = [scaled[1] for i in nodes if (scaled := scalar_factor(view, facts, i)) is not None]
    if factors and any(view.nodes[i].op_type == "Concat" for i in nodes):
        raise Kind.SCALE.decline("{part} is put together from differently scaled parts", part=what)
    return float(np.prod(factors)) if factors else 1.0


def before_repeats(view: GraphView, facts: Facts, walk: Walk, what: str) -> Walk:
    """End a walk in front of what repeats heads for several queries each; the same walk where nothing does.

    Raises:
        Decline: something is repeated, but there is no tensor before that which all of it comes from.
    """
    if walk.blocked is not None:
        return walk
    labels = propagate(view, facts, walk.nodes, walk.linear.output)
    if walk.target not in labels or not _repeated(labels[walk.target]):
        return walk
    single = frozenset(name for name, array in labels.items() if not _repeated(array))
    target, before = _last_common(view, facts, walk.linear, walk.target, set(walk.nodes), what, single)
    return Walk(walk.linear, target, tuple(sorted(before)), 1.0, repeats=True)


def _repeated(labels: np.ndarray) -> bool:
    """Whether a label occurs more than once; 0 is none."""
    return bool(np.bincount(labels.reshape(-1))[1:].max(initial=0) > 1)


def _last_common(
    view: GraphView,
    facts: Facts,
    linear: Linear,
    target: str,
    nodes: set[int],
    what: str,
    among: frozenset[str] | None = None,
) -> tuple[str, set[int]]:
    """The last moved-only tensor that every way from the layer to the target passes, and the nodes before it.

    Only tensors `among` those given count, where some are.
    """
    moved = {linear.output: set[int]()}
    for i in sorted(nodes):
        if is_plain(view, i) and all(name in moved for name in data_inputs(view, i)):
            before = set().union(*(moved[name] for name in data_inputs(view, i)), {i})
            moved.update({name: before for name in view.nodes[i].output if name})
    for tensor in sorted(moved, key=lambda name: -view.producer[name]):
        if among is not None and tensor not in among:
            continue
        if tensor != linear.output and _moves_last_axis(view, view.producer[tensor]):
            continue  # such as in front of a pooling over channels-first images: dimensions are read on the last axis
        if not _reaches(view, facts, target, linear.output, nodes, around=tensor):
            return tensor, moved[tensor]
    raise Kind.UNFOLLOWED.decline("the way of {part} from its linear layer cannot be followed", part=what)


def _moves_last_axis(view: GraphView, i: int) -> bool:
    node = view.nodes[i]
    if node.op_type != "Transpose":
        return False
    perm = attribute(node, "perm", [])
    return not perm or perm[-1] != len(perm) - 1  # type: ignore[index,arg-type]


def _reaches(view: GraphView, facts: Facts, start: str, goal: str, nodes: set[int], around: str) -> bool:
    """Whether `goal` is reached backwards from `start` within `nodes` without passing the tensor `around`."""
    seen, pending = {around}, [start]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        if name == goal:
            return True
        seen.add(name)
        i = view.producer.get(name)
        if i in nodes:
            pending.extend(data_inputs(view, i) if is_plain(view, i) else _activations(view, facts, i))
    return False


def _computing(view: GraphView, i: int, text: str, what: str) -> Reason:
    """What to say of a node that computes on the way, and of which kind it is."""
    op = view.nodes[i].op_type
    if op in QUANTIZED:
        return Kind.QUANTIZED.says(f"{text}; prune first, then quantize", node=view.label(i), part=what)
    hint = " across the channels of a head (q/k norm)" if "Normalization" in op else ""
    return Kind.COMPUTED.says(text + hint, node=view.label(i), part=what)


def walk_forward(
    view: GraphView,
    facts: Facts,
    linears_by_input: Mapping[str, list[Linear]],
    start: str,
    what: str,
    total: int | None = None,
) -> Walk:
    """Follow data movement from an attention core's output to the one linear layer that reads it.

    Args:
        view: the graph.
        facts: its facts.
        linears_by_input: linear layers by what they read.
        start: the attention core's output.
        what: its name in messages.
        total: position of a sum on the way whose other addend is understood, None where there is none.

    Raises:
        Decline: something else reads it, or a node on the way computes something.
    """
    nodes: set[int] = set()
    found: dict[int, Linear] = {}
    pending = [start]
    while pending:
        tensor = pending.pop()
        if tensor in view.outputs:
            raise Kind.OUTPUT.decline("{part} is also an output of the graph ('{tensor}')", part=what, tensor=tensor)
        readers = {linear.node: linear for linear in linears_by_input.get(tensor, ())}
        for i in view.readers(tensor):
            if i in readers:
                found[i] = readers[i]
            elif i == total or passes(view, facts, i):
                if i not in nodes:
                    nodes.add(i)
                    pending.extend(name for name in view.nodes[i].output if name)
            else:
                text = "{part} is read by {node} before the output projection"
                raise Decline(_computing(view, i, text, what))
    if len(found) != 1:
        raise Kind.NO_LAYER.decline("{part} goes to {layers} linear layers", part=what, layers=len(found))
    (linear,) = found.values()
    if linear.small is not None:
        raise Decline(linear.small.within("the weights behind {part} are {}", what))
    return Walk(linear, linear.input, tuple(sorted(nodes)), 1.0)


def check_readers(view: GraphView, tensors: Iterable[str], allowed: Iterable[int], what: str) -> None:
    """Make sure that nothing but `allowed` nodes (and shape arithmetic) reads the given tensors.

    Raises:
        Decline: something else does.
    """
    permitted = set(allowed)
    for tensor in tensors:
        if tensor in view.outputs:
            raise Kind.OUTPUT.decline("{part} is also an output of the graph ('{tensor}')", part=what, tensor=tensor)
        for i in view.readers(tensor):
            if i not in permitted:
                raise view.decline(i, Kind.READ, "{part} is also read by {node}", part=what)


def propagate(view: GraphView, facts: Facts, nodes: Iterable[int], seed: str) -> dict[str, np.ndarray]:
    """Label the tensor `seed` with 1, 2, 3, ... and run the given movement nodes on the labels.

    Returns:
        Tensor name -> labels (int64, shape of the tensor); 0 marks elements that do not come from the seed.

    Raises:
        Decline: a shape or an operand is unknown.
    """
    shape = facts.shape(seed)
    if shape is None:
        raise Kind.SHAPE.decline("the shape of the tensor '{tensor}' cannot be inferred", tensor=seed)
    labels = {seed: np.arange(1, int(np.prod(shape)) + 1, dtype=np.int64).reshape(shape)}
    for i in sorted(nodes):
        node = view.nodes[i]
        data = data_inputs(view, i)
        if (scaled := scalar_factor(view, facts, i)) is not None:
            data = [scaled[0]]
        elif node.op_type == "Add":  # of two activations: the one that is followed
            data = [name for name in node.input if name in labels]
        if not any(name in labels for name in data):
            continue
        if node.op_type not in MOVEMENT:
            labels[node.output[0]] = labels[data[0]]
            continue
        operands = [labels[name] if name in labels else _operand(view, facts, i, name) for name in node.input]
        for name, value in zip(node.output, facts.evaluate(node, operands), strict=True):
            if name:
                labels[name] = value.astype(np.int64, copy=False)
    return labels


def carried(view: GraphView, facts: Facts, i: int, arrays: Iterable[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """What a movement node makes of each of several arrays of labels, by the name of its output.

    Raises:
        Decline: where it moves them to depends on the input's contents.
    """
    node = view.nodes[i]
    operands = [facts.value(name) if name else None for name in node.input[1:]]
    if any(v is None and name for v, name in zip(operands, node.input[1:], strict=True)):
        raise view.decline(i, Kind.CONTENTS, "an operand of {node} depends on the input's contents")
    results = [facts.evaluate(node, [array, *operands]) for array in arrays]
    return {name: [each[k] for each in results] for k, name in enumerate(node.output) if name}


def _operand(view: GraphView, facts: Facts, i: int, name: str) -> np.ndarray | None:
    """Shape or index operand of a movement node; data that does not come from the seed counts as zeros."""
    if not name:
        return None
    value = facts.value(name)
    if view.nodes[i].op_type == "Concat":
        shape = facts.shape(name)
        if shape is not None:
            return np.zeros(shape, np.int64)
    if value is None and facts.is_constant(name):
        value = facts.array(name)
    if value is None:
        raise view.decline(
            i, Kind.CONTENTS, "an operand of {node} ('{tensor}') depends on the input's contents", tensor=name
        )
    return value
