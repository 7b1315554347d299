"""Whether a statistics file's entries can be what was measured: wrong sums would make a wrong model in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.importance.blocked import Cholesky, spans

Array = NDArray[np.floating[Any]]
Shape = tuple[int, ...]

_NAME = re.compile(r"([0-9]{1,6}\.(qq|kk|context|hidden|inputs|fc1|fc2|gradient))\.([a-z]+)")
_MOMENTS = ("count", "mean", "covariance")
_SCORES = ("magnitude", "images", "attention")
_QUANTITIES = {
    "qq": ("gram", "count"),
    "kk": ("gram", "count"),
    "context": _MOMENTS,
    "hidden": _MOMENTS,
    "inputs": _MOMENTS,
    "gradient": ("gram", "count"),
    "fc1": _SCORES,
    "fc2": _SCORES,
}
_LARGEST = 1e18  # of a count or a magnitude; products of two stay finite
#: Sums are taken in float32: what they may be off by, in steps of its rounding, beside one step a channel.
_STEPS = 1000
#: Rows and columns that are held against their mirror image at once.
_TILE = 256


def form_problem(name: str, dtype: np.dtype[np.generic], shapes: Mapping[str, Shape]) -> str | None:
    """What is wrong with an entry's name, type or shape, continuing a sentence; None where nothing is.

    Args:
        name: such as `3.hidden.mean`.
        dtype: its type.
        shapes: shapes of all entries by name.
    """
    found = _NAME.fullmatch(name)
    if found is None or found[3] not in _QUANTITIES[found[2]]:
        return "is no entry of a statistics file"
    if dtype not in (np.dtype("<f4"), np.dtype("<f8")):
        return f"is of type {dtype}, not float32 or float64"
    shape = shapes[name]
    if found[3] in ("count", "images"):
        return None if shape in ((), (1,)) else f"has shape {shape}, but is one number"
    fits = {
        "gram": len(shape) == 3 and shape[1:] == shape[-1:] * 2,
        "covariance": shape == shapes.get(f"{found[1]}.mean", ()) * 2,
        "magnitude": len(shape) == 2,
    }.get(found[3], len(shape) == 1)
    return None if fits and 0 not in shape else f"has shape {shape}, which nothing that is measured has"


def value_problem(name: str, value: Array, mean: Array | None) -> str | None:
    """What is wrong with an entry's values, continuing a sentence; None where nothing is.

    Args:
        name: of the entry; its form has no problem.
        value: its values.
        mean: for a covariance the mean (n,) that belongs to it.
    """
    quantity = name.rpartition(".")[2]
    least, most = value.min(), value.max()  # NaN where one is
    if not (least >= -_LARGEST and most <= _LARGEST):
        return "holds NaN, infinity or numbers beyond any measurement"
    if quantity in ("count", "images"):
        return None if value.reshape(()) > 0 else f"is {float(value.reshape(())):g}, but counts samples or tokens"
    if quantity in ("magnitude", "attention"):
        return None if least >= 0 else "holds negative numbers, but magnitudes have no sign"
    if quantity == "mean":
        return None
    if least == most == 0:
        return "is zero everywhere: no activation ever differs"
    matrices = value.reshape(-1, *value.shape[-2:])
    offset = np.zeros(value.shape[-1]) if mean is None else np.square(mean)
    return next((problem for m in matrices if (problem := _not_a_moment(m, offset)) is not None), None)


def nearest_moments(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., n, n) made symmetric and, where rounding made them indefinite, the nearest that are not.

    Differences of larger sums (keys around what each query sees, where it sees one) keep the rounding of those. Nearest
    in the Frobenius norm: Higham, Linear Algebra and its Applications 103 (1988).
    """
    found = (matrices + np.swapaxes(matrices, -1, -2)) / 2
    for index in np.ndindex(found.shape[:-2]):
        if _not_a_moment(found[index], np.zeros(found.shape[-1])) is not None:
            values, vectors = np.linalg.eigh(found[index])
            found[index] = vectors * np.maximum(values, 0) @ vectors.T
    return found


def _not_a_moment(matrix: Array, offset: Array) -> str | None:
    """Why (n, n) is no covariance to rounding, given (n,) squared means; None where it is one."""
    size = float(np.max(np.abs(np.diag(matrix).astype(np.float64)) + offset))
    tolerance = (len(matrix) + _STEPS) * float(np.finfo(np.float32).eps) * size
    if _asymmetry(matrix) > tolerance:
        return "is not symmetric"
    if not tolerance:  # a head whose activations are all zero has a zero matrix
        return "is not positive semi-definite" if matrix.any() else None
    return None if _is_semidefinite(matrix, tolerance) else "is not positive semi-definite"


def _asymmetry(matrix: Array) -> float:
    """The largest difference between a matrix (n, n) and its transpose."""
    tiles = [(rows, columns) for rows in spans(len(matrix), _TILE) for columns in spans(rows.stop, _TILE)]
    return max(float(np.abs(matrix[rows, columns] - matrix[columns, rows].T).max()) for rows, columns in tiles)


def _is_semidefinite(matrix: Array, tolerance: float) -> bool:
    """Whether (n, n) is positive semi-definite to a tolerance.

    float32 takes half the time. Its factor is that of a matrix whose eigenvalues lie less than a tenth of the tolerance
    away (measured in tests), so that half of the tolerance is enough where it is found; else float64 decides.
    """
    for share, dtype in ((0.5, np.float32), (1.0, np.float64)):
        try:
            Cholesky(matrix, share * tolerance, dtype)
        except np.linalg.LinAlgError:
            continue
        return True
    return False
