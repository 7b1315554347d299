"""From where to where a block runs: one tensor that all in it comes from, masks apart, one that all in it goes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice

from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import FLOATS, GraphView
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.masks import alike, masks

#: How many activations before a block's first layer are tried as its input: a norm in pieces, a window partition.
_TRIES = 100


@dataclass(frozen=True)
class Span:
    """A block as a function of one tensor, and of masks.

    Attributes:
        start: the only activation that the block reads; for pre-norm blocks the residual stream before it. It may be
            an input of the graph.
        end: the sum of the block's last branch with the residual stream.
        beside: masks that its attention applies, made of the model's inputs without any layer.
    """

    start: str
    end: str
    beside: tuple[str, ...] = ()


def block_span(view: GraphView, facts: Facts, block: Block) -> Span:
    """The span of a block.

    Raises:
        MatchError: the block reads other activations, too (a second stream), or nothing is added to its output.
    """
    layers, beside = _layers(block), block_masks(view, facts, block)
    end = residual_sum(view, facts, max(layers, key=lambda each: each.node))
    first = min(node for each in layers for node in each.nodes)
    wanted = {each.node for each in layers}
    before = (name for i in range(first - 1, -1, -1) for name in view.nodes[i].output)
    activations = (n for n in before if n and not facts.is_constant(n) and facts.value(n) is None)
    for start in chain(islice(activations, _TRIES), _inputs(view) if first <= _TRIES else ()):
        nodes = _between(view, facts, start, end, beside)
        if nodes is not None and wanted <= nodes:
            return Span(start, end, beside)
    raise MatchError(f"block {block.index} ({block.name}) reads more than one activation")


def block_masks(view: GraphView, facts: Facts, block: Block) -> tuple[str, ...]:
    """The masks that a block's attention applies, by tensor; constant ones are not among them."""
    if block.attention is None:
        return ()
    return tuple(dict.fromkeys(mask.tensor for mask in masks(view, facts, block.attention.core)))


def masks_beside(view: GraphView, facts: Facts, blocks: Iterable[Block]) -> dict[str, str]:
    """The masks of some blocks, and which one of those that are alike stands for each."""
    return alike(view, facts, dict.fromkeys(name for block in blocks for name in block_masks(view, facts, block)))


def span_of(view: GraphView, facts: Facts, block: Block) -> Span | None:
    """The span of a block, None where it is no function of one tensor."""
    try:
        return block_span(view, facts, block)
    except MatchError:
        return None


def _inputs(view: GraphView) -> list[str]:
    """The graph's inputs that may be activations."""
    values = (v for v in view.model.proto.graph.input if v.name not in view.initializers)
    return [v.name for v in values if v.type.tensor_type.elem_type in FLOATS]


def follows(view: GraphView, facts: Facts, start: str, end: str, beside: Iterable[str]) -> bool:
    """Whether a tensor is made of another one and of masks alone."""
    return _between(view, facts, start, end, beside) is not None


def _layers(block: Block) -> list[Linear]:
    return [linear for part in (block.attention, block.ffn) if part is not None for linear in part.linears]


def residual_sum(view: GraphView, facts: Facts, last: Linear) -> str:
    """The first sum, behind a block's last layer, of something that follows from it and something that does not."""
    follows = {last.output}
    for i in range(max(last.nodes) + 1, len(view.nodes)):
        node = view.nodes[i]
        theirs = [name for name in node.input if name and name not in follows]
        if len(theirs) == len([name for name in node.input if name]):
            continue
        if node.op_type == "Add" and any(not facts.is_constant(n) and facts.value(n) is None for n in theirs):
            return str(node.output[0])
        follows.update(node.output)
    raise MatchError(f"nothing is added to the output of '{last.output}'")


def _between(view: GraphView, facts: Facts, start: str, end: str, beside: Iterable[str]) -> set[int] | None:
    """Nodes that compute `end` from `start` and masks; None when something else is needed as well."""
    nodes: set[int] = set()
    pending, seen = [end], {start, *beside}
    while pending:
        name = pending.pop()
        if name in seen or facts.value(name) is not None or facts.is_constant(name):
            continue
        seen.add(name)
        i = view.producer.get(name)
        if i is None:
            return None
        nodes.add(i)
        pending.extend(n for n in view.nodes[i].input if n)
    return nodes
