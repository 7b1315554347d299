"""Concrete shapes for a graph's inputs: what it declares, what is given, and sizes that it takes where neither says."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from typing import NamedTuple

import onnx

from toast_onnx.errors import ModelError
from toast_onnx.matching.facts import Contradiction, Facts
from toast_onnx.matching.graph import GraphView, attribute

Shapes = dict[str, tuple[int, ...]]
Dims = Sequence[onnx.TensorShapeProto.Dimension]
#: Longest axis that is tried where the graph does not say which sizes its symbolic axes take.
_LONGEST = 4096
#: Sides of images that are tried where the graph fixes none that can be read off: text lines, then common crops.
_SIDES = (32, 48, 64, 96, 128, 224, 256, 384, 448, 512)
#: Batches that are tried besides the lengths that a graph names: it may hold one multiplied by something else.
_BATCHES = (2, 3, 4, 8, 16, 32)
#: How many sizes are tried together for two axes that differ.
_PAIRS = 200
#: Nodes walked, over all sizes tried: half a minute at most. Sizes that do not fit mostly show at the first Reshape.
_STEPS = 30_000


class Counted(NamedTuple):
    """Concrete shapes of the inputs at which a graph runs.

    Attributes:
        shapes: by input name.
        facts: at these shapes.
        usual: whether the defaults fit.
        note: what to say where other sizes were found.
    """

    shapes: Shapes
    facts: Facts
    usual: bool = True
    note: str | None = None


def counted_shapes(view: GraphView, given: Mapping[str, Sequence[int]]) -> Counted:
    """Shapes that MACs are counted for, and their facts; where the defaults do not fit, sizes that the graph holds.

    Args:
        view: the graph.
        given: shapes by input name.

    Raises:
        ModelError: no shapes fit the graph.
    """
    shapes = input_shapes(view, given, 1)
    try:
        facts = Facts(view, shapes)
        return _broadcast(view, given, shapes, facts) or Counted(shapes, facts)
    except Contradiction as e:
        free, batches = _free_axes(view, given)
        walked = 0
        for sizes in _attempts(view, free, batches):
            tried = input_shapes(view, given, 1, sizes=sizes)
            try:
                facts = Facts(view, tried)
            except Contradiction as misfit:
                walked += misfit.walked
                if walked > _STEPS:
                    break
                continue
            return Counted(tried, facts, False, _found(view, shapes, tried))
        if not free and not batches:
            raise
        where = ", ".join(f"{each}" for each in (*free.values(), *batches.values()))
        raise ModelError(f"{e} (free are {where})") from e


def _broadcast(view: GraphView, given: Mapping[str, Sequence[int]], shapes: Shapes, facts: Facts) -> Counted | None:
    """As `counted_shapes`, where one item goes in and several come out that are declared as many as go in.

    Such a graph holds a batch in operands that its own repeat: positions expanded to (3, tokens, channels), say.
    """
    symbols = _batch_symbols(_inputs(view)) - {d.dim_param for name in given for d in _inputs(view)[name]}
    rows = _rows(view, facts, symbols)
    if len(rows) != 1 or rows == {1}:
        return None
    (size,) = rows
    tried = input_shapes(view, given, size)
    try:
        found = Facts(view, tried)
    except Contradiction:
        return None
    fits = _rows(view, found, symbols) == {size}
    return Counted(tried, found, False, _found(view, shapes, tried)) if fits else None


def _rows(view: GraphView, facts: Facts, symbols: Collection[str]) -> set[int]:
    """First extents of the outputs that declare one of these symbols there."""
    dims = {o.name: o.type.tensor_type.shape.dim for o in view.model.proto.graph.output}
    named = [name for name, declared in dims.items() if len(declared) and declared[0].dim_param in symbols]
    return {extents[0] for name in named if (extents := facts.shape(name))}


def _found(view: GraphView, defaults: Shapes, shapes: Shapes) -> str:
    """Which inputs take other sizes than the defaults, and how to give them."""
    changed = [name for name in shapes if shapes[name] != defaults[name]]
    symbols = {d.dim_param: s for name in changed for d, s in zip(_inputs(view)[name], shapes[name], strict=True)}
    named = "".join(f", {symbol} = {size}" for symbol, size in symbols.items() if symbol)
    given = " ".join(f"--shape {name}={'x'.join(map(str, shapes[name]))}" for name in changed)
    return f"the graph fixes sizes that it declares as symbolic{named}: taken as {given}"


def _free_axes(view: GraphView, given: Mapping[str, Sequence[int]]) -> tuple[dict[str, str], dict[str, str]]:
    """Symbolic axes that nothing decides: key -> how to call it, batches apart."""
    inputs = _inputs(view)
    named = {d.dim_param for name in given for d in inputs[name]} - {""}
    batches = _batch_symbols(inputs)
    free: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, dims in inputs.items():
        for axis, dim in enumerate(dims):
            if name in given or dim.HasField("dim_value") or dim.dim_param in named:
                continue
            leads = dim.dim_param in batches if dim.dim_param else axis == 0
            (first if leads else free).setdefault(
                _key(name, axis, dim), f"axis {axis} of '{name}'" + (f" ({dim.dim_param})" if dim.dim_param else "")
            )
    return free, first


def _attempts(view: GraphView, free: Iterable[str], batches: Iterable[str]) -> Iterator[dict[str, int]]:
    """Sizes of symbolic axes, likelier ones first: one for all, one for one axis, one for each of two, batches."""
    free, lengths = list(free), _own_lengths(view)
    tried = list(dict.fromkeys([*_sides(view, lengths), *lengths]))
    if free:
        yield from (dict.fromkeys(free, length) for length in tried)
    if len(free) > 1:
        yield from ({axis: length} for axis in free for length in tried)
    if len(free) == 2:
        yield from (dict(zip(free, pair, strict=True)) for pair in islice(product(tried, tried), _PAIRS))
    batches = list(batches)
    if batches:
        yield from (dict.fromkeys(batches, length) for length in sorted({*_BATCHES, *lengths}))
        yield from (
            dict.fromkeys(batches, batch) | dict.fromkeys(free, length)
            for batch, length in islice(product(lengths, tried), _PAIRS)
        )


def _own_lengths(view: GraphView) -> list[int]:
    """Extents that Reshape targets and tables of the graph fix, which may be the length of a symbolic axis."""
    targets = {node.input[1] for node in view.nodes if node.op_type in ("Reshape", "Expand") and len(node.input) > 1}
    written = {node.output[0]: a.t for node in view.nodes if node.op_type == "Constant" for a in node.attribute}
    found: set[int] = set()
    for name in targets:
        tensor = view.initializers.get(name) or written.get(name)
        if tensor is not None:
            found |= {int(n) for n in view.model.array(tensor).reshape(-1)}
    for node in view.nodes:
        if node.op_type == "Concat":  # targets are put together from single extents
            parts = [written[n] for n in node.input if n in written and written[n].data_type == onnx.TensorProto.INT64]
            found |= {int(n) for part in parts for n in view.model.array(part).reshape(-1)}
        if node.op_type == "Add":
            found |= {n for name in node.input if name in view.initializers for n in view.initializers[name].dims[:-1]}
    return sorted(n for n in found if 1 < n <= _LONGEST)


def _sides(view: GraphView, lengths: Iterable[int]) -> list[int]:
    """Sides of square images whose patches, with up to five tokens besides, are as many as a table has rows."""
    if not any(len(dims) == 4 for dims in _inputs(view).values()):
        return []
    steps = {int(attribute(n, "strides", [1])[0]) for n in view.nodes if n.op_type == "Conv"} - {1}  # type: ignore[index]
    found = {
        math.isqrt(n - k) * step
        for n in lengths
        for k in range(6)
        for step in steps
        if n > k + 1 and math.isqrt(n - k) ** 2 == n - k
    }
    return [*sorted(s for s in found if s <= _LONGEST), *_SIDES]


def input_shapes(
    view: GraphView,
    given: Mapping[str, Sequence[int]],
    batch: int,
    *,
    fixed_batch: bool = True,
    shift: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> Shapes:
    """Concrete shapes of all inputs: what the graph declares, `given` where it is symbolic, defaults elsewhere.

    Defaults for symbolic axes: the first is `batch`; further ones of images (rank 4, no mask) 224, others 16. Axes that
    share a symbolic name get the same size, in all inputs: that of a batch where the name leads an input.

    Args:
        view: the graph.
        given: shapes by input name.
        batch: size of symbolic first axes, and of others of their name.
        fixed_batch: whether `given` decides these, too.
        shift: added to every further symbolic axis.
        sizes: of symbolic axes instead of the defaults, by symbol (or by input and axis).

    Raises:
        ModelError: `given` names no input, has another rank, or contradicts a fixed axis.
    """
    inputs = _inputs(view)
    named: dict[str, int] = {}
    for name, extents in given.items():
        _check_given(inputs, name, extents)
        named.update({d.dim_param: s for d, s in zip(inputs[name], extents, strict=True) if d.dim_param})
    batches, sides = _batch_symbols(inputs), _image_symbols(inputs)
    sizes = sizes or {}
    drawn: dict[str, int] = {}
    shapes: Shapes = {}
    for name, dims in inputs.items():
        extents_out = []
        for axis, dim in enumerate(dims):
            symbol = dim.dim_param
            leads = symbol in batches if symbol else axis == 0
            default = batch if leads else 224 if (symbol in sides if symbol else _is_image(name, dims)) else 16
            if dim.HasField("dim_value"):
                size = dim.dim_value
            elif symbol in drawn:
                size = drawn[symbol]
            elif leads and not (fixed_batch and (name in given or symbol in named)):
                size = sizes.get(_key(name, axis, dim), default) if fixed_batch else batch
            else:
                free = sizes.get(_key(name, axis, dim), default)
                size = given[name][axis] if name in given else named.get(symbol, free)
                size += 0 if leads else shift
            if symbol:
                drawn[symbol] = size
            extents_out.append(size)
        shapes[name] = tuple(extents_out)
    return shapes


def _inputs(view: GraphView) -> dict[str, Dims]:
    return {
        i.name: i.type.tensor_type.shape.dim for i in view.model.proto.graph.input if i.name not in view.initializers
    }


def _key(name: str, axis: int, dim: onnx.TensorShapeProto.Dimension) -> str:
    return dim.dim_param or f"{name}#{axis}"


def _is_image(name: str, dims: Dims) -> bool:
    return len(dims) == 4 and "mask" not in name.lower()


def _image_symbols(inputs: Mapping[str, Dims]) -> set[str]:
    """Symbols of images that name no axis of anything else: a length that a mask shares is one of tokens."""
    found = {d.dim_param for name, dims in inputs.items() if _is_image(name, dims) for d in dims}
    return found - {d.dim_param for name, dims in inputs.items() if len(dims) != 4 for d in dims} - {""}


def _batch_symbols(inputs: Mapping[str, Dims]) -> set[str]:
    """Symbols that name a batch: on the first axis of some input, and never two axes of one (a mask's lengths)."""
    first = {dims[0].dim_param for dims in inputs.values() if len(dims)} - {""}
    symbols = [[d.dim_param for d in dims] for dims in inputs.values()]
    return {s for s in first if all(each.count(s) < 2 for each in symbols)}


def _check_given(inputs: Mapping[str, Dims], name: str, sizes: Sequence[int]) -> None:
    if name not in inputs:
        raise ModelError(f"--shape names the input '{name}', but the model's inputs are: {', '.join(inputs)}")
    dims = inputs[name]
    if len(sizes) != len(dims):
        raise ModelError(f"--shape gives {len(sizes)} axes for '{name}', which has {len(dims)}")
    for dim, size in zip(dims, sizes, strict=True):
        if dim.HasField("dim_value") and dim.dim_value != size:
            raise ModelError(f"--shape gives {size} for an axis of '{name}' that the model fixes at {dim.dim_value}")
