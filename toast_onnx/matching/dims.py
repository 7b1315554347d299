"""Nodes between Q or K and the scores that act on a head's dimensions one by one or in pairs.

Rotary embedding turns dimensions in pairs: q' = q * cos + turned(q) * sin, interleaved or in halves, with tables that
all heads share (Su et al., RoFormer, 2021). Decomposed relative positions (ViTDet) read the queries a second time, in
products with tables along the dimensions. In both cases restricting every tensor to the same dimensions of every head
is exact as long as pairs stay together, whatever nodes an exporter writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toast_onnx.matching.facts import Facts, reduced_axes
from toast_onnx.matching.graph import GraphView, attribute, is_standard
from toast_onnx.matching.operators import MEASURING, PASSING, Trait, having
from toast_onnx.matching.probe import carried, scalar_factor
from toast_onnx.reasons import Kind

_MOVING, _LINEAR = having(Trait.CUTS), having(Trait.LINEAR)
_POOLING = having(Trait.TAKES_LARGEST)  # tokens, in the queries of Hiera and SAM 2


@dataclass(frozen=True)
class Table:
    """What a product contracts a head's dimensions with, besides the scores.

    Attributes:
        node: position of the product.
        operand: position of the table among its inputs.
        axis: axis of the dimensions in the table, not negative.
    """

    node: int
    operand: int
    axis: int


@dataclass(frozen=True)
class DimRegion:
    """Everything between a tensor of queries or keys and the scores.

    Attributes:
        start: the tensor that its layer's data movement ends in.
        nodes: positions of the nodes, in graph order.
        tables: what the dimensions are contracted with besides the scores.
        axes: tensor name -> axis along which the dimensions lie, for `start` and the tensors that the nodes make.
        unit_of: tensor name -> (extent of that axis,) unit (a pair, or a single dimension) at each position.
        plain: whether every dimension arrives at the scores as it was, but for one common factor.
        pools: whether tokens are pooled on the way.
    """

    start: str
    nodes: tuple[int, ...]
    tables: tuple[Table, ...]
    axes: dict[str, int]
    unit_of: dict[str, np.ndarray]
    plain: bool
    pools: bool


@dataclass(frozen=True)
class Operand:
    """Queries or keys: where they start and where the scores read them.

    Attributes:
        what: Q or K, in messages.
        start: last tensor that is only moved.
        end: the core's operand; the same tensor where nothing computes between them.
        dim_axis: axis of the dimensions in `end`.
    """

    what: str
    start: str
    end: str
    dim_axis: int


def match_dims(
    view: GraphView, facts: Facts, core: Sequence[int], operands: Sequence[Operand], layers: Sequence[str], dim: int
) -> tuple[tuple[DimRegion, ...], np.ndarray]:
    """Follow queries and keys to the scores through whatever acts on dimensions singly or in pairs.

    Args:
        view: the graph.
        facts: its facts.
        core: positions of the core's nodes.
        operands: queries and keys.
        layers: outputs of the attention's linear layers; tables must not depend on them.
        dim: dimensions of a head.

    Returns:
        A region for every operand, and (dim,) the unit that each dimension belongs to. All units are equally large.

    Raises:
        Decline: something on the way mixes more than two dimensions or is not understood.
    """
    found = []
    for operand in operands:
        nodes, tables = _follow(view, facts, core, operand)
        _check_tables(view, nodes, tables, operand, layers)
        found.append((nodes, tables, _label(view, facts, nodes, operand, dim)))
    units = _units([labels for _, _, labels in found], operands, dim)
    regions = []
    for operand, (nodes, tables, labels) in zip(operands, found, strict=True):
        axes, unit_of = _axes(labels, units, operand)
        _check_contractions(view, facts, tables, axes, unit_of)
        computing = [i for i in nodes if view.nodes[i].op_type in _LINEAR | _POOLING]
        plain = all(scalar_factor(view, facts, i) for i in computing)
        pools = [i for i in nodes if view.nodes[i].op_type in _POOLING]
        if pools and operand.what != "Q":
            raise view.decline(pools[0], Kind.DIMENSIONS, "{node} pools {part}", part=operand.what)
        regions.append(DimRegion(operand.start, nodes, tables, axes, unit_of, plain, bool(pools)))
    return tuple(regions), units


def match_repeats(view: GraphView, facts: Facts, core: Sequence[int], operand: Operand, dim: int) -> DimRegion:
    """What repeats the heads of keys or values for several queries each: movement, and one common factor.

    Args:
        view: the graph.
        facts: its facts.
        core: positions of the core's nodes.
        operand: keys or values.
        dim: dimensions of a head.

    Raises:
        Decline: something else happens on the way, or the dimensions do not stay in order.
    """
    nodes, tables = _follow(view, facts, core, operand)
    if tables or not all(view.nodes[i].op_type in _MOVING | PASSING or scalar_factor(view, facts, i) for i in nodes):
        raise Kind.COMPUTED.decline("{part} is computed on where its heads are repeated", part=operand.what)
    axes, unit_of = _axes(_label(view, facts, nodes, operand, dim), np.arange(dim), operand)
    if any(not np.array_equal(units, np.arange(units.size) % dim) for units in unit_of.values()):
        raise Kind.DIMENSIONS.decline(
            "the dimensions of {part} are reordered where its heads are repeated", part=operand.what
        )
    return DimRegion(operand.start, nodes, (), axes, unit_of, True, False)


def arriving(view: GraphView, facts: Facts, core: Sequence[int], operand: Operand, numbers: np.ndarray) -> np.ndarray:
    """The numbers given to the elements of an operand's start, as they arrive at the core.

    Raises:
        Decline: what arrives at one place is made of different numbers.
    """
    nodes, _ = _follow(view, facts, core, operand)
    arrays = _carry(view, facts, nodes, {operand.start: [numbers]})[operand.end]
    if any((array != arrays[0]).any() for array in arrays):
        raise Kind.LAYOUT.decline("heads of {part} are mixed on the way to the core", part=operand.what)
    return arrays[0]


def _follow(
    view: GraphView, facts: Facts, core: Sequence[int], operand: Operand
) -> tuple[tuple[int, ...], tuple[Table, ...]]:
    """The nodes from the operand's start to everything that reads its dimensions."""
    nodes: set[int] = set()
    tables: list[Table] = []
    tensors = {operand.start}
    pending = [operand.start]
    while pending:
        name = pending.pop()
        if name in view.outputs:
            raise Kind.OUTPUT.decline("'{tensor}' is also an output of the graph", tensor=name)
        for i in view.readers(name):
            node = view.nodes[i]
            if i in nodes or (i in core and name == operand.end):
                continue
            if node.op_type in ("MatMul", "Einsum"):
                tables.append(_table(view, facts, i, name))
            elif is_standard(node) and node.op_type in _MOVING | PASSING | _LINEAR | _POOLING:
                nodes.add(i)
                made = [t for t in node.output if t and t not in tensors]
                tensors.update(made)
                pending.extend(made)
            else:
                raise view.decline(i, Kind.COMPUTED, "{part} is read by {node}", part=operand.what)
    if operand.end not in tensors:
        raise Kind.UNFOLLOWED.decline("the way of {part} to the scores cannot be followed", part=operand.what)
    return tuple(sorted(nodes)), tuple(tables)


