"""Operators that act on each element alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toast_onnx.finetune.ops.registry import DTYPES, Node, Value, number, op

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "PRelu": lambda x, slope: torch.where(x >= 0, x, x * slope),
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}


#: What has no slope anywhere: comparisons, logic, rounding.
_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_LOGIC = ("And", "IsNaN", "Not", "Or", "Xor")
_STEPS = ("Ceil", "Floor", "Round", "Sign")
_DISCRETE = frozenset((*_COMPARISONS, *_LOGIC, *_STEPS))


def _unary(function: Callable[[Tensor], Tensor], node: Node, x: Tensor) -> Tensor:
    return function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor], node: Node, a: Tensor, b: Tensor) -> Tensor:
    return function(a, b)


for _name, _one in _UNARY.items():
    op(_name, discrete=(0,) if _name in _DISCRETE else ())(functools.partial(_unary, _one))
for _name, _two in _BINARY.items():
    op(_name, discrete=(0, 1) if _name in _DISCRETE else ())(functools.partial(_binary, _two))


@op("Div")
def div(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Division; of integers towards zero."""
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


@op("Mod")
def mod(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Remainder with the divisor's sign, or with the dividend's (`fmod`)."""
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


@op("Pow")
def power(node: Node, x: Tensor, exponent: Tensor) -> Tensor:
    """x ** exponent in x's type; a single exponent of 2 or 0.5, as in decomposed norms, keeps an exact derivative."""
    if exponent.numel() == 1 and not exponent.requires_grad and not torch.compiler.is_compiling():
        return torch.pow(x, float(exponent)).to(x.dtype) if x.is_floating_point() else torch.pow(x, int(exponent))
    return torch.pow(x, exponent).to(x.dtype)


@op("Where", discrete=(0,))
def where(node: Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Elementwise choice."""
    return torch.where(condition, a, b)


@op("Max")
def maximum(node: Node, *inputs: Tensor) -> Tensor:
    """Elementwise maximum of any number of tensors."""
    return functools.reduce(torch.maximum, inputs)


@op("Min")
def minimum(node: Node, *inputs: Tensor) -> Tensor:
    """Elementwise minimum of any number of tensors."""
    return functools.reduce(torch.minimum, inputs)


@op("Sum")
def add_all(node: Node, *inputs: Tensor) -> Tensor:
    """Elementwise sum of any number of tensors."""
    return functools.reduce(torch.add, inputs)


@op("Clip")
def clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Clamp to bounds that are inputs (opset 11) or attributes (earlier)."""
    low_: Any = node.get("min") if low is None else low
    high_: Any = node.get("max") if high is None else high
    if isinstance(low_, Tensor) or isinstance(high_, Tensor):
        x = x if low_ is None else torch.maximum(x, torch.as_tensor(low_, dtype=x.dtype, device=x.device))
        return x if high_ is None else torch.minimum(x, torch.as_tensor(high_, dtype=x.dtype, device=x.device))
    return x if low_ is None and high_ is None else torch.clamp(x, low_, high_)


@op("Gelu")
def gelu(node: Node, x: Tensor) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016), exact or by tanh."""
    return F.gelu(x, approximate="tanh" if node.get("approximate", "none") == "tanh" else "none")


@op("Swish")
def swish(node: Node, x: Tensor) -> Tensor:
    """x * sigmoid(alpha x)."""
    return x * torch.sigmoid(node.get("alpha", 1.0) * x)


@op("Elu")
def elu(node: Node, x: Tensor) -> Tensor:
    """Exponential linear unit."""
    return F.elu(x, node.get("alpha", 1.0))


@op("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """Leaky rectifier."""
    return F.leaky_relu(x, node.get("alpha", 0.01))


@op("HardSigmoid")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """max(0, min(1, alpha x + beta))."""
    return torch.clamp(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0, 1)


@op("Dropout", host=(1, 2))
def dropout(node: Node, x: Tensor, ratio: Value = None, training: Value = None) -> tuple[Tensor, Tensor]:
    """The identity: graphs are exported for inference."""
    return x, torch.ones_like(x, dtype=torch.bool)


@op("Cast")
def cast(node: Node, x: Tensor) -> Tensor:
    """Change of type; numbers to booleans by comparison with zero."""
    return x.to(DTYPES[node.get("to")])


@op("CastLike", discrete=(1,))
def cast_like(node: Node, x: Tensor, like: Tensor) -> Tensor:
    """Change of type to another tensor's."""
    return x.to(like.dtype)


@op("CumSum", host=(1,))
def cumsum(node: Node, x: Tensor, axis: Value) -> Tensor:
    """Cumulative sum, optionally from the end, optionally without the element itself."""
    dim = number(axis)
    y = x.flip(dim) if node.get("reverse", 0) else x
    total = torch.cumsum(y, dim).to(x.dtype)
    total = total - y if node.get("exclusive", 0) else total
    return total.flip(dim) if node.get("reverse", 0) else total
