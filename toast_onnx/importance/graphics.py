"""Large matrices on a GPU, through PyTorch; float64, so that results differ by rounding alone.

Where the processor puts updates off until they make large products, a GPU carries them out at once: it reads its
memory fast enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import BackendError, one_line
from toast_onnx.require import require_torch

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

#: Gaps in a matrix are closed when a share of 1 / GAPS of its channels is gone.
GAPS = 4


@contextmanager
def _told() -> Iterator[None]:
    """PyTorch's errors become those that callers know; nothing keeps gradients."""
    import torch

    try:
        with torch.no_grad():
            yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise np.linalg.LinAlgError(one_line(error)) from error
    except torch.OutOfMemoryError as error:
        raise BackendError("the GPU has no room for a block's matrices: solve on cpu") from error
    except RuntimeError as error:  # drivers and their libraries: of many kinds, a full GPU among them
        raise BackendError(f"the GPU gave up: {one_line(error)}; solve on cpu") from error


class Graphics:
    """What `arithmetic.Arithmetic` says, on a device of PyTorch's."""

    banded = math.inf
    shared = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @classmethod
    def found(cls) -> Graphics:
        """On the GPU that PyTorch finds; a small matrix shows that it works.

        Raises:
            BackendError: there is none, it does not work, or PyTorch is not installed.
        """
        torch = require_torch("solving on cuda needs", ", or solve on cpu")
        if not torch.cuda.is_available():
            raise BackendError(
                "solving on cuda needs a GPU, and PyTorch finds none (its build may be one for the processor): "
                "solve on cpu"
            )
        found = cls(torch.device("cuda"))
        found.product(found.inverse(np.eye(2)), np.eye(2))
        return found

    def inverse(self, s: Array, shift: float = 0.0) -> Array:
        import torch

        with _told():
            return _host(torch.cholesky_inverse(self._lower(s, shift)))

    def factor(self, s: Array, shift: float = 0.0) -> Lower:
        with _told():
            return Lower(self._lower(s, shift))

    def eigen(self, s: Array) -> tuple[Array, Array]:
        import torch

        with _told():
            values, vectors = torch.linalg.eigh(self._put(s))
            return _host(values), _host(vectors)

    def product(self, a: Array, b: Array) -> Array:
        with _told():
            return _host(self._put(a) @ self._put(b))

    def remaining(self, inverse: Array, weights: Array) -> Remaining:
        with _told():
            return Remaining(self._put(inverse), self._put(weights))

    def _put(self, a: Array) -> torch.Tensor:
        return _tensor(a, self._device)

    def _lower(self, s: Array, shift: float) -> torch.Tensor:
        """L with L L^T = S + shift I."""
        import torch

        a = self._put(s)
        a.diagonal().add_(shift)
        lower: torch.Tensor
        lower, wrong = torch.linalg.cholesky_ex(a)
        if int(wrong) or not bool(torch.isfinite(lower.diagonal()).all()):
            raise np.linalg.LinAlgError("the matrix is not positive definite")
        return lower


class Lower:
    """L with L L^T = S."""

    def __init__(self, lower: torch.Tensor) -> None:
        self._lower = lower

    def solve(self, b: Array) -> Array:
        """S^-1 B for B (n, m)."""
        import torch

        with _told():
            return _host(torch.cholesky_solve(_tensor(b, self._lower.device), self._lower))

    def energies(self, rows: Array) -> Array:
        """Squared lengths (n,) of the rows of L^T W, for W (n, m)."""
        with _told():
            return _host((self._lower.T @ _tensor(rows, self._lower.device)).square().sum(dim=1))


class Remaining:
    """Inverse covariance M and solution W of some channels, of which more and more are gone.

    Attributes:
        diagonal: of the inverse, (n,).
        energies: squared length of each row of the solution, (n,).
    """

    def __init__(self, inverse: torch.Tensor, weights: torch.Tensor) -> None:
        """Start with all channels: inverse covariance (n, n) and solution (n, m)."""
        self._inverse, self._weights = inverse, weights
        self._spare = max(1, len(inverse) // GAPS)
        self._look()

    def _look(self) -> None:
        self.diagonal: Array = _host(self._inverse.diagonal().clone())
        self.energies: Array = _host(self._weights.square().sum(dim=1))

    def room(self) -> int:
        """How many more channels may be removed before `settle`."""
        return self._spare

    def corner(self, at: Indices) -> Array:
        """The inverse at some positions (b,): (b, b)."""
        with _told():
            index = self._index(at)
            return _host(self._inverse[index[:, None], index])

    def rows(self, at: Indices) -> Array:
        """The solution at some positions (b,): (b, m)."""
        with _told():
            return _host(self._weights[self._index(at)])

    def remove(self, gone: Indices) -> None:
        """Take channels at some positions (b,) out: b steps of a Cholesky factorisation of the inverse."""
        import torch

        with _told():
            index = self._index(gone)
            lower = torch.linalg.cholesky(self._inverse[index[:, None], index])
            factor = torch.linalg.solve_triangular(lower, self._inverse[index], upper=False)  # (b, n)
            carry = torch.linalg.solve_triangular(lower, self._weights[index], upper=False)  # (b, m)
            self._inverse.addmm_(factor.T, factor, alpha=-1)
            self._weights.addmm_(factor.T, carry, alpha=-1)
            self._look()
        self._spare -= gone.size

    def settle(self, stay: Indices, batch: int) -> None:
        """Keep some positions alone (k,); there is room for a batch then, at least."""
        with _told():
            index = self._index(stay)
            self._inverse, self._weights = self._inverse[index[:, None], index], self._weights[index]
            self._look()
        self._spare = max(batch, stay.size // GAPS)

    def _index(self, at: Indices) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.array(at)).to(self._inverse.device)


def _tensor(a: Array, device: torch.device) -> torch.Tensor:
    """A copy, which may be worked on in place."""
    import torch

    return torch.tensor(np.ascontiguousarray(a, np.float64), device=device)


def _host(x: torch.Tensor) -> Array:
    found: Array = x.cpu().numpy()
    return found