def _table(view: GraphView, facts: Facts, i: int, name: str) -> Table:
    """The other operand of a product over the last axis of `name`."""
    node = view.nodes[i]
    if list(node.input).count(name) != 1 or len(node.input) != 2:
        raise view.decline(i, Kind.DIMENSIONS, "it is multiplied by itself in {node}")
    mine = list(node.input).index(name)
    rank, other = len(facts.shape(name) or ()), len(facts.shape(node.input[1 - mine]) or ())
    if node.op_type == "MatMul" and rank > 1 and other > 1:
        if mine == 0:
            return Table(i, 1, other - 2)
    elif node.op_type == "Einsum":
        equation = attribute(node, "equation", b"")
        assert isinstance(equation, bytes)
        terms, _, result = equation.decode().replace(" ", "").partition("->")
        split = terms.split(",")
        letter = split[mine][-1:]
        counts = [split[mine].count(letter), split[1 - mine].count(letter), result.count(letter)]
        if letter.isalpha() and result and "." not in terms and counts == [1, 1, 0]:
            return Table(i, 1 - mine, split[1 - mine].index(letter))
    raise view.decline(i, Kind.DIMENSIONS, "it is read by {node}, not over the dimensions of a head")


def _check_tables(
    view: GraphView, nodes: Sequence[int], tables: Sequence[Table], operand: Operand, layers: Sequence[str]
) -> None:
    """Whatever enters from outside must not depend on the layers that shrink."""
    inside = {operand.start} | {t for i in nodes for t in view.nodes[i].output}
    outside = {t for i in nodes for t in view.nodes[i].input if view.nodes[i].op_type in _LINEAR and t not in inside}
    outside |= {view.nodes[t.node].input[t.operand] for t in tables}
    floor = min(view.producer[name] for name in layers)
    seen: set[str] = set()
    pending = list(outside)
    while pending:
        name = pending.pop()
        if name in layers or name in inside:
            raise Kind.DIMENSIONS.decline("{part} meets a tensor that is made of Q, K or V", part=operand.what)
        i = view.producer.get(name, -1)
        if i > floor and name not in seen and view.nodes[i].op_type not in MEASURING:
            pending.extend(view.nodes[i].input)
        seen.add(name)


