"""Predicted damage of a part at every kept count: the closed form's loss curve, tied to a few measured points.

Output damage D and reconstruction loss L follow a power law closely, D ~ a L^b with b near 1, so log D is interpolated
over log L between measured points. One point alone takes b = 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: Beyond the measured points the curve goes on with the slope between the nearest two, within these limits.
SLOPES = (0.5, 2.0)


def damage_curve(losses: ArrayLike, measured: Mapping[int, float]) -> Array:
    """Damage at the output for k = 0 .. n kept, never less where fewer are kept, 0 where all are.

    Args:
        losses: (n + 1,) reconstruction losses, entry k with k kept.
        measured: kept count below n -> damage measured at the output, at least one.

    Raises:
        ValueError: nothing was measured, or at a count that the curve does not have.
    """
    curve = np.asarray(losses, np.float64)
    n = curve.size - 1
    if not measured or not all(0 <= k < n for k in measured):
        raise ValueError(f"measured points {sorted(measured)} for kept counts 0 .. {n - 1}")
    tiny = np.finfo(np.float64).tiny
    log_loss = np.log(np.maximum(curve[:n], max(float(curve[0]) * 1e-12, tiny)))
    # Losses ascend as counts descend; equal ones keep the larger damage.
    points: dict[float, float] = {}
    for kept in sorted(measured, reverse=True):
        at = float(log_loss[kept])
        points[at] = max(points.get(at, -np.inf), float(np.log(max(measured[kept], 1e-12))))
    xs, ys = zip(*sorted(points.items()), strict=True)
    x, y = np.array(xs), np.array(ys)
    slopes = np.diff(y) / np.diff(x) if x.size > 1 else np.array([1.0])
    low, high = np.clip(slopes[[0, -1]], *SLOPES) if x.size > 1 else (1.0, 1.0)
    log_damage = np.interp(log_loss, x, y)
    log_damage = np.where(log_loss < x[0], y[0] + low * (log_loss - x[0]), log_damage)
    log_damage = np.where(log_loss > x[-1], y[-1] + high * (log_loss - x[-1]), log_damage)
    damage = np.append(np.exp(log_damage), 0.0)
    return np.asarray(np.maximum.accumulate(damage[::-1])[::-1], np.float64)
