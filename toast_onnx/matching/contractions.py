"""Einsum as what it is, a contraction: linear layers, scores and weighted sums of an attention become MatMuls.

Keras exports kernels (channels, heads, dim), einops code writes scores and sums as equations. Letters carry the
meaning, so any letters in any order do: transposes bring them where MatMul wants them, and are data movement that the
matching follows anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from toast_onnx.matching.cores import scores_of_softmax, weighs
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute, is_standard, other_input
from toast_onnx.matching.respelling import Respelling, respelled
from toast_onnx.model import Model


@dataclass(frozen=True)
class Equation:
    """An Einsum of two operands; every letter is one axis.

    Attributes:
        terms: the operands' letters.
        result: the result's letters.
    """

    terms: tuple[str, str]
    result: str


class _Spelling(Respelling):
    """What stands in place of one Einsum (and of the bias behind it)."""

    def node(
        self, op: str, inputs: Sequence[str], what: str = "", outputs: int | Sequence[str] = 1, **attributes: Any
    ) -> list[str]:
        """Write a numbered node."""
        number = len(self.nodes)
        made = [f"{self.tensors}/contraction_{number}"] if isinstance(outputs, int) else outputs
        return super().node(op, inputs, f"{op}_{number}", made, **attributes)

    def ordered(self, tensor: str, letters: str, wanted: str, output: str = "") -> str:
        """Transpose a tensor from one order of its letters to another, where they differ."""
        if letters == wanted and not output:
            return tensor
        perm = [letters.index(c) for c in wanted]
        return self.node("Transpose", [tensor], outputs=[output] if output else 1, perm=perm)[0]


def spell_contractions(view: GraphView, facts: Facts) -> Model:
    """Write Einsums that are linear layers, or scores or sums of an attention, as MatMul.

    Args:
        view: the graph; it is not changed.
        facts: its facts.

    Returns:
        A model that computes the same under the same names; the same model where there is nothing to write.
    """
    found = {i: spelled for i in range(len(view.nodes)) if (spelled := _spelled(view, facts, i)) is not None}
    return respelled(view, found)


def equation(node: onnx.NodeProto, ranks: Sequence[int]) -> Equation | None:
    """What an Einsum of two operands says, its ellipses written out; None for anything but a plain contraction.

    Args:
        node: the Einsum.
        ranks: ranks of its operands.
    """
    text = attribute(node, "equation", b"")
    assert isinstance(text, bytes)
    left, arrow, result = text.decode().replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or len(ranks) != 2:
        return None
    spare = [c for c in _SPARE if c not in text.decode()]
    hidden = [r - len(t.replace("...", "")) if "..." in t else 0 for t, r in zip(terms, ranks, strict=True)]
    if not arrow:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    if max(hidden) > len(spare) or min(hidden) < 0:
        return None
    shared = spare[: max(hidden)]
    terms = [t.replace("...", "".join(shared[len(shared) - n :])) for t, n in zip(terms, hidden, strict=True)]
    result = result.replace("...", "".join(shared))
    plain = all(len(set(t)) == len(t) for t in (*terms, result)) and set(result) <= set("".join(terms))
    alone = (set(terms[0]) ^ set(terms[1])) - set(result)  # summed within one operand
    fits = all(len(t) == r for t, r in zip(terms, ranks, strict=True))
    return Equation((terms[0], terms[1]), result) if plain and fits and not alone else None


#: Letters for the axes behind an ellipsis.
_SPARE = "ZYXWVUTSRQPONM"


def _spelled(view: GraphView, facts: Facts, i: int) -> _Spelling | None:
    node = view.nodes[i]
    if node.op_type != "Einsum" or not is_standard(node):
        return None
    shapes = [facts.shape(name) for name in node.input]
    if any(shape is None for shape in shapes):
        return None
    found = equation(node, [len(shape or ()) for shape in shapes])
    if found is None:
        return None
    constant = [facts.is_constant(name) for name in node.input]
    if constant in ([False, True], [True, False]):
        batched = set(found.terms[0]) & set(found.terms[1]) & set(found.result)  # no layer: learned queries
        return _product(view, facts, i, found) if batched else _layer(view, facts, i, found, constant.index(True))
    scores = scores_of_softmax(view, facts, i) or any(weighs(view, facts, n) for n in node.input)
    return _product(view, facts, i, found) if not any(constant) and scores else None


def _layer(view: GraphView, facts: Facts, i: int, said: Equation, kernel: int) -> _Spelling | None:
    """A contraction of activations with a constant kernel that shares only contracted letters with them."""
    node = view.nodes[i]
    x, w = said.terms[1 - kernel], said.terms[kernel]
    summed = "".join(c for c in w if c not in said.result)
    made = "".join(c for c in said.result if c in w)
    lead = "".join(c for c in x if c not in summed)
    if not summed or not made or not lead or set(lead) & set(w):
        return None
    weight = facts.array(node.input[kernel])
    size = dict(zip(w, weight.shape, strict=True))
    if facts.shape(node.input[1 - kernel]) is None or any(
        n != size[c] for c, n in zip(x, facts.shape(node.input[1 - kernel]) or (), strict=True) if c in summed
    ):
        return None
    fan_out = int(np.prod([size[c] for c in made]))
    spelled = _Spelling(view, node.name or node.output[0], node.output[0])
    tensor = spelled.ordered(node.input[1 - kernel], x, lead + summed)
    if len(summed) > 1:
        merged = int(np.prod([size[c] for c in summed]))
        tensor = spelled.reshape(tensor, [0] * len(lead) + [merged], called="merged")
    matrix = weight.transpose([w.index(c) for c in summed + made]).reshape(-1, fan_out)
    tensor = spelled.one("MatMul", [tensor, spelled.constant(matrix, "kernel")])
    output = node.output[0]
    if (bias := _bias_behind(view, facts, output, said.result, made, size)) is not None:
        add, vector = bias
        tensor = spelled.one("Add", [tensor, spelled.constant(vector, "bias")])
        output, spelled.gone = view.nodes[add].output[0], {add}
    if len(made) > 1:
        tensor = spelled.reshape(tensor, [0] * len(lead) + [size[c] for c in made], called="parted")
    if lead + made != said.result:
        spelled.ordered(tensor, lead + made, said.result, output)
    else:
        spelled.nodes[-1].output[0] = output
    return spelled


def _bias_behind(
    view: GraphView, facts: Facts, tensor: str, letters: str, made: str, size: Mapping[str, int]
) -> tuple[int, np.ndarray] | None:
    """The Add behind a layer and its bias (fan_out,), where it differs between made channels alone."""
    reader = view.only_reader(tensor)
    if reader is None or view.nodes[reader].op_type != "Add":
        return None
    other = other_input(view.nodes[reader], tensor)
    shape = facts.shape(other)
    if not facts.is_constant(other) or shape is None or len(shape) > len(letters):
        return None
    value = facts.array(other).reshape((1,) * (len(letters) - len(shape)) + shape)
    if any(n != 1 and c not in made for c, n in zip(letters, value.shape, strict=True)):
        return None
    value = np.squeeze(value, tuple(k for k, c in enumerate(letters) if c not in made))
    return reader, np.broadcast_to(value, [size[c] for c in made]).reshape(-1)


def _product(view: GraphView, facts: Facts, i: int, said: Equation) -> _Spelling | None:
    """A contraction of two activations over one letter, with one letter of its own in each operand."""
    node, (a, b), result = view.nodes[i], said.terms, said.result
    weighing = [weighs(view, facts, name) for name in node.input]
    # probabilities stay as they lie: an attention core knows them by that
    shared = "".join(c for c in (said.terms[weighing.index(True)] if any(weighing) else result) if c in a and c in b)
    shared = "".join(c for c in shared if c in result)
    summed = "".join(c for c in a if c in b and c not in result)
    own = ["".join(c for c in t if c not in other) for t, other in ((a, b), (b, a))]
    if len(summed) != 1 or [len(letters) for letters in own] != [1, 1] or _broadcasts(facts, node, said):
        return None
    first = weighing.index(True) if any(weighing) else (0 if result.index(own[0]) < result.index(own[1]) else 1)
    spelled = _Spelling(view, node.name or node.output[0], node.output[0])
    rows = spelled.ordered(node.input[first], said.terms[first], shared + own[first] + summed)
    columns = spelled.ordered(node.input[1 - first], said.terms[1 - first], shared + summed + own[1 - first])
    tensor = spelled.one("MatMul", [rows, columns])
    letters = shared + own[first] + own[1 - first]
    if letters == result:
        spelled.nodes[-1].output[0] = node.output[0]
    else:
        spelled.ordered(tensor, letters, result, node.output[0])
    return spelled


def _broadcasts(facts: Facts, node: onnx.NodeProto, said: Equation) -> bool:
    """Whether a letter has different extents in the operands: an axis of one that is repeated."""
    sizes = [dict(zip(t, facts.shape(n) or (), strict=True)) for t, n in zip(said.terms, node.input, strict=True)]
    return any(sizes[1].get(c, n) != n for c, n in sizes[0].items())
