"""Writing networks that select their channels while the graph runs.

This is a second pass, over a graph whose static parts are done: what it changes it finds by tensor names, so that the
same selections can be written into a pruned graph, and as masks into its padded twin (`runtime_twin`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from toast_onnx.edit import GraphEdit, PlaceWriter
from toast_onnx.errors import MatchError
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
        layers = [target.linears[e.output] for e in ([ffn.fc2] if selection.part == "fc2" else ffn.entries)]
        write = _write_masked if selection.residual == "masked" else _write_chosen
        written.append(write(target, layers, selection))
    return target.edit.apply(), tuple(written)


def _write_chosen(target: Target, layers: Sequence[Linear], selection: Selection) -> Chosen:
    """x[kept] @ W[kept] in place of x @ W; in front of fc1 the norm and the residual stream see every channel."""
    scored = layers[0].input
    write = PlaceWriter(target.edit, min(each.node for each in layers), selection.name)
    kept = write_choice(write, selection, write_scores(write, selection, scored))
    for layer in layers:
        target.edit.remove(layer.nodes)
        w, b = weights(target.view, target.facts, layer), bias(target.view, target.facts, layer)
        write_small_linear(write, layer.input, kept, w, b, layer.output)
    return Chosen(selection, kept, scored)


def _write_masked(target: Target, layers: Sequence[Linear], selection: Selection) -> Chosen:
    """The release's form: dropped channels are zero in the residual stream, and so in what the norm sees."""
    edit, view, facts = target.edit, target.view, target.facts
    at, raw = move_stream(target, selection)
    write = PlaceWriter(edit, at, selection.name)
    chosen = write_choice(write, selection, write_scores(write, selection, raw), spare=1)
    kept = write_first(write, selection, chosen)
    mask = write_mask(write, selection, kept, facts.elem_type(selection.scored))
    edit.emit(at, "Mul", [raw, mask], selection.scored, f"{selection.name}/Mul")

    norm = view.nodes[view.producer[layers[0].input]]
    gain = facts.array(norm.input[1]).reshape(-1)
    shift = facts.array(norm.input[2]).reshape(-1) if len(norm.input) > 2 and norm.input[2] else np.zeros_like(gain)
    write = PlaceWriter(edit, min(each.node for each in layers), selection.name)
    unit = _unit_norm(write, norm, gain)
    for layer in layers:
        edit.remove(layer.nodes)
        w, b = weights(view, facts, layer), bias(view, facts, layer)
        shifted = shift.astype(np.float64) @ w.astype(np.float64) + (0 if b is None else b.astype(np.float64))
        write_normed_linear(write, selection, unit, chosen, w, gain, shifted, layer.output)
    return Chosen(selection, kept, raw)


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


def _unit_norm(write: PlaceWriter, norm: onnx.NodeProto, gain: np.ndarray) -> str:
    """The norm without its gain and bias."""
    ones = write.constant(np.ones_like(gain), "unit_gain")
    output = [write.edit.fresh(f"{write.name}/unit")]
    epsilon = float(attribute(norm, "epsilon", 1e-5))  # type: ignore[arg-type]
    return write.one("LayerNormalization", [norm.input[0], ones], outputs=output, axis=-1, epsilon=epsilon)
