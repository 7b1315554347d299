"""A covariance factored anew for every ridge strength, for where hardly any is asked for.

With few tokens even the greatest strength uses more coefficients than they support, and it is taken. That is told by a
part of the channels, and all that is left to ask is whether the targets follow exactly: no decomposition that serves
every strength is worth its price. float64 throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toast_onnx.importance.arithmetic import Factor, arithmetic
from toast_onnx.importance.blocked import spans

Array = NDArray[np.float64]

#: Targets that are looked at before it is asked whether more are needed.
STRIP = 64


class Factored:
    """S = L L^T, for each lambda that is asked for, and the covariance with the targets.

    R stands for (S + lambda I)^-1; solutions are refined once: (R + lambda R^2) C.

    Attributes:
        size: number of channels.
        mean: mean eigenvalue.
    """

    def __init__(self, s: Array, cross: Array, energy: Array, least: float, used: float) -> None:
        """Take S (n, n).

        Args:
            s: covariance of the channels, possibly singular.
            cross: their covariance with the targets C (n, m).
            energy: variance of each target (m,).
            least: the smallest lambda.
            used: coefficients that the data determine at the greatest lambda, at least.

        Raises:
            LinAlgError: S + least I is not positive definite.
        """
        self.size, self.mean = len(s), float(np.trace(s)) / len(s)
        self._s, self._cross, self._energy, self._used = s, cross, energy, used
        self._factor, self._shift = arithmetic(len(s)).factor(s, least), least

    def _factored(self, shift: float) -> Factor:
        if shift != self._shift:
            self._factor, self._shift = arithmetic(self.size).factor(self._s, shift), shift
        return self._factor

    def used(self, shift: float) -> float:
        """Coefficients that the data determine, at least: a smaller shift uses more."""
        return self._used

    def left(self, shift: float, limit: float) -> float:
        """Variance of the targets that the solution leaves, summed; of only so many that it is above a limit.

        What it explains is tr C^T R (I + q + q^2 + q^3) C with q = shift R.
        """
        factor, left = self._factored(shift), 0.0
        for columns in spans(self._cross.shape[1], STRIP):
            part = self._cross[:, columns]
            once = factor.solve(part)
            twice = factor.solve(once)
            pairs = ((part, once), (once, once), (once, twice), (twice, twice))
            left += float(self._energy[columns].sum())
            left -= sum(shift**power * float(np.vdot(a, b)) for power, (a, b) in enumerate(pairs))
            if left > limit:
                break
        return left

    def solve(self, target: Array, shift: float) -> Array:
        """The refined solution for targets (n, p), by R itself: two products, faster than four with triangles."""
        on = arithmetic(self.size)
        turn = on.inverse(self._s, shift)
        once = on.product(turn, target)
        return once + shift * on.product(turn, once)


def used_by(s: Array, shift: float) -> float:
    """Coefficients that the data determine of channels with the covariance S (n, n): n - shift^2 tr R^2.

    A part of the channels uses no more than all of them: its eigenvalues lie below theirs (Cauchy), and each adds
    1 - (shift / (e + shift))^2.
    """
    return len(s) - shift**2 * float(np.square(arithmetic(len(s)).inverse(s, shift)).sum())