def _label(
    view: GraphView, facts: Facts, nodes: Sequence[int], operand: Operand, dim: int
) -> dict[str, list[np.ndarray]]:
    """Tensor name -> label arrays, one for each dimension that an element may be made of; labels are 1 + dimension."""
    shape = facts.shape(operand.start)
    if shape is None or facts.shape(operand.end) is None:
        raise Kind.SHAPE.decline("the shape of {part} cannot be inferred", part=operand.what)
    axis = operand.dim_axis if operand.start == operand.end else -1
    numbers = np.moveaxis(np.empty(shape, np.int32), axis, -1)
    numbers[:] = np.arange(shape[axis], dtype=np.int32) % dim + 1
    return _carry(view, facts, nodes, {operand.start: [np.moveaxis(numbers, -1, axis)]})


def _carry(
    view: GraphView, facts: Facts, nodes: Sequence[int], labels: dict[str, list[np.ndarray]]
) -> dict[str, list[np.ndarray]]:
    """The labels of a tensor and of all that the nodes make of it (in place)."""
    for i in nodes:
        node = view.nodes[i]
        if node.op_type == "Concat":
            _concat(view, i, labels)
        elif node.op_type in _MOVING:
            _move(view, facts, i, labels)
        elif node.op_type in _POOLING:
            _pool(view, facts, i, labels)
        else:
            labels[node.output[0]] = _computed(view, facts, i, labels)
    return labels


def _computed(view: GraphView, facts: Facts, i: int, labels: Mapping[str, list[np.ndarray]]) -> list[np.ndarray]:
    """Labels after a node that is linear in the dimensions, one by one."""
    node = view.nodes[i]
    mine = [name for name in node.input if name in labels]
    both = len(mine) == len(node.input) or node.op_type in PASSING
    if node.op_type in ("Add", "Sub") and not both:
        raise view.decline(i, Kind.DIMENSIONS, "{node} adds something to single dimensions")
    if (node.op_type == "Mul" and both) or (node.op_type == "Div" and mine != [node.input[0]]):
        raise view.decline(i, Kind.DIMENSIONS, "{node} is not linear in the dimensions")
    shapes = {facts.shape(name) for name in (*mine, node.output[0])}
    if len(shapes) > 1 or None in shapes:
        raise view.decline(i, Kind.DIMENSIONS, "{node} spreads the dimensions over new axes")
    return [array for name in mine for array in labels[name]]


