"""Writing a layout as nodes: Reshape, Transpose, Reshape between a linear layer and an attention operand.

Static extents are written as numbers, copied dynamic ones as 0, one unknown as -1; only what these cannot say is
computed with Shape nodes at run time (ONNX Reshape, https://onnx.ai/onnx/operators/onnx__Reshape.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from toast_onnx.edit import GraphEdit
from toast_onnx.errors import MatchError
from toast_onnx.matching.layout import DIM, HEAD, Factor, Layout


@dataclass(frozen=True)
class Dynamic:
    """A run-time extent: `times` x the product of axes of the tensor that is reshaped; unknown where `axes` is None.

    An unknown one may still be read elsewhere: `like` is (tensor, axis).
    """

    axes: tuple[int, ...] | None
    times: int = 1
    like: tuple[str, int] | None = None


Dim = int | Dynamic


def spread(
    edit: GraphEdit, at: int, tensor: str, layout: Layout, head_dim: int, name: str, whole: str | None = None
) -> str:
    """Bring a linear layer's output (..., heads x head_dim) into an attention operand's layout.

    Args:
        edit: graph edit to insert into.
        at: position to insert at.
        tensor: the layer's output, channels ordered (head, dimension).
        layout: where channels lie in the operand.
        head_dim: new number of dimensions per head.
        name: prefix for new names.
        whole: a tensor whose axes but the last are those that the layer's first axis merges, None where there is none.

    Returns:
        Name of the operand tensor.
    """
    groups = _source_groups(layout)
    if list(layout.axes) == groups:
        return tensor
    source = [f for factors in groups for f in factors]
    target = [f for factors in layout.axes for f in factors]
    if any(len(factors) != 1 for factors in groups):
        dims = [_extent(f, _whole_axis(f, layout), head_dim) for f in source]
        if whole is not None:
            dims[: len(groups[0])] = [
                replace(d, like=(whole, k)) if isinstance(d, Dynamic) else d
                for k, d in enumerate(dims[: len(groups[0])])
            ]
        tensor = _reshape(edit, at, tensor, dims, f"{name}/split_heads")
    tensor = _transpose(edit, at, tensor, [source.index(f) for f in target], f"{name}/to_core")
    if any(len(factors) != 1 for factors in layout.axes):
        tensor = _reshape(edit, at, tensor, _merged_axes(layout.axes, head_dim), f"{name}/merge")
    return tensor


def collect(edit: GraphEdit, at: int, tensor: str, layout: Layout, head_dim: int, name: str) -> str:
    """The inverse of `spread`: from an attention core's output to a linear layer's input (..., heads x head_dim)."""
    groups = _source_groups(layout)
    if list(layout.axes) == groups:
        return tensor
    source = [f for factors in groups for f in factors]
    target = [f for factors in layout.axes for f in factors]
    if any(len(factors) != 1 for factors in layout.axes):
        dims = [
            _extent(f, axis if len(factors) == 1 else None, head_dim)
            for axis, factors in enumerate(layout.axes)
            for f in factors
        ]
        tensor = _reshape(edit, at, tensor, dims, f"{name}/split")
    tensor = _transpose(edit, at, tensor, [target.index(f) for f in source], f"{name}/from_core")
    if all(len(factors) == 1 for factors in groups):
        return tensor
    return _reshape(edit, at, tensor, _merged_axes(groups, head_dim), f"{name}/merge_heads")


def _source_groups(layout: Layout) -> list[tuple[Factor, ...]]:
    """The factors of every axis of the linear layer's tensor, outermost first."""
    every = [f for factors in layout.axes for f in factors]
    groups = []
    for axis in range(len(layout.sizes)):
        if axis == layout.channel_axis:
            groups.append(tuple(f for f in every if f.source == HEAD) + tuple(f for f in every if f.source == DIM))
        else:
            groups.append(tuple(sorted((f for f in every if f.source == axis), key=lambda f: -f.stride)))
    return groups


def _whole_axis(factor: Factor, layout: Layout) -> int | None:
    """The linear layer's axis that a factor covers entirely, None when it covers a part."""
    if factor.source in (HEAD, DIM) or factor.size != layout.sizes[factor.source]:
        return None
    return factor.source


def _extent(factor: Factor, axis: int | None, head_dim: int) -> Dim:
    if factor.source == DIM:
        return head_dim
    if not factor.dynamic:
        return factor.size
    return Dynamic(None if axis is None else (axis,))


