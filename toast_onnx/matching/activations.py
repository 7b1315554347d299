"""Names of activations, whatever operators spell them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute

_SINGLE = {
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "Elu": "elu",
    "Selu": "selu",
    "Celu": "celu",
    "HardSwish": "hardswish",
    "Mish": "mish",
    "HardSigmoid": "hardsigmoid",
    "Swish": "silu",
    "ThresholdedRelu": "thresholded_relu",
    "PRelu": "prelu",
}
_CONTRIB = {"Gelu": "gelu", "BiasGelu": "gelu", "FastGelu": "gelu_tanh"}
#: Operators that an activation is spelled with, those of others among them later -> its name.
_SPELLED = (
    ({"Erf"}, "gelu"),
    ({"Softplus", "Tanh"}, "mish"),
    ({"Softplus"}, "softplus"),
    ({"Tanh", "Mul"}, "gelu_tanh"),
    ({"Tanh"}, "tanh"),
)


def activation_name(view: GraphView, facts: Facts, nodes: Sequence[int]) -> str | None:
    """Name of the activation that a region of elementwise nodes computes; None when it has no nonlinearity."""
    present = {view.nodes[i].op_type: view.nodes[i] for i in nodes}
    for op, node in present.items():
        contrib = node.domain == "com.microsoft"
        if contrib and op == "QuickGelu":
            return "silu" if attribute(node, "alpha", 1.702) == 1.0 else "quick_gelu"
        name = _SINGLE.get(op) or (_CONTRIB.get(op) if contrib else None)
        if name is not None:
            return name
    if "Gelu" in present:
        return "gelu_tanh" if attribute(present["Gelu"], "approximate", b"none") == b"tanh" else "gelu"
    for operators, name in _SPELLED:
        if operators <= present.keys():
            return name
    return _sigmoid_name(facts, present["Sigmoid"], view) if "Sigmoid" in present else None


def _sigmoid_name(facts: Facts, node: onnx.NodeProto, view: GraphView) -> str:
    before = view.producer_of(node.input[0])
    if before is not None and before.op_type == "Mul":
        for name in before.input:
            value = facts.value(name)
            if value is not None and value.size == 1 and np.isclose(float(value.reshape(())), 1.702, atol=1e-2):
                return "quick_gelu"
    readers = [view.nodes[i].op_type for i in view.consumers.get(node.output[0], [])]
    return "silu" if "Mul" in readers else "sigmoid"