def _concat(view: GraphView, i: int, labels: dict[str, list[np.ndarray]]) -> None:
    node = view.nodes[i]
    if any(name not in labels for name in node.input):
        raise view.decline(i, Kind.DIMENSIONS, "{node} puts the dimensions beside something else")
    most = max(len(labels[name]) for name in node.input)
    padded = [(labels[name] * most)[:most] for name in node.input]
    axis = int(attribute(node, "axis", 0))  # type: ignore[call-overload]
    labels[node.output[0]] = [np.concatenate([p[k] for p in padded], axis=axis) for k in range(most)]


def _move(view: GraphView, facts: Facts, i: int, labels: dict[str, list[np.ndarray]]) -> None:
    node = view.nodes[i]
    if node.input[0] not in labels:
        raise view.decline(i, Kind.DIMENSIONS, "{node} uses the dimensions as numbers")
    labels.update(carried(view, facts, i, map(np.ascontiguousarray, labels[node.input[0]])))


def _pool(view: GraphView, facts: Facts, i: int, labels: dict[str, list[np.ndarray]]) -> None:
    node = view.nodes[i]
    name, made = node.input[0], node.output[0]
    shape = facts.shape(made)
    if shape is None or any(node.output[1:]):
        raise view.decline(i, Kind.DIMENSIONS, "{node} tells where its largest elements lie")
    rank = len(facts.shape(name) or ())
    axes = reduced_axes(facts, node, rank) if node.op_type == "ReduceMax" else range(2, rank)
    along = None if axes is None else tuple(axes)
    labels[made] = []
    for array in labels[name]:
        pooled = array.min(axis=along, keepdims=True)
        if (pooled != array.max(axis=along, keepdims=True)).any():
            raise view.decline(i, Kind.DIMENSIONS, "{node} pools different dimensions of a head")
        same = pooled.size == int(np.prod(shape))
        labels[made].append(pooled.reshape(shape) if same else np.broadcast_to(pooled, shape))


def _check_contractions(
    view: GraphView, facts: Facts, tables: Sequence[Table], axes: Mapping[str, int], unit_of: Mapping[str, np.ndarray]
) -> None:
    """A table must meet the dimensions, all of them, on the last axis."""
    for table in tables:
        names = view.nodes[table.node].input
        name, shape = names[1 - table.operand], facts.shape(names[table.operand])
        last = len(facts.shape(name) or ()) - 1
        if shape is None or axes[name] != last or shape[table.axis] != unit_of[name].size:
            raise view.decline(table.node, Kind.DIMENSIONS, "it is read by {node}, not over the dimensions of a head")


def _units(found: Sequence[Mapping[str, list[np.ndarray]]], operands: Sequence[Operand], dim: int) -> np.ndarray:
    """(dim,) unit of each dimension: what meets in one element, and in one product of the scores, stays together.

    Rotary embedding in halves, dim = 4: every element of q' = q cos + [-q2 -q3 q0 q1] sin is made of two dimensions.

        labels of q'     0 1 2 3        units    0 1 0 1
                         2 3 0 1
    """
    pairs = [pair for labels in found for pair in _mixed(labels, dim)]
    arrivals = [_arrivals(labels, operand, dim) for labels, operand in zip(found, operands, strict=True)]
    first: dict[int, int] = {}
    for position, dimension in sorted((each for one in arrivals for each in one), key=lambda each: each[0]):
        pairs.append((first.setdefault(position, dimension), dimension))
    _, units = np.unique(_joined(pairs, dim), return_inverse=True)
    sizes = np.bincount(units)
    if sizes.max() > 2 or sizes.size == 1:
        text = "up to {most} dimensions of a head are mixed with each other"
        raise Kind.DIMENSIONS.decline(text, most=sizes.max())
    return _evened(units, sizes)