def _merged_axes(groups: Sequence[Sequence[Factor]], head_dim: int) -> list[Dim]:
    """Extents of a tensor whose axes are single factors, once those of each group are one."""
    starts = accumulate(map(len, groups), initial=0)
    return [_merged(group, range(k, k + len(group)), head_dim) for group, k in zip(groups, starts, strict=False)]


def _merged(factors: Sequence[Factor], places: Sequence[int], head_dim: int) -> Dim:
    """Extent of several adjacent axes made one."""
    times, axes = 1, []
    for factor, place in zip(factors, places, strict=True):
        extent = _extent(factor, place, head_dim)
        if isinstance(extent, int):
            times *= extent
        else:
            axes.append(place)
    return Dynamic(tuple(axes), times) if axes else times


def _transpose(edit: GraphEdit, at: int, tensor: str, order: list[int], name: str) -> str:
    if order == sorted(order):
        return tensor
    return edit.emit(at, "Transpose", [tensor], edit.fresh(f"{name}_output"), f"{name}/Transpose", perm=order)


def _reshape(edit: GraphEdit, at: int, tensor: str, dims: Sequence[Dim], name: str) -> str:
    written: list[int | None] = []
    for position, dim in enumerate(dims):
        if isinstance(dim, int):
            written.append(dim)
        elif dim.axes == (position,) and dim.times == 1:
            written.append(0)
        else:
            written.append(None)
    open_ = [k for k, w in enumerate(written) if w is None]
    # One extent can be left to Reshape to infer; the unknown one has the first claim.
    unknown = [k for k in open_ if isinstance(dims[k], Dynamic) and dims[k].axes is None]  # type: ignore[union-attr]
    if len(unknown) > 1 and any(dims[k].like is None for k in unknown[1:]):  # type: ignore[union-attr]
        raise MatchError(f"{name}: two dynamic extents cannot be told apart; export with a fixed image size")
    inferred = unknown[0] if unknown else (open_[0] if open_ else None)
    if inferred is not None:
        written[inferred] = -1
    if all(w is not None for w in written):
        shape = edit.constant(f"{name}/shape", np.asarray(written, np.int64))
    else:
        shape = _runtime_shape(edit, at, tensor, dims, written, name)
    return edit.emit(at, "Reshape", [tensor, shape], edit.fresh(f"{name}_output"), f"{name}/Reshape")


def _runtime_shape(
    edit: GraphEdit, at: int, tensor: str, dims: Sequence[Dim], written: Sequence[int | None], name: str
) -> str:
    """Shape operand computed from the reshaped tensor's own extents."""
    extents = edit.emit(at, "Shape", [tensor], edit.fresh(f"{name}/extents"), f"{name}/Shape")
    pieces = []
    for k, (dim, number) in enumerate(zip(dims, written, strict=True)):
        if number is not None:
            pieces.append(edit.constant(f"{name}/extent_{k}", np.asarray([number], np.int64)))
            continue
        assert isinstance(dim, Dynamic)
        if dim.axes is None:
            assert dim.like is not None
            pieces.append(_extent_of(edit, at, *dim.like, f"{name}/extent_{k}"))
            continue
        piece = ""
        for axis in dim.axes:
            index = edit.constant(f"{name}/axis_{k}", np.asarray([axis], np.int64))
            one = edit.emit(at, "Gather", [extents, index], edit.fresh(f"{name}/extent_{k}"), f"{name}/Gather", axis=0)
            piece = (
                one if not piece else edit.emit(at, "Mul", [piece, one], edit.fresh(f"{name}/product"), f"{name}/Mul")
            )
        if dim.times != 1:
            times = edit.constant(f"{name}/times_{k}", np.asarray([dim.times], np.int64))
            piece = edit.emit(at, "Mul", [piece, times], edit.fresh(f"{name}/product"), f"{name}/Mul")
        pieces.append(piece)
    return edit.emit(at, "Concat", pieces, edit.fresh(f"{name}/shape"), f"{name}/Concat", axis=0)


def _extent_of(edit: GraphEdit, at: int, tensor: str, axis: int, name: str) -> str:
    """Extent (1,) of one axis of a tensor."""
    extents = edit.emit(at, "Shape", [tensor], edit.fresh(f"{name}/extents"), f"{name}/Shape")
    index = edit.constant(f"{name}/axis", np.asarray([axis], np.int64))
    return edit.emit(at, "Gather", [extents, index], edit.fresh(name), f"{name}/Gather", axis=0)
