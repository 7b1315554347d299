"""What a block costs as a function of its kept widths, in multiply-accumulates or in parameters.

Every count is linear in the kept heads times their dimensions and in the hidden units, but for fc1, whose matrix has
kept inputs times kept units. So seven numbers describe a block, and a budget can be searched without building a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from toast_onnx.matching.blocks import Attention, Block, Branch, Ffn
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.linear import Linear
from toast_onnx.planning.macs import node_macs
from toast_onnx.planning.schema import Align
from toast_onnx.reasons import Reason

Part = Literal["heads", "qk", "vo", "fc1", "fc2"]
PARTS: tuple[Part, ...] = ("heads", "qk", "vo", "fc1", "fc2")
#: What stands for merging tokens beside them.
TOKENS = "tokens"
Resource = Literal["macs", "params"]


@dataclass(frozen=True)
class WidthCost:
    """Cost of a block's prunable layers.

    `(qk * d_qk + vo * d_vo + bias) * kept heads / heads + fc1 * inputs + fc2 * units + pair * inputs * units`.

    Attributes:
        qk: per query and key dimension of all heads together.
        vo: per value dimension of all heads together.
        bias: of what all heads together have besides, whatever their dimensions: a position bias.
        fc1: per input of fc1, whatever the hidden width.
        fc2: per hidden unit, whatever fc1 reads.
        pair: per pair of an input of fc1 and a hidden unit.
        heads: number of all heads; 0 where there is no attention.
    """

    qk: float = 0.0
    vo: float = 0.0
    bias: float = 0.0
    fc1: float = 0.0
    fc2: float = 0.0
    pair: float = 0.0
    heads: int = 0

    def __add__(self, other: WidthCost) -> WidthCost:
        return WidthCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def at(self, widths: Mapping[Part, int]) -> float:
        """Cost at kept widths; a part that is missing from them costs nothing, missing heads all stay."""
        inputs, units = widths.get("fc1", 0), widths.get("fc2", 0)
        share = widths.get("heads", self.heads) / self.heads if self.heads else 1.0
        attention = (self.qk * widths.get("qk", 0) + self.vo * widths.get("vo", 0) + self.bias) * share
        return attention + self.fc1 * inputs + self.fc2 * units + self.pair * inputs * units


def dense_widths(block: Block) -> dict[Part, int]:
    """Widths of the parts that a block has: heads, dimensions of a head, inputs of fc1, hidden units."""
    found: dict[Part, int] = {}
    if block.attention is not None:
        a = block.attention
        found |= {"heads": a.num_heads, "qk": a.qk_dim, "vo": a.vo_dim}
    if block.ffn is not None:
        found |= {"fc1": block.ffn.in_features, "fc2": block.ffn.width}
    return found


def prunable_widths(block: Block) -> dict[Part, int]:
    """Widths of the parts of a block that can be pruned."""
    reasons: dict[Part, Reason | None] = {}
    if block.attention is not None:
        a = block.attention
        reasons |= {"heads": a.heads_reason, "qk": a.qk_reason, "vo": a.vo_reason}
    if block.ffn is not None:
        reasons |= {"fc1": block.ffn.fc1_reason, "fc2": block.ffn.fc2_reason}
    return {part: width for part, width in dense_widths(block).items() if reasons[part] is None}


def aligned_to(part: Part, align: Align) -> int:
    """The multiple that a ratio of a part is rounded to; heads go one by one."""
    if part == "heads":
        return 1
    return align.head_dim if part in ("qk", "vo") else align.width


def width_step(block: Block, part: Part, align: Align) -> int:
    """The multiple that kept counts of a part are: rotary embedding turns query and key dimensions in pairs."""
    step = aligned_to(part, align)
    paired = part == "qk" and block.attention is not None and block.attention.pairs is not None
    return math.lcm(step, 2) if paired else step


Counted = Callable[[int], float]
"""Multiply-accumulates of a node, by its number."""


def width_cost(view: GraphView, facts: Facts, block: Block, resource: Resource) -> WidthCost:
    """The cost of a block, what no width changes left out.

    Args:
        view: the graph.
        facts: its facts at the shapes that MACs are counted for.
        block: a matched block.
        resource: `macs` or `params`.
    """
    return width_cost_at(view, lambda i: node_macs(view, facts, i), block, resource)


def width_cost_at(view: GraphView, macs: Counted, block: Block, resource: Resource) -> WidthCost:
    """As `width_cost`, with multiply-accumulates that are counted elsewhere: at fewer tokens, for one.

    Args:
        view: the graph.
        macs: of every node.
        block: a matched block.
        resource: `macs` or `params`.
    """
    found = WidthCost()
    if block.attention is not None:
        found += _attention(view, macs, block.attention, resource)
    if block.ffn is not None:
        found += _ffn(macs, block.ffn, resource)
    return found


def _attention(view: GraphView, macs: Counted, a: Attention, resource: Resource) -> WidthCost:
    def columns(branch: Branch | None, dims: int) -> float:
        """Cost of the outputs that make one dimension of all heads."""
        if branch is None:
            return 0.0
        each = _by_output(macs, branch.linear, resource)
        return each * np.unique(branch.layout.channels).size / dims

    qk = columns(a.q, a.qk_dim) + columns(a.k, a.qk_dim)
    vo = columns(a.v, a.vo_dim)
    if a.proj is not None:
        rows = np.unique(a.proj.layout.channels).size / a.vo_dim
        vo += rows * _by_input(macs, a.proj.linear, resource)
    if a.side is not None:
        vo += sum(macs(i) if resource == "macs" else _stored(view, i) for i in a.side.nodes) / a.vo_dim
    bias = 0.0
    if resource == "params" and a.head_region is not None:
        operands = {view.nodes[i].input[k] for i, k in a.head_region.operands}
        bias = float(sum(math.prod(view.initializers[name].dims) for name in operands if name in view.initializers))
    if resource == "macs":
        if a.core.qk == a.core.av:  # one fused node computes both products
            both = macs(a.core.qk) / (a.qk_dim + a.vo_dim)
            qk, vo = qk + both, vo + both
        else:
            qk += macs(a.core.qk) / a.qk_dim
            vo += macs(a.core.av) / a.vo_dim
    return WidthCost(qk=qk, vo=vo, bias=bias, heads=a.num_heads)


def _stored(view: GraphView, i: int) -> float:
    """Numbers in the initializers that a node reads."""
    return float(sum(math.prod(view.initializers[n].dims) for n in view.nodes[i].input if n in view.initializers))


def _ffn(macs: Counted, f: Ffn, resource: Resource) -> WidthCost:
    unit = _by_input(macs, f.fc2, resource)
    if resource == "macs":
        weights = float(sum(macs(e.node) for e in f.entries))
        unit += sum(macs(i) for i in f.nodes) / f.width
        biases = 0.0
    else:
        weights = float(sum(e.in_features * e.out_features for e in f.entries))
        biases = float(sum(e.out_features for e in f.entries if e.bias is not None))
    if f.selects_at_exit:  # fc1 keeps all its outputs
        return WidthCost(fc1=weights / f.in_features, fc2=unit)
    return WidthCost(fc2=unit + biases / f.width, pair=weights / (f.in_features * f.width))


def _by_output(macs: Counted, linear: Linear, resource: Resource) -> float:
    """Cost of one output of a linear layer."""
    if resource == "macs":
        return macs(linear.node) / linear.out_features
    return linear.in_features + (0 if linear.bias is None else 1)


def _by_input(macs: Counted, linear: Linear, resource: Resource) -> float:
    """Cost of one input of a linear layer."""
    if resource == "macs":
        return macs(linear.node) / linear.in_features
    return float(linear.out_features)