def _mixed(labels: Mapping[str, list[np.ndarray]], dim: int) -> list[tuple[int, int]]:
    """Pairs of dimensions that one element of any tensor is made of."""
    return [
        (a - 1, b - 1)
        for arrays in labels.values()
        for array in arrays[1:]
        for a, b in _meetings(arrays[0], array, dim)
    ]


def _arrivals(labels: Mapping[str, list[np.ndarray]], operand: Operand, dim: int) -> list[tuple[int, int]]:
    """(position along the core's axis of dimensions, dimension that arrives there)."""
    array = np.moveaxis(labels[operand.end][0], operand.dim_axis, -1)
    columns = array.reshape(-1, array.shape[-1])
    if columns.shape[1] % dim:
        raise Kind.DIMENSIONS.decline("only some of the dimensions of {part} arrive", part=operand.what)
    positions = np.broadcast_to(np.arange(columns.shape[1], dtype=np.int32) % dim, columns.shape)
    return [(position, label - 1) for position, label in _meetings(positions, columns, dim)]


def _joined(pairs: Iterable[tuple[int, int]], count: int) -> np.ndarray:
    """(count,) a number for each that those have in common which pairs join, directly or through others."""
    owner = np.arange(count)
    for a, b in pairs:
        owner[owner == owner[b]] = owner[a]
    return owner


def _meetings(a: np.ndarray, b: np.ndarray, most: int) -> list[tuple[int, int]]:
    """The different pairs of numbers, none above `most`, at the same place of two arrays."""
    codes = np.flatnonzero(np.bincount(a.ravel().astype(np.int64) * (most + 1) + b.ravel()))
    return [divmod(int(code), most + 1) for code in codes]


def _evened(units: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Units of equal size: where only some dimensions are turned, the others stay in twos as well."""
    if sizes.min() == sizes.max():
        return units
    single = np.flatnonzero(sizes[units] == 1)
    if single.size % 2:
        raise Kind.DIMENSIONS.decline("an odd number of dimensions is not part of the rotary embedding")
    evened = units.copy()
    evened[single] = units.max() + 1 + np.arange(single.size) // 2
    return np.unique(evened, return_inverse=True)[1]


def _axes(
    labels: Mapping[str, list[np.ndarray]], units: np.ndarray, operand: Operand
) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Axis of the dimensions in every tensor, and the unit at each position of it."""
    axes: dict[str, int] = {}
    unit_of: dict[str, np.ndarray] = {}
    for name, arrays in labels.items():
        array = units[arrays[0] - 1]
        if array.size == 0:  # the prefix tokens of a model without any: only its extents say where dimensions lie
            axes[name], unit_of[name] = _axis_of_extent(array.shape, units, operand), units
            continue
        for axis in range(array.ndim):
            columns = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
            if (columns == columns[:1]).all() and (columns[0] != columns[0, 0]).any():
                axes[name], unit_of[name] = axis, columns[0]
                break
        else:
            raise Kind.DIMENSIONS.decline("the dimensions of {part} are spread over several axes", part=operand.what)
    if axes[operand.end] != operand.dim_axis % labels[operand.end][0].ndim:
        raise Kind.DIMENSIONS.decline(
            "{part} does not arrive with its dimensions where the scores need them", part=operand.what
        )
    return axes, unit_of


def _axis_of_extent(shape: tuple[int, ...], units: np.ndarray, operand: Operand) -> int:
    fitting = [axis for axis, extent in enumerate(shape) if extent == units.size]
    if not fitting:
        raise Kind.DIMENSIONS.decline("the dimensions of {part} are spread over several axes", part=operand.what)
    return fitting[-1]
