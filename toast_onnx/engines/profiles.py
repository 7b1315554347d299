"""Optimization profiles: the smallest, the usual and the largest shape of every input, checked before a build starts.

A profile entry is a triple of shapes; TensorRT picks kernels for `opt` and accepts anything between `min` and `max`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from toast_onnx.errors import ConfigError

Shape = tuple[int, ...]
#: Batch range of a build that was given none: single images up to a usual server batch.
DEFAULT_BATCH = (1, 8, 32)


@dataclass(frozen=True)
class InputSpec:
    """One graph input.

    Attributes:
        name: its name.
        dims: one entry a dimension; None where the graph leaves the size open.
        symbols: the names the graph gives its open dimensions, `?` where it gives none.
        elem_type: its `onnx.TensorProto` data type.
    """

    name: str
    dims: tuple[int | None, ...]
    symbols: tuple[str, ...]
    elem_type: int

    @property
    def is_dynamic(self) -> bool:
        """Whether any dimension is open."""
        return None in self.dims

    def describe(self) -> str:
        """The shape as the graph states it, such as `batch x 3 x 224 x 224`."""
        return " x ".join(s if d is None else str(d) for d, s in zip(self.dims, self.symbols, strict=True))


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, usual and largest shape of one input; all three have its rank."""

    min: Shape
    opt: Shape
    max: Shape

    def as_dict(self) -> dict[str, list[int]]:
        """The three shapes as lists, for JSON."""
        return {"min": list(self.min), "opt": list(self.opt), "max": list(self.max)}


def graph_inputs(proto: onnx.ModelProto) -> list[InputSpec]:
    """The inputs a caller has to feed: graph inputs that are not initializers.

    Raises:
        ConfigError: an input has no known rank.
    """
    weights = {t.name for t in proto.graph.initializer}
    specs = []
    for value in proto.graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            raise ConfigError(f"input '{value.name}' has no rank in the graph; export it with a shape")
        dims = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)
        symbols = tuple(d.dim_param or "?" for d in tensor.shape.dim)
        specs.append(InputSpec(value.name, dims, symbols, tensor.elem_type))
    return specs


def parse_batch(text: str) -> tuple[int, int, int]:
    """Read `MIN:OPT:MAX`, or one number for all three.

    Raises:
        ConfigError: not one or three positive whole numbers, or not in ascending order.
    """
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(f"batch '{text}' is not MIN:OPT:MAX (such as 1:8:64) or one number; use whole numbers from 1")
    low, usual, high = (int(p) for p in (parts * 3 if len(parts) == 1 else parts))
    if not low <= usual <= high:
        raise ConfigError(f"batch '{text}' is not in ascending order; write MIN:OPT:MAX with MIN <= OPT <= MAX")
    return low, usual, high


def build_profile(
    inputs: list[InputSpec],
    batch: tuple[int, int, int] | None = None,
    min_shapes: Mapping[str, Shape] | None = None,
    opt_shapes: Mapping[str, Shape] | None = None,
    max_shapes: Mapping[str, Shape] | None = None,
) -> dict[str, ShapeRange]:
    """Shape range of every dynamic input, from explicit shapes where given and from the batch range elsewhere.

    Args:
        inputs: the graph's inputs.
        batch: (min, opt, max) sizes of an open first dimension; `DEFAULT_BATCH` where a profile needs it and has none.
        min_shapes: smallest shape by input name. For each name all three mappings have an entry, or none has.
        opt_shapes: usual shape by input name.
        max_shapes: largest shape by input name.

    Returns:
        One entry for each dynamic input; empty for a graph whose shapes are all fixed.

    Raises:
        ConfigError: an unknown or missing input, a rank or fixed size the graph contradicts, min > opt or opt > max, or
            an open dimension that nothing gives a size.
    """
    explicit = {"min": min_shapes or {}, "opt": opt_shapes or {}, "max": max_shapes or {}}
    known = {spec.name: spec for spec in inputs}
    for shapes in explicit.values():
        for name in shapes:
            if name not in known:
                raise ConfigError(_unknown_input(name, list(known)))
    if batch is not None:
        _check_batch_applies(inputs, explicit)
    ranges = {}
    for spec in inputs:
        given = {kind: shapes[spec.name] for kind, shapes in explicit.items() if spec.name in shapes}
        if given:
            ranges[spec.name] = _explicit_range(spec, given)
        elif spec.is_dynamic:
            ranges[spec.name] = _batch_range(spec, batch or DEFAULT_BATCH)
    return {name: r for name, r in ranges.items() if known[name].is_dynamic}


def _unknown_input(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean '{close[0]}'?" if close else f"inputs are: {', '.join(known)}"
    return f"the model has no input '{name}'; {hint}"


def _check_batch_applies(inputs: list[InputSpec], explicit: Mapping[str, Mapping[str, Shape]]) -> None:
    left = [spec for spec in inputs if not any(spec.name in shapes for shapes in explicit.values())]
    if left and all(not spec.dims or spec.dims[0] is not None for spec in left):
        spec = left[0]
        raise ConfigError(
            f"input '{spec.name}' has a fixed first dimension ({spec.describe()}), so a batch range cannot apply; "
            "leave --batch out or export the model with a dynamic batch"
        )


def _explicit_range(spec: InputSpec, given: Mapping[str, Shape]) -> ShapeRange:
    absent = [kind for kind in ("min", "opt", "max") if kind not in given]
    if absent:
        raise ConfigError(f"input '{spec.name}' has no {' and no '.join(absent)} shape; give min, opt and max together")
    for kind, shape in given.items():
        if len(shape) != len(spec.dims):
            raise ConfigError(
                f"{kind} shape of input '{spec.name}' has {len(shape)} dimensions, the graph has {len(spec.dims)} "
                f"({spec.describe()}); give them all"
            )
        for axis, (size, fixed) in enumerate(zip(shape, spec.dims, strict=True)):
            if fixed is not None and size != fixed:
                raise ConfigError(
                    f"{kind} shape of input '{spec.name}' has {size} in dimension {axis}, "
                    f"the graph fixes it to {fixed} ({spec.describe()})"
                )
    result = ShapeRange(given["min"], given["opt"], given["max"])
    for axis, (low, usual, high) in enumerate(zip(result.min, result.opt, result.max, strict=True)):
        if not low <= usual <= high:
            raise ConfigError(
                f"shapes of input '{spec.name}' are not in order in dimension {axis}: "
                f"min {low}, opt {usual}, max {high}; make min <= opt <= max"
            )
    return result


def _batch_range(spec: InputSpec, batch: tuple[int, int, int]) -> ShapeRange:
    open_axes = [axis for axis, size in enumerate(spec.dims) if size is None]
    if open_axes != [0]:
        raise ConfigError(
            f"input '{spec.name}' ({spec.describe()}) is missing from the profile and is open in dimension "
            f"{', '.join(map(str, open_axes))}; give its min, opt and max shapes"
        )
    tail = tuple(size for size in spec.dims[1:] if size is not None)
    low, usual, high = ((size, *tail) for size in batch)
    return ShapeRange(low, usual, high)
