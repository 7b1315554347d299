"""Writing networks that select their channels while the graph runs.

This is a second pass, over a graph whose static parts are done: what it changes it finds by tensor names, so that the
same selections can be written into a pruned graph, and as masks into its padded twin (`runtime_twin`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from toast_onnx.edit import GraphEdit
from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Ffn
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView, attribute
from toast_onnx.matching.input_shapes import input_shapes
from toast_onnx.matching.linear import Linear, bias, find_linears, weights
from toast_onnx.matching.study import Study
from toast_onnx.model import Model
from toast_onnx.selection.nodes import (
    write_choice,
    write_first,
    write_mask,
    write_normed_linear,
    write_scores,
    write_small_linear,
)
from toast_onnx.selection.plan import Selection


@dataclass(frozen=True)
class Chosen:
    """Where a written selection can be watched.

    Attributes:
        selection: what was written.
        kept: tensor (kept,) of the channel numbers it chose, best first.
        scored: tensor that it scored.
    """

    selection: Selection
    kept: str
    scored: str


@dataclass(frozen=True)
class Target:
    """A graph to write selections into.

    Attributes:
        edit: its edit.
        view: the graph.
        facts: its facts.
        linears: its linear layers by output.
    """

    edit: GraphEdit
    view: GraphView
    facts: Facts
    linears: dict[str, Linear]


def open_target(study: Study, model: Model) -> Target:
    """Look at a graph that a study's model became; its feed-forward networks have the names that the study knows."""
    view = GraphView(model)
    facts = Facts(view, study.counted_shapes)
    if study.dynamic_batch:  # what changes with the batch is no weight
        facts.trust(Facts(view, input_shapes(study.view, study.counted_shapes, 2, fixed_batch=False)))
    else:
        facts.trust(facts)
    return Target(GraphEdit(view), view, facts, find_linears(view, facts))


def select_at_run_time(study: Study, model: Model, selections: Sequence[Selection]) -> tuple[Model, tuple[Chosen, ...]]:
    """Write selections into a graph.

    Args:
        study: of the dense model.
        model: the graph with its static parts done.
        selections: what to write; nothing returns the very same model.

    Raises:
        MatchError: the graph holds no probabilities to weight patches with.
    """
    if not selections:
        return model, ()
    target = open_target(study, model)
    written = []
    for selection in selections:
        ffn = study.match.blocks[selection.block].ffn
        assert ffn is not None
        if selection.probabilities is not None and selection.probabilities not in target.view.producer:
            raise MatchError(
                f"block {selection.block}: {selection.part} cannot select at run time: one fused node is its attention "
                "and hides what the class token attends to; export without attention fusion"
            )
        write = _write_fc2 if selection.part == "fc2" else _write_fc1
        if selection.residual == "masked":
            write = _write_fc1_masked
        written.append(write(target, ffn, selection))
    return target.edit.apply(), tuple(written)


def _write_fc2(target: Target, ffn: Ffn, selection: Selection) -> Chosen:
    """h[kept] @ W2[kept] in place of h @ W2."""
    layer = target.linears[ffn.fc2.output]
    at = layer.node
    kept = _choose(target, at, selection, layer.input)
    target.edit.remove(layer.nodes)
    w, b = weights(target.view, target.facts, layer), bias(target.view, target.facts, layer)
    write_small_linear(target.edit, at, selection, layer.input, kept, w, b, layer.output)
    return Chosen(selection, kept, layer.input)


def _write_fc1(target: Target, ffn: Ffn, selection: Selection) -> Chosen:
    """x[kept] @ W1[kept], x the normalised input: the norm and the residual stream see every channel."""
    layers = [target.linears[e.output] for e in ffn.entries]
    at = min(each.node for each in layers)
    kept = _choose(target, at, selection, layers[0].input)
    for layer in layers:
        target.edit.remove(layer.nodes)
        w, b = weights(target.view, target.facts, layer), bias(target.view, target.facts, layer)
        write_small_linear(target.edit, at, selection, layer.input, kept, w, b, layer.output)
    return Chosen(selection, kept, layers[0].input)


def _write_fc1_masked(target: Target, ffn: Ffn, selection: Selection) -> Chosen:
    """The release's form: dropped channels are zero in the residual stream, and so in what the norm sees."""
    edit, view, facts = target.edit, target.view, target.facts
    at, raw = move_stream(target, selection)
    chosen = write_choice(edit, at, selection, write_scores(edit, at, selection, raw), spare=1)
    kept = write_first(edit, at, selection, chosen)
    mask = write_mask(edit, at, selection, kept, facts.elem_type(selection.scored))
    edit.emit(at, "Mul", [raw, mask], selection.scored, f"{selection.name}/Mul")

    layers = [target.linears[e.output] for e in ffn.entries]
    norm = view.nodes[view.producer[layers[0].input]]
    gain = facts.array(norm.input[1]).reshape(-1)
    shift = facts.array(norm.input[2]).reshape(-1) if len(norm.input) > 2 and norm.input[2] else np.zeros_like(gain)
    at = min(each.node for each in layers)
    unit = _unit_norm(edit, at, norm, gain, selection)
    for layer in layers:
        edit.remove(layer.nodes)
        w, b = weights(view, facts, layer), bias(view, facts, layer)
        shifted = shift.astype(np.float64) @ w.astype(np.float64) + (0 if b is None else b.astype(np.float64))
        write_normed_linear(edit, at, selection, unit, chosen, w, gain, shifted, layer.output)
    return Chosen(selection, kept, raw)


def _choose(target: Target, at: int, selection: Selection, scored: str) -> str:
    scores = write_scores(target.edit, at, selection, scored)
    return write_choice(target.edit, at, selection, scores)


def move_stream(target: Target, selection: Selection) -> tuple[int, str]:
    """Give the tensor that a selection masks another name, so that all its readers will see the masked one.

    Returns:
        Where to insert what makes the masked tensor, and the name of the unmasked one.
    """
    edit, view = target.edit, target.view
    at = view.producer[selection.scored]
    node = edit.copy(at)
    raw = edit.fresh(f"{selection.name}/unmasked")
    node.output[list(node.output).index(selection.scored)] = raw
    edit.replace(at, node)
    return at, raw


def _unit_norm(edit: GraphEdit, at: int, norm: onnx.NodeProto, gain: np.ndarray, selection: Selection) -> str:
    """The norm without its gain and bias."""
    ones = edit.constant(f"{selection.name}/unit_gain", np.ones_like(gain))
    output = edit.fresh(f"{selection.name}/unit")
    name = f"{selection.name}/LayerNormalization"
    epsilon = float(attribute(norm, "epsilon", 1e-5))  # type: ignore[arg-type]
    return edit.emit(at, "LayerNormalization", [norm.input[0], ones], output, name, axis=-1, epsilon=epsilon)
