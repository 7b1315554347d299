"""Grouped queries: several heads of queries that meet the keys, or weigh the values, of one head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from toast_onnx.matching.blocks import Branch
from toast_onnx.matching.cores import Core
from toast_onnx.matching.dims import Operand, arriving, match_repeats
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.layout import Layout
from toast_onnx.matching.probe import propagate
from toast_onnx.reasons import Kind


def shared_heads(
    view: GraphView, facts: Facts, core: Core, branch: Branch, name: str, whole: Layout, bent: bool
) -> tuple[Branch, np.ndarray | None]:
    """Which head of keys or values each head of the queries has.

    Args:
        view: the graph.
        facts: its facts.
        core: the attention core.
        branch: the layer of K or V.
        name: K or V.
        whole: layout of the queries, or of the output projection for V.
        bent: whether what stands between the layer and the core is followed as a whole, repetition included.

    Returns:
        The branch, with what repeats its heads, and (heads,) numbers; None where each head has its own.

    Raises:
        Decline: numbers of heads or dimensions do not fit, or the repetition is not understood.
    """
    heads, own = whole.num_heads, branch.layout.num_heads
    other = "Q and K" if name == "K" else "V and the output projection"
    if branch.layout.head_dim != whole.head_dim or heads % own:
        raise Kind.NUMBERS.decline("{part} have different numbers of heads or dimensions", part=other)
    if heads == own and not branch.walk.repeats:
        return branch, None
    if core.kind != "matmul":
        return branch, np.arange(heads) // (heads // own)
    end, axis = (core.k, core.k_dim_axis) if name == "K" else (core.v, -1)
    operand = Operand(name, branch.walk.target, end, axis)
    groups = _groups(view, facts, core, branch, operand, heads)
    if np.unique(np.bincount(groups, minlength=own)).size > 1:
        raise Kind.GROUPED.decline("heads of {part} are shared by different numbers of queries", part=name)
    if bent or branch.walk.blocked is not None:
        return branch, groups
    return replace(branch, repeats=match_repeats(view, facts, core.nodes, operand, whole.head_dim)), groups


def _groups(view: GraphView, facts: Facts, core: Core, branch: Branch, operand: Operand, heads: int) -> np.ndarray:
    """(heads,) head of the layer that arrives at each place along the core's axis of heads."""
    what, shape = operand.what, facts.shape(branch.linear.output)
    queries, arrived = facts.shape(core.q), facts.shape(operand.end)
    if shape is None or queries is None or arrived is None or len(queries) < 3 or queries[:-2] != arrived[:-2]:
        raise Kind.GROUPED.decline(
            "the heads of {part} are not repeated, but meet those of Q in the product itself", part=what
        )
    labels = propagate(view, facts, branch.walk.nodes, branch.linear.output)[branch.walk.target]
    channel = np.unravel_index(labels - 1, shape)[branch.layout.channel_axis]
    owner = np.zeros(branch.linear.out_features, np.int32)
    owner[branch.layout.channels] = np.arange(branch.layout.num_heads, dtype=np.int32)[:, None]
    numbers = arriving(view, facts, core.nodes, operand, owner[channel])
    along = np.moveaxis(numbers, -3, 0).reshape(numbers.shape[-3], -1)
    if queries[-3] != heads or (along != along[:, :1]).any():
        raise Kind.GROUPED.decline(
            "the heads of {part} are repeated along an axis that holds more than heads", part=what
        )
    return np.asarray(along[:, 0], np.int64)
