"""ONNX operators in PyTorch; importing this package fills the table `OPS`."""

from toast_onnx.finetune.ops import (
    attention,
    contrib,
    elementwise,
    linear,
    movement,
    norms,
    pooling,
    reductions,
    resize,
)
from toast_onnx.finetune.ops.registry import OPS, Node, Operator

__all__ = [
    "OPS",
    "Node",
    "Operator",
    "attention",
    "contrib",
    "elementwise",
    "linear",
    "movement",
    "norms",
    "pooling",
    "reductions",
    "resize",
]
