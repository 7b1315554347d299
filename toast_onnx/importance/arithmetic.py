"""Who works on large matrices: NumPy on the processor, or PyTorch on a GPU; one table, one choice for the process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError
from toast_onnx.importance.blocked import Cholesky, inverse
from toast_onnx.importance.remaining import Remaining

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


class Factor(Protocol):
    """S = L L^T, and what follows from it."""

    def solve(self, b: Array) -> Array:
        """S^-1 B for B (n, m)."""
        ...

    def energies(self, rows: Array) -> Array:
        """Squared lengths (n,) of the rows of L^T W, for W (n, m)."""
        ...


class Removal(Protocol):
    """Inverse covariance and solution of the channels that stay while others leave; see `remaining.Remaining`."""

    diagonal: Array
    energies: Array

    def room(self) -> int:
        """How many more channels may be removed before `settle`."""
        ...

    def corner(self, at: Indices) -> Array:
        """The present inverse at some positions (b,): (b, b)."""
        ...

    def rows(self, at: Indices) -> Array:
        """The present solution at some positions (b,): (b, m)."""
        ...

    def remove(self, gone: Indices) -> None:
        """Take channels at some positions (b,) out.

        Raises:
            LinAlgError: the inverse there is not positive definite.
        """
        ...

    def settle(self, stay: Indices, batch: int) -> None:
        """Keep some positions alone (k,); there is room for a batch then, at least."""
        ...


class Arithmetic(Protocol):
    """What is done to large matrices; all take and give float64 arrays of NumPy.

    Attributes:
        banded: matrices from this size on are turned into banded ones, not into diagonal ones, to be cross-validated.
        shared: whether several threads gain by calling it at once.
    """

    banded: float
    shared: bool

    def inverse(self, s: Array, shift: float = 0.0) -> Array:
        """(S + shift I)^-1 of a symmetric matrix (n, n).

        Raises:
            LinAlgError: S + shift I is not positive definite.
        """
        ...

    def factor(self, s: Array, shift: float = 0.0) -> Factor:
        """The Cholesky factor of S + shift I.

        Raises:
            LinAlgError: S + shift I is not positive definite.
        """
        ...

    def eigen(self, s: Array) -> tuple[Array, Array]:
        """Eigenvalues (n,), ascending, and eigenvectors (n, n) of a symmetric matrix.

        Raises:
            LinAlgError: they are not found, as of NaN.
        """
        ...

    def product(self, a: Array, b: Array) -> Array:
        """A B."""
        ...

    def remaining(self, inverse: Array, weights: Array) -> Removal:
        """What is left of an inverse covariance (n, n), which is used up, and a solution (n, m) as channels leave."""
        ...


class Processor:
    """NumPy, and what `blocked` and `remaining` make of it."""

    banded: float = 1024
    shared: bool = True

    def inverse(self, s: Array, shift: float = 0.0) -> Array:
        return inverse(s, shift)

    def factor(self, s: Array, shift: float = 0.0) -> Factor:
        return Cholesky(s, shift)

    def eigen(self, s: Array) -> tuple[Array, Array]:
        values, vectors = np.linalg.eigh(s)
        return values, vectors

    def product(self, a: Array, b: Array) -> Array:
        return np.asarray(a @ b)

    def remaining(self, inverse: Array, weights: Array) -> Removal:
        return Remaining(inverse, weights)


def _graphics() -> Arithmetic:
    from toast_onnx.importance.graphics import Graphics

    return Graphics.found()


#: Name -> who works on matrices; what `--solve-on` takes.
SOLVERS: dict[str, Callable[[], Arithmetic]] = {"cpu": Processor, "cuda": _graphics}
#: Matrices of fewer rows stay on the processor: the way to a GPU and back is taken to cost more. Not measured on one.
SMALL = 512

_PROCESSOR = Processor()
_chosen: tuple[str, Arithmetic] = ("cpu", _PROCESSOR)


def set_solver(name: str) -> None:
    """Choose who works on large matrices in this process from now on; `cpu` until then.

    Args:
        name: one of `SOLVERS`.

    Raises:
        ConfigError: there is none of that name.
        BackendError: what it needs is missing.
    """
    global _chosen
    if name not in SOLVERS:
        raise ConfigError(f"unknown place to solve on {name!r}; choose one of {', '.join(SOLVERS)}")
    _chosen = name, SOLVERS[name]()


def solver() -> str:
    """Name of the one that was chosen."""
    return _chosen[0]


def arithmetic(size: float = math.inf) -> Arithmetic:
    """Who works on matrices of so many rows."""
    return _PROCESSOR if size < SMALL else _chosen[1]
