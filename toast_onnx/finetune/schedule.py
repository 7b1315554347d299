"""The learning rate over time."""

from __future__ import annotations

import math


def rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to 0 (Loshchilov and Hutter 2017, without restarts).

    Args:
        step: number of the step, from 0.
        steps: number of all steps.
        peak: highest rate.
        warmup: fraction of the steps that rise.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
