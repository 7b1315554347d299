"""A model looked at: its graph, what is known of its tensors, and the blocks found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from toast_onnx.matching.batches import elsewhere, free_batch, is_symbolic
from toast_onnx.matching.blocks import Match
from toast_onnx.matching.channels_first import turn_products
from toast_onnx.matching.contractions import spell_contractions
from toast_onnx.matching.facts import Facts, Probe
from toast_onnx.matching.find import find_blocks
from toast_onnx.matching.fused import SpelledOut, spell_out
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.input_shapes import Shapes, counted_shapes
from toast_onnx.matching.learned import LearnedQueries, spell_learned
from toast_onnx.matching.parallel import part_layers
from toast_onnx.matching.softmaxes import spell_softmaxes
from toast_onnx.matching.split_bias import join_split_biases
from toast_onnx.model import Model
from toast_onnx.wellformed import blame_model


@dataclass(frozen=True)
class Study(Probe):
    """Everything the other rooms need to know of a model.

    Attributes:
        view: the graph, attention nodes that hold their layers inside spelled out.
        facts: facts at probing shapes: two batch items where the batch is dynamic.
        counted: facts at the shapes that MACs are counted for: one batch item unless given otherwise.
        counted_shapes: those shapes.
        dynamic_batch: whether the first axis of the inputs is dynamic, in what they declare and in the graph itself.
        match: the blocks.
        source: the model as it came.
        spelled_out: the nodes that are spelled out in `view`.
        learned: constant queries that are spelled as layers in `view`.
        notes: what a person should know of the shapes that were taken.
        given: the concrete shapes that were asked for.
    """

    counted: Facts
    counted_shapes: Shapes
    dynamic_batch: bool
    match: Match
    source: Model
    spelled_out: tuple[SpelledOut, ...] = ()
    learned: tuple[LearnedQueries, ...] = ()
    notes: tuple[str, ...] = ()
    given: Mapping[str, Sequence[int]] = field(default_factory=dict)


def study(model: Model, given: Mapping[str, Sequence[int]] | None = None) -> Study:
    """Look at a model.

    Args:
        model: the model.
        given: concrete shapes of inputs (`--shape`), for axes that are symbolic.

    Raises:
        ModelError: a shape contradicts the model, or the graph does not fit any shapes tried.
    """
    with blame_model(model.path):
        return _look_at(model, given or {})


def _look_at(model: Model, given: Mapping[str, Sequence[int]]) -> Study:
    view = GraphView(join_split_biases(model))
    asked = given
    shapes, counted, usual, note = counted_shapes(view, given)
    named, given = bool(given), given if usual else shapes
    for respell in (spell_softmaxes, spell_contractions, part_layers, turn_products):
        respelled = respell(view, counted)
        if respelled is not view.model:
            view = GraphView(respelled)
            counted = Facts(view, shapes)
    plain, spelled = spell_out(view, counted)
    if spelled:
        view = GraphView(plain)
        counted = Facts(view, shapes)
    constant, learned = spell_learned(view, counted)
    if learned:
        view = GraphView(constant)
        counted = Facts(view, shapes)
    probed = free_batch(view, given)
    if probed is not None:
        facts, other = probed
    else:
        facts, other = counted, elsewhere(view, given, 1, fixed_batch=True) or counted
        if note is None and not named and is_symbolic(view):
            size = next(extents[0] for extents in shapes.values() if extents)
            note = f"the batch is declared symbolic, but the graph holds {size} inside: taken as fixed"
    facts.trust(other)
    other.trust(facts)
    match = find_blocks(Probe(view, facts, other))
    notes = () if note is None else (note,)
    return Study(view, facts, other, counted, shapes, probed is not None, match, model, spelled, learned, notes, asked)
