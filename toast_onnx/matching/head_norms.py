"""Norms of queries and keys by head (q/k norm), in any spelling: found by running their nodes on a few vectors.

LayerNorm, RMSNorm and division by the length are one thing behind centred weights: y = g x / sqrt(mean(x^2) + eps) + b.
For LayerNorm x is the layer's output less its mean over the head, which is linear in the weights; a length is the root
of the mean of squares times sqrt(d), which the gain takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from toast_onnx.errors import ModelError
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.operators import MEASURING, MOVEMENT
from toast_onnx.reasons import Kind

_VECTORS = 16
_TOLERANCE = 1e-4
_LARGE, _SMALL = 1e3, 1e-3  # scales of vectors to which eps is nothing, and of those that tell it
_LEAST_EPS = 1e-12


@dataclass(frozen=True)
class HeadNorm:
    """A norm over the dimensions of each head.

    Attributes:
        start: what it reads, dimensions last.
        nodes: positions of its nodes, in graph order.
        end: what it makes.
        centred: whether the mean over the dimensions is taken off first.
        gain: (d,) factor of each dimension.
        bias: (d,) addend of each dimension.
        eps: what is added to the mean of squares.
    """

    start: str
    nodes: tuple[int, ...]
    end: str
    centred: bool
    gain: np.ndarray
    bias: np.ndarray
    eps: float


def match_norm(view: GraphView, facts: Facts, core: Sequence[int], start: str) -> HeadNorm:
    """The longest run of nodes behind a tensor that is a norm over its last axis.

    Args:
        view: the graph.
        facts: its facts.
        core: positions of the core's nodes, in front of which it ends.
        start: queries or keys by head.

    Raises:
        Decline: there is none, or something else reads what lies inside.
    """
    shape = facts.shape(start)
    if shape is None or facts.elem_type(start) != onnx.TensorProto.FLOAT:
        raise Kind.HALF_NORM.decline("norms of queries and keys are looked into in float32 alone")
    d = shape[-1]
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((_VECTORS, d)) * np.exp(rng.standard_normal((_VECTORS, 1)))).astype(np.float32)
    lead = (1,) * (len(shape) - 2)
    values = {start: np.concatenate([_LARGE * x, _SMALL * x]).reshape(*lead, 2 * _VECTORS, d)}
    found: HeadNorm | None = None
    nodes: list[int] = []
    for i in _evaluated(view, facts, core, start, values):
        nodes.append(i)
        end = view.nodes[i].output[0]
        y = values.get(end)
        if y is not None and y.shape == values[start].shape:
            fitted = _fitted(values[start].reshape(-1, d), y.reshape(-1, d))
            if fitted is not None:
                inside = _inside(view, nodes, start, end)
                found = found if inside is None else HeadNorm(start, inside, end, *fitted)
    if found is None:
        raise Kind.NORM.decline("what it passes through is no norm over the dimensions of a head")
    return found


def _evaluated(
    view: GraphView, facts: Facts, core: Sequence[int], start: str, values: dict[str, np.ndarray]
) -> Iterator[int]:
    """Nodes behind a tensor, in graph order, that compute on its value and constants alone; theirs join `values`."""
    pending = set(view.consumers.get(start, []))
    while pending:
        i = min(pending)
        pending.remove(i)
        node = view.nodes[i]
        if i in core or node.op_type in MOVEMENT - {"Expand"} | MEASURING:
            continue
        inputs = [values.get(name, facts.value(name)) if name else None for name in node.input]
        if any(value is None and name for value, name in zip(inputs, node.input, strict=True)):
            continue  # reads what is made later, or something else
        try:
            made = inputs[:1] if node.op_type == "Expand" else facts.evaluate(node, inputs)  # broadcast by its readers
        except ModelError:
            continue
        for name, value in zip(node.output, made, strict=False):
            if name and value is not None:
                values[name] = value
                pending.update(view.consumers.get(name, []))
        yield i


def _inside(view: GraphView, nodes: Sequence[int], start: str, end: str) -> tuple[int, ...] | None:
    """The nodes between two tensors; None where something else reads what they make."""
    needed, pending = set[int](), [end]
    while pending:
        i = view.producer.get(pending.pop(), -1)
        if i in nodes and i not in needed:
            needed.add(i)
            pending.extend(name for name in view.nodes[i].input if name != start)
    made = [start, *(name for i in needed for name in view.nodes[i].output if name and name != end)]
    readers = {i for name in made for i in view.consumers.get(name, [])}
    outside = [i for i in readers - needed if view.nodes[i].op_type not in MEASURING]
    return None if outside or any(name in view.outputs for name in made) else tuple(sorted(needed))


def _fitted(x: np.ndarray, y: np.ndarray) -> tuple[bool, np.ndarray, np.ndarray, float] | None:
    """(centred, gain, bias, eps) of a norm that makes y of x; the second half of the vectors (n, d) is small."""
    half = len(x) // 2
    for centred in (False, True):
        v = (x - x.mean(axis=1, keepdims=True) if centred else x).astype(np.float64)
        mean = np.square(v).mean(axis=1, keepdims=True)
        unit, seen = (v / np.sqrt(mean))[:half], y[:half].astype(np.float64)
        off = unit - unit.mean(axis=0)
        gain = (off * seen).sum(axis=0) / np.square(off).sum(axis=0)
        bias = seen.mean(axis=0) - gain * unit.mean(axis=0)
        scale = float(np.abs(seen).max())
        if scale == 0 or float(np.abs(gain * unit + bias - seen).max()) > 10 * _TOLERANCE * scale:
            continue
        bias = np.where(np.abs(bias) > _TOLERANCE * scale, bias, 0.0)
        alive = np.abs(gain) > _TOLERANCE * np.abs(gain).max()
        shrunk = ((y[half:] - bias) / np.where(alive, gain, 1.0))[:, alive]
        eps = float(np.median(np.square(v[half:, alive]).sum(axis=1) / np.square(shrunk).sum(axis=1) - mean[half:, 0]))
        return centred, gain.astype(np.float32), bias.astype(np.float32), max(eps, _LEAST_EPS)
    return None
