"""The norm in front of a layer and the layer scale behind it: what they multiply and add, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.matching.operators import MOVEMENT, PASSING, Effect, operators
from toast_onnx.matching.walks import downstream


@dataclass(frozen=True)
class Norm:
    """Gain and bias that a norm applies last.

    Attributes:
        gain: (channels,).
        bias: (channels,); zeros where the norm has none.
        found: whether a norm was found; otherwise gain is one and bias zero.
    """

    gain: np.ndarray
    bias: np.ndarray
    found: bool


def norm_before(view: GraphView, facts: Facts, tensor: str, channels: int) -> Norm:
    """The norm whose output `tensor` is, data movement (windows, padding) looked through.

    Args:
        view: the graph.
        facts: its facts.
        tensor: input of a linear layer.
        channels: number of channels of that tensor.
    """
    gain, shift, name = np.ones(channels), np.zeros(channels), tensor
    while (node := view.producer_of(name)) is not None:
        op = node.op_type
        if (taken := _taken(facts, node, channels)) is not None:
            inner = norm_before(view, facts, node.input[0], taken.source)
            return Norm(gain * inner.gain[taken.places], shift + gain * inner.bias[taken.places], inner.found)
        if op in MOVEMENT or op in PASSING:
            name = node.input[0]
        elif op in operators(Effect.NORMS) - {"LpNormalization"}:
            return _norm(facts, node.input[1], node.input[2] if len(node.input) > 2 else "", gain, shift)
        elif op in ("BatchNormalization", "InstanceNormalization"):
            return _norm(facts, node.input[1], node.input[2], gain, shift)
        elif op in operators(Effect.ADDS_AND_NORMS):
            beta = node.input[3] if op == "SkipLayerNormalization" and len(node.input) > 3 else ""
            return _norm(facts, node.input[2], beta, gain, shift)
        elif op in ("Add", "Mul") and (vector := _vector(facts, node.input, channels)) is not None:
            # A decomposed norm ends in Mul(gain) and Add(bias), met here in reverse.
            if op == "Add":
                shift = shift + gain * vector[0]
            else:
                gain = gain * vector[0]
            name = vector[1]
        else:
            return Norm(gain, shift, _normalizes(view, node))
    return Norm(np.ones(channels), np.zeros(channels), False)


@dataclass(frozen=True)
class _Taken:
    """Some of a tensor's channels: their places among all, (channels,), and how many there are of those."""

    places: np.ndarray
    source: int


def _taken(facts: Facts, node: onnx.NodeProto, channels: int) -> _Taken | None:
    """What a Gather with constant places takes of the channels on the last axis, as pruned inputs of fc1 are read."""
    if node.op_type != "Gather" or not facts.is_constant(node.input[1]):
        return None
    shape, places = facts.shape(node.input[0]), facts.array(node.input[1])
    axis = int(attribute(node, "axis", 0))  # type: ignore[call-overload]
    if shape is None or places.shape != (channels,) or axis % len(shape) != len(shape) - 1:
        return None
    return _Taken(places % shape[-1], shape[-1])


def _normalizes(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a node brings tokens to one size: it divides them, or multiplies them by the inverse of a root."""
    if node.op_type == "Mul":
        makers = (view.producer_of(name) for name in node.input)
        return any(maker is not None and maker.op_type in ("Reciprocal", "Div", "Pow") for maker in makers)
    return node.op_type in ("Div", "LpNormalization", "GroupNormalization")


def _norm(facts: Facts, gain: str, bias: str, outer: np.ndarray, shift: np.ndarray) -> Norm:
    scale = facts.array(gain).astype(np.float64).reshape(-1)
    offset = facts.array(bias).astype(np.float64).reshape(-1) if bias else np.zeros(1)
    if {scale.size, offset.size} - {1, outer.size}:  # it stands over other channels than the layer reads
        return Norm(np.ones(outer.size), np.zeros(outer.size), False)
    return Norm(outer * scale, shift + outer * offset, True)


def _vector(facts: Facts, inputs: object, channels: int) -> tuple[np.ndarray, str] | None:
    """(values, other input) when one of two inputs is a constant with one value a channel, images' included."""
    names = list(inputs)  # type: ignore[call-overload]
    for k in (0, 1):
        shape = facts.shape(names[k])
        along = shape is not None and channels in (shape[-1:] + shape[-3:-2])
        if facts.is_constant(names[k]) and shape and along and channels == int(np.prod(shape)):
            return facts.array(names[k]).astype(np.float64).reshape(-1), names[1 - k]
    return None


def layer_scale(view: GraphView, facts: Facts, tensor: str, channels: int) -> np.ndarray | None:
    """Factors (channels,) on the branch output `tensor` before it joins the residual stream; None for none."""
    for i, _ in downstream(view, [tensor], lambda i: view.nodes[i].op_type in MOVEMENT | PASSING):
        node = view.nodes[i]
        if node.op_type == "Mul" and (vector := _vector(facts, node.input, channels)) is not None:
            return vector[0]
    return None
