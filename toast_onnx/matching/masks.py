"""Which masks an attention applies, and how to tell from them the keys that no query may see: padded tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx

from toast_onnx.matching.cores import Core
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.operators import MEASURING, Effect, operators
from toast_onnx.matching.walks import upstream

_DRAWS = operators(Effect.DRAWS)
_LAYERS = operators(Effect.CONTRACTS, Effect.SHARES, Effect.ATTENDS)

Kind = Literal["visible", "hidden", "additive", "keys"]


@dataclass(frozen=True)
class Mask:
    """A mask operand of an attention core, broadcast against (..., queries, keys).

    Attributes:
        tensor: its name.
        kind: `visible` (true where a key may be seen), `hidden` (true where not), `additive` (very negative where not),
            `keys` ((batch, keys), nonzero where a key counts).
    """

    tensor: str
    kind: Kind


def masks(view: GraphView, facts: Facts, core: Core) -> list[Mask]:
    """The masks of a core that come from the inputs; constant ones (Swin's shifted windows) hide no token."""
    found = _fused(view, facts, core) if core.kind != "matmul" else _between(view, core)
    return [m for m in found if comes_from_inputs(view, facts, m.tensor)]


def comes_from_inputs(view: GraphView, facts: Facts, tensor: str) -> bool:
    """Whether a tensor's value is read off the contents of the graph's inputs, as a padding mask is.

    What depends on their shapes alone hides no token, and what layers compute is a bias (ViTDet's relative positions)
    or a mask of the model's own making.
    """
    from_input = False
    for i in upstream(view, facts, [tensor]):
        if i is None:
            from_input = True
        elif view.nodes[i].op_type in _LAYERS:
            return False
    return from_input


def alike(view: GraphView, facts: Facts, tensors: Iterable[str]) -> dict[str, str]:
    """Each tensor -> the first of them that the same operators make of the same inputs: exporters repeat them by layer.

    Args:
        view: the graph.
        facts: what is known about it.
        tensors: masks, which no layer makes.
    """
    numbers: dict[tuple[object, ...], int] = {}
    known: dict[str, int] = {}

    def number(name: str) -> int:
        if name not in known:
            known[name] = numbers.setdefault(recipe(name), len(numbers))
        return known[name]

    def recipe(name: str) -> tuple[object, ...]:
        if not name:
            return ()
        if facts.is_constant(name) or facts.value(name) is not None:
            value = facts.array(name)
            return value.dtype.str, value.shape, value.tobytes()
        i = view.producer.get(name)
        if i is None or view.nodes[i].op_type in _DRAWS:
            return (name,)
        node = view.nodes[i]
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        inputs = tuple(number(each) for each in node.input)
        return node.op_type, node.domain, attributes, list(node.output).index(name), inputs

    first: dict[int, str] = {}
    return {name: first.setdefault(number(name), name) for name in tensors}


def _fused(view: GraphView, facts: Facts, core: Core) -> Iterable[Mask]:
    node = view.nodes[core.qk]
    inputs = [*node.input, *[""] * 8]
    if core.kind == "mha":
        if inputs[4] and len(facts.shape(inputs[4]) or ()) == 2:
            yield Mask(inputs[4], "keys")
        if inputs[5]:
            yield Mask(inputs[5], "additive")
    elif inputs[3]:
        yield Mask(inputs[3], "visible" if _is_bool(facts, inputs[3]) else "additive")


def _between(view: GraphView, core: Core) -> Iterable[Mask]:
    """Masks added to, or selected against, the scores between their product and the Softmax."""
    scores = {view.nodes[core.qk].output[0]}
    for i in range(core.qk + 1, core.softmax):
        node = view.nodes[i]
        at = [k for k, name in enumerate(node.input) if name in scores]
        if not at or node.op_type in MEASURING | {"IsNaN"}:
            continue
        scores.update(node.output)
        if node.op_type == "Where" and at != [0]:
            yield Mask(node.input[0], "visible" if 1 in at else "hidden")
        elif node.op_type == "Add":
            yield from (Mask(name, "additive") for k, name in enumerate(node.input) if k not in at)


def _is_bool(facts: Facts, tensor: str) -> bool:
    return facts.elem_type(tensor) == onnx.TensorProto.BOOL
