"""How a linear layer's output lies in an attention operand, read off arrived labels as mixed-radix factors.

Every axis of the operand is a product of factors, outermost first: (parts of) leading axes of the layer's output, the
heads, or the dimensions of a head. From this description the same movement can be written in one canonical spelling
(Reshape, Transpose, Reshape) for any head_dim, with dynamic axes kept dynamic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from toast_onnx.reasons import Decline, Kind

HEAD = -1
DIM = -2
#: A factor: axis of the operand, and its number there.
Place = tuple[int, int]


@dataclass(frozen=True)
class Factor:
    """One factor of an axis.

    Attributes:
        source: leading axis of the layer's output it walks along, or HEAD or DIM.
        stride: step along that axis.
        size: number of steps at the probed shapes.
        dynamic: whether the size changes with the graph's input shapes.
    """

    source: int
    stride: int
    size: int
    dynamic: bool = False


@dataclass(frozen=True)
class Layout:
    """Where every channel of a linear layer lies in an operand.

    Attributes:
        axes: factors of every axis of the operand, outermost first; an axis of extent 1 may have none.
        sizes: extents of the layer's output at the probed shapes, channel axis included.
        dynamic: which of those change with the graph's input shapes.
        channel_axis: position of the channels in the layer's output (not negative).
        channels: (num_heads, head_dim) channel of the layer that becomes dimension e of head h.
    """

    axes: tuple[tuple[Factor, ...], ...]
    sizes: tuple[int, ...]
    dynamic: tuple[bool, ...]
    channel_axis: int
    channels: np.ndarray

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return int(self.channels.shape[0])

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return int(self.channels.shape[1])

    def with_heads(self, kept: np.ndarray) -> Layout:
        """The same layout for some of the heads (kept,), of at least two."""
        axes = tuple(
            tuple(replace(f, size=kept.size) if f.source == HEAD else f for f in factors) for factors in self.axes
        )
        return replace(self, axes=axes, channels=self.channels[kept])


def read_layout(
    labels: np.ndarray,
    sizes: tuple[int, ...],
    other_sizes: tuple[int, ...],
    other_shape: tuple[int, ...],
    channel_axis: int,
    dim_axis: int,
    what: str,
    heads: int | None = None,
) -> Layout:
    """Describe an operand whose elements are labelled 1 + (flat index in the layer's output).

    Args:
        labels: labels, in the operand's shape.
        sizes: shape of the layer's output.
        other_sizes: the same at other input shapes; differences mark dynamic axes.
        other_shape: the operand's shape at those other input shapes.
        channel_axis: axis of the channels in the layer's output.
        dim_axis: axis of the head's dimensions in the operand.
        what: name of the operand in messages.
        heads: number of heads when `dim_axis` holds heads and dimensions together.

    Raises:
        Decline: the labels are incomplete, mixed, or follow no such pattern.
    """
    if (labels == 0).any():
        raise Kind.UNFOLLOWED.decline("{part} contains values that do not come from its linear layer", part=what)
    rank = labels.ndim
    dim_axis %= rank
    channel_axis %= len(sizes)
    coordinates = np.stack(np.unravel_index(labels - 1, sizes))  # (len(sizes), *labels.shape)
    axes: list[list[Factor]] = []
    for axis in range(rank):
        index: list[int | slice] = [0] * rank
        index[axis] = slice(None)
        profile = coordinates[(slice(None), *index)]  # (len(sizes), extent)
        if axis == dim_axis:
            axes.append(_dim_factors(profile, channel_axis, heads, what))
        else:
            axes.append(_factors(profile, channel_axis, what))
    head_factors = [f for factors in axes for f in factors if f.source == HEAD]
    if len(head_factors) > 1:
        raise Kind.LAYOUT.decline("{part}: heads lie along more than one axis", part=what)
    _check_tiling(axes, sizes, channel_axis, what)
    channels = _channel_table(coordinates[channel_axis], axes)
    _check_reconstruction(coordinates, axes, channels, channel_axis, what)
    dynamic = tuple(a != b for a, b in zip(sizes, other_sizes, strict=True))
    others = _other_extents(axes, sizes, other_sizes, labels.shape, other_shape, what)
    marked = tuple(
        tuple(replace(f, dynamic=f.size != extent) for f, extent in zip(factors, extents, strict=True))
        for factors, extents in zip(axes, others, strict=True)
    )
    return Layout(marked, sizes, dynamic, channel_axis, channels)


def axis_origins(
    labels: np.ndarray,
    other_shape: tuple[int, ...],
    sizes: tuple[int, ...],
    other_sizes: tuple[int, ...],
    channel_axis: int,
) -> list[int | tuple[int, int]] | None:
    """Say where the extents of a moved tensor come from.

    Args:
        labels: 1 + (flat index in the source), in the moved tensor's shape.
        other_shape: the moved tensor's shape at other input shapes.
        sizes: shape of the source.
        other_sizes: the source's shape at those other input shapes.
        channel_axis: axis of the channels in the source.

    Returns:
        For every axis its fixed extent, or (axis of the source, factor) for a dynamic one; None when a dynamic axis
        is no multiple of one axis of the source.
    """
    origins: list[int | tuple[int, int]] = []
    for axis, extent in enumerate(labels.shape):
        if extent == other_shape[axis]:
            origins.append(extent)
            continue
        index: list[int | slice] = [0] * labels.ndim
        index[axis] = slice(None)
        profile = np.stack(np.unravel_index(np.maximum(labels[tuple(index)] - 1, 0), sizes))  # (len(sizes), extent)
        try:
            factors = _factors(profile, channel_axis % len(sizes), "")
        except Decline:
            return None
        moving = [f for f in factors if f.source >= 0 and sizes[f.source] != other_sizes[f.source]]
        whole = [f for f in moving if f.size == sizes[f.source]]
        if len(moving) != 1 or len(whole) != 1:
            return None
        origins.append((whole[0].source, extent // whole[0].size))
    return origins


def invert_labels(labels: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Turn labels of a source found in a destination into labels of the destination found in the source.

    Raises:
        Decline: the movement is not one to one.
    """
    flat = labels.reshape(-1)
    inverse = np.zeros(int(np.prod(shape)) + 1, np.int64)
    inverse[flat] = np.arange(1, flat.size + 1)
    if flat.size != inverse.size - 1 or (inverse[1:] == 0).any():
        raise Kind.UNFOLLOWED.decline("{part} does not reach its projection one to one", part=what)
    return inverse[1:].reshape(shape)


def _factors(profile: np.ndarray, channel_axis: int, what: str) -> list[Factor]:
    """Factors of one axis from the coordinates along it; innermost last."""
    extent = profile.shape[1]
    if extent == 1:
        return []
    changed = np.flatnonzero(profile[:, 1] != profile[:, 0])
    if changed.size != 1:
        raise Kind.LAYOUT.decline(
            "{part}: one of its axes mixes channels and positions in a way that is not understood", part=what
        )
    k = int(changed[0])
    others = np.delete(profile, k, axis=0)
    same = (others == others[:, :1]).all(axis=0)
    if k == channel_axis:
        stride, source = 0, HEAD
        steps = same
    else:
        stride, source = int(profile[k, 1] - profile[k, 0]), k
        steps = same & (profile[k] == profile[k, 0] + stride * np.arange(extent))
    size = int(np.argmin(steps)) if not steps.all() else extent
    if extent % size or size < 2:
        raise Kind.LAYOUT.decline("{part}: one of its axes follows no regular pattern", part=what)
    return [*_factors(profile[:, ::size], channel_axis, what), Factor(source, stride, size)]


def _dim_factors(profile: np.ndarray, channel_axis: int, heads: int | None, what: str) -> list[Factor]:
    if (np.delete(profile, channel_axis, axis=0) != np.delete(profile, channel_axis, axis=0)[:, :1]).any():
        raise Kind.LAYOUT.decline("{part}: the dimensions of a head come from different positions", part=what)
    extent = profile.shape[1]
    if heads is None:
        return [Factor(DIM, 0, extent)]
    if extent % heads:
        raise Kind.NUMBERS.decline(
            "{part}: {extent} channels do not divide into {heads} heads", part=what, extent=extent, heads=heads
        )
    return [Factor(HEAD, 0, heads), Factor(DIM, 0, extent // heads)]


def _check_tiling(axes: list[list[Factor]], sizes: tuple[int, ...], channel_axis: int, what: str) -> None:
    for source, extent in enumerate(sizes):
        if source == channel_axis:
            continue
        stride = 1
        for factor in sorted((f for a in axes for f in a if f.source == source), key=lambda f: f.stride):
            if factor.stride != stride:
                raise Kind.LAYOUT.decline("{part}: positions are repeated, skipped or reordered on the way", part=what)
            stride *= factor.size
        if stride != extent:
            raise Kind.LAYOUT.decline("{part}: only part of the positions arrives", part=what)


def _channel_table(channel: np.ndarray, axes: list[list[Factor]]) -> np.ndarray:
    """(num_heads, head_dim) channel numbers, read where all positions are zero."""
    index: list[int | slice] = []
    order = []
    for axis, factors in enumerate(axes):
        inner = [f.source for f in factors]
        if inner == [DIM]:
            index.append(slice(None))
            order.append(DIM)
        elif HEAD in inner and DIM in inner:
            size = next(f.size for f in factors if f.source == HEAD)
            return np.array(np.moveaxis(channel, axis, -1)[(0,) * (channel.ndim - 1)].reshape(size, -1))
        elif HEAD in inner:
            at = inner.index(HEAD)
            step = int(np.prod([f.size for f in factors[at + 1 :]], dtype=np.int64))
            index.append(slice(0, step * factors[at].size, step))
            order.append(HEAD)
        else:
            index.append(0)
    table = channel[tuple(index)]
    if order == [DIM]:
        return np.array(table[None])
    return np.array(table if order == [HEAD, DIM] else table.T)


def _check_reconstruction(
    coordinates: np.ndarray, axes: list[list[Factor]], channels: np.ndarray, channel_axis: int, what: str
) -> None:
    """Rebuild every label from the factors; any difference means that the description is wrong."""
    shape = coordinates.shape[1:]
    expected = np.zeros_like(coordinates)
    head, dim = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for axis, factors in enumerate(axes):
        view = [1] * len(shape)
        view[axis] = -1
        position = np.arange(shape[axis]).reshape(view)
        for factor in reversed(factors):
            step, position = position % factor.size, position // factor.size
            if factor.source == HEAD:
                head = head + step
            elif factor.source == DIM:
                dim = dim + step
            else:
                expected[factor.source] += factor.stride * step
    expected[channel_axis] = channels[head, dim]
    if not np.array_equal(expected, coordinates):
        raise Kind.LAYOUT.decline("{part}: channels and positions are mixed on the way", part=what)
    if np.unique(channels).size != channels.size:
        raise Kind.LAYOUT.decline("{part}: one channel is used twice", part=what)


def _other_extents(
    axes: list[list[Factor]],
    sizes: tuple[int, ...],
    other_sizes: tuple[int, ...],
    shape: tuple[int, ...],
    other_shape: tuple[int, ...],
    what: str,
) -> list[list[int]]:
    """Size of every factor at the other input shapes.

    An axis is the product of its factors, in the operand as in the layer's output: what is known of one side gives the
    other, one factor at a time. Windows of 4 rows, at a batch of 2 (3) with 8 (12) rows:

        layer's output      batch 2 (3)      rows 8 (12)       channels
                                 |            |      |          |    |
        operand             [ batch  x  rows / 4 ] [ 4 ]   [heads]  [dim]
                                 4 (9)

    The window, heads and dimensions are known; so rows / 4 is 12 / 4 = 3, and then the batch 9 / 3 = 3.
    """
    factors = {(a, k): factor for a, inside in enumerate(axes) for k, factor in enumerate(inside)}
    known = {
        (a, k): f.size
        for (a, k), f in factors.items()
        if f.source in (HEAD, DIM) or (shape[a] == other_shape[a] and sizes[f.source] == other_sizes[f.source])
    }
    products = [([p for p in factors if p[0] == a], extent) for a, extent in enumerate(other_shape)]
    for source, extent in enumerate(other_sizes):
        members = [p for p, f in factors.items() if f.source == source]
        if members or sizes[source] == 1:
            products.append((members, extent))
    known = _solved(known, products)
    if len(known) < len(factors):
        raise Kind.DYNAMIC.decline("{part}: a dynamic axis is split and merged at once", part=what)
    if any(prod(known[p] for p in members) != extent for members, extent in products):
        raise Kind.DYNAMIC.decline("{part}: its layout changes with the input's shape", part=what)
    return [[known[a, k] for k in range(len(inside))] for a, inside in enumerate(axes)]


def _solved(known: Mapping[Place, int], products: Sequence[tuple[Sequence[Place], int]]) -> dict[Place, int]:
    """Factors known from products: wherever all but one factor of an extent are known, so is the last."""
    found = dict(known)
    progress = True
    while progress:
        progress = False
        for members, extent in products:
            missing = [p for p in members if p not in found]
            rest = prod(found[p] for p in members if p in found)
            if len(missing) == 1 and extent % rest == 0:
                found[missing[0]] = extent // rest
                progress = True
    return found


def check_spelling(layout: Layout, what: str, backwards: bool = False) -> None:
    """Make sure that the movement can be written with Reshape: it can infer one extent that nothing else tells.

    Args:
        layout: the layout.
        what: name of the operand in messages.
        backwards: whether the movement is from the operand to the layer.

    Raises:
        Decline: two extents that only run time knows would have to be taken apart.
    """
    if backwards:
        open_ = [f for factors in layout.axes if len(factors) > 1 for f in factors if f.dynamic]
    else:
        every = [f for factors in layout.axes for f in factors if f.source >= 0 and f.dynamic]
        open_ = [f for f in every if f.size != layout.sizes[f.source]]
    if len(open_) > 1:
        raise Kind.DYNAMIC.decline(
            "{part} merges {extents} dynamic extents, which cannot be told apart; export with a fixed image size",
            part=what,
            extents=len(open_),
        )
