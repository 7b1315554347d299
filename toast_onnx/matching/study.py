"""A model looked at: its graph, what is known of its tensors, and the blocks found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

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
INT64 = onnx.TensorProto.INT64
#: Longest axis that is tried where the graph does not say which sizes its symbolic axes take.
_LONGEST = 4096


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
    given, counted_shapes, counted = _counted(view, given)
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


def _counted(view: GraphView, given: Mapping[str, Sequence[int]]) -> tuple[Mapping[str, Sequence[int]], Shapes, Facts]:
    """Shapes that MACs are counted for, and their facts; where the defaults do not fit, lengths that the graph holds.

    Returns:
        The shapes to take as given, those to count for, and the facts.
    """
    shapes = input_shapes(view, given, 1)
    try:
        return given, shapes, Facts(view, shapes)
    except ModelError as e:
        for length in _own_lengths(view):
            tried = input_shapes(view, given, 1, length=length)
            try:
                facts = Facts(view, tried)
            except ModelError:
                continue
            return tried, tried, facts
        raise e


def _own_lengths(view: GraphView) -> list[int]:
    """Extents that Reshape targets and tables of the graph fix, which may be the length of a symbolic axis."""
    targets = {node.input[1] for node in view.nodes if node.op_type == "Reshape" and len(node.input) > 1}
    written = {node.output[0]: a.t for node in view.nodes if node.op_type == "Constant" for a in node.attribute}
    found: set[int] = set()
    for name in targets:
        tensor = view.initializers.get(name) or written.get(name)
        if tensor is not None:
            found |= {int(n) for n in view.model.array(tensor).reshape(-1)}
    for node in view.nodes:
        if node.op_type == "Concat":  # targets are put together from single extents
            parts = [written[name] for name in node.input if name in written and written[name].data_type == INT64]
            found |= {int(n) for part in parts for n in view.model.array(part).reshape(-1)}
        if node.op_type == "Add":
            found |= {n for name in node.input if name in view.initializers for n in view.initializers[name].dims[:-1]}
    return sorted(n for n in found if 1 < n <= _LONGEST)


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
    view: GraphView,
    given: Mapping[str, Sequence[int]],
    batch: int,
    *,
    fixed_batch: bool = True,
    shift: int = 0,
    length: int | None = None,
) -> Shapes:
    """Concrete shapes of all inputs: what the graph declares, `given` where it is symbolic, defaults elsewhere.

    Defaults for symbolic axes: the first is `batch`; further ones of an image-like (rank 4) input 224, others 16. Axes
    that share a symbolic name get the same size, in all inputs: that of a batch where the name leads an input.

    Args:
        view: the graph.
        given: shapes by input name.
        batch: size of symbolic first axes, and of others of their name.
        fixed_batch: whether `given` decides these, too.
        shift: added to every further symbolic axis.
        length: size of these instead of the defaults.

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
    batches = _batch_symbols(inputs)
    drawn: dict[str, int] = {}
    shapes: Shapes = {}
    for name, dims in inputs.items():
        sizes_out = []
        for axis, dim in enumerate(dims):
            symbol = dim.dim_param
            leads = symbol in batches if symbol else axis == 0
            if dim.HasField("dim_value"):
                size = dim.dim_value
            elif symbol in drawn:
                size = drawn[symbol]
            elif leads and not (fixed_batch and (name in given or symbol in named)):
                size = batch
            else:
                size = (
                    given[name][axis] if name in given else named.get(symbol, length or (224 if len(dims) == 4 else 16))
                )
                size += 0 if leads else shift
            if symbol:
                drawn[symbol] = size
            sizes_out.append(size)
        shapes[name] = tuple(sizes_out)
    return shapes


def _batch_symbols(inputs: Mapping[str, Sequence[onnx.TensorShapeProto.Dimension]]) -> set[str]:
    """Symbols that name a batch: on the first axis of some input, and never two axes of one (a mask's lengths)."""
    first = {dims[0].dim_param for dims in inputs.values() if len(dims)} - {""}
    symbols = [[d.dim_param for d in dims] for dims in inputs.values()]
    return {s for s in first if all(each.count(s) < 2 for each in symbols)}


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
