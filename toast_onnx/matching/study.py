"""A model looked at: its graph, what is known of its tensors, and the blocks found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toast_onnx.errors import ModelError
from toast_onnx.matching.blocks import Match
from toast_onnx.matching.channels_first import turn_products
from toast_onnx.matching.contractions import spell_contractions
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.find import find_blocks
from toast_onnx.matching.fused import SpelledOut, spell_out
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.split_bias import join_split_biases
from toast_onnx.model import Model
from toast_onnx.wellformed import blame_model

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Study:
    """Everything the other rooms need to know of a model.

    Attributes:
        view: the graph, attention nodes that hold their layers inside spelled out.
        facts: facts at probing shapes: two batch items where the batch is dynamic.
        other: facts at other sizes of every dynamic axis; differences mark what is dynamic.
        counted: facts at the shapes that MACs are counted for: one batch item unless given otherwise.
        counted_shapes: those shapes.
        dynamic_batch: whether the first axis of the inputs is dynamic.
        match: the blocks.
        source: the model as it came.
        spelled_out: the nodes that are spelled out in `view`.
    """

    view: GraphView
    facts: Facts
    other: Facts
    counted: Facts
    counted_shapes: Shapes
    dynamic_batch: bool
    match: Match
    source: Model
    spelled_out: tuple[SpelledOut, ...] = ()


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
    counted_shapes = input_shapes(view, given, 1)
    counted = Facts(view, counted_shapes)
    contracted = spell_contractions(view, counted)
    if contracted is not view.model:
        view = GraphView(contracted)
        counted = Facts(view, counted_shapes)
    turned = turn_products(view, counted)
    if turned is not view.model:
        view = GraphView(turned)
        counted = Facts(view, counted_shapes)
    plain, spelled = spell_out(view, counted)
    if spelled:
        view = GraphView(plain)
        counted = Facts(view, counted_shapes)
    dynamic_batch = input_shapes(view, {}, 2) != input_shapes(view, {}, 3)
    if dynamic_batch:
        try:
            facts = Facts(view, input_shapes(view, given, 2, fixed_batch=False))
        except ModelError:
            # The graph declares a dynamic batch but holds a fixed one inside.
            dynamic_batch, facts = False, counted
    else:
        facts = counted
    other = _other_facts(view, given, facts, dynamic_batch)
    facts.trust(other)
    other.trust(facts)
    match = find_blocks(view, facts, other)
    return Study(view, facts, other, counted, counted_shapes, dynamic_batch, match, model, spelled)


def _other_facts(view: GraphView, given: Mapping[str, Sequence[int]], facts: Facts, dynamic_batch: bool) -> Facts:
    """Facts with every dynamic axis at another size, as far as the graph allows."""
    batch = 3 if dynamic_batch else 1
    for shift in (32, 64, 28, 224, 0):
        shapes = input_shapes(view, given, batch, fixed_batch=not dynamic_batch, shift=shift)
        try:
            return Facts(view, shapes)
        except ModelError:
            continue
    return facts


def input_shapes(
    view: GraphView, given: Mapping[str, Sequence[int]], batch: int, *, fixed_batch: bool = True, shift: int = 0
) -> Shapes:
    """Concrete shapes of all inputs: what the graph declares, `given` where it is symbolic, defaults elsewhere.

    Defaults for symbolic axes: the first is `batch`; further ones of an image-like (rank 4) input 224, others 16. Axes
    that share a symbolic name get the same size.

    Args:
        view: the graph.
        given: shapes by input name.
        batch: size of symbolic first axes.
        fixed_batch: whether `given` decides the first axis, too.
        shift: added to every further symbolic axis.

    Raises:
        ModelError: `given` names no input, has another rank, or contradicts a fixed axis.
    """
    inputs = {
        i.name: i.type.tensor_type.shape.dim for i in view.model.proto.graph.input if i.name not in view.initializers
    }
    named: dict[str, int] = {}
    for name, sizes in given.items():
        _check_given(inputs, name, sizes)
        named.update({d.dim_param: s for d, s in zip(inputs[name], sizes, strict=True) if d.dim_param})
    shapes: Shapes = {}
    for name, dims in inputs.items():
        sizes_out = []
        for axis, dim in enumerate(dims):
            if dim.HasField("dim_value"):
                sizes_out.append(dim.dim_value)
            elif axis == 0 and not (fixed_batch and (name in given or dim.dim_param in named)):
                sizes_out.append(batch)
            else:
                size = given[name][axis] if name in given else named.get(dim.dim_param, 224 if len(dims) == 4 else 16)
                sizes_out.append(size + (shift if axis else 0))
        shapes[name] = tuple(sizes_out)
    return shapes


def _check_given(inputs: Mapping[str, Sequence[object]], name: str, sizes: Sequence[int]) -> None:
    if name not in inputs:
        raise ModelError(f"--shape names the input '{name}', but the model's inputs are: {', '.join(inputs)}")
    dims = inputs[name]
    if len(sizes) != len(dims):
        raise ModelError(f"--shape gives {len(sizes)} axes for '{name}', which has {len(dims)}")
    for dim, size in zip(dims, sizes, strict=True):
        if dim.HasField("dim_value") and dim.dim_value != size:  # type: ignore[attr-defined]
            raise ModelError(
                f"--shape gives {size} for an axis of '{name}' that the model fixes at {dim.dim_value}"  # type: ignore[attr-defined]
            )
