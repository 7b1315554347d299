"""Numbers on the command line."""

from __future__ import annotations

import math
from typing import Any

import click


def percentage(text: Any) -> float | None:
    """What a user means by `65` or `65%` where a fraction is wanted; None where it is no percentage."""
    words = str(text).strip()
    try:
        number = float(words.removesuffix("%"))
    except ValueError:
        return None
    return number if 0 <= number <= 100 and (words.endswith("%") or number > 1) else None


class FiniteRange(click.FloatRange):
    """A number within bounds; `nan` and infinities, which Python reads as numbers, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number.

        Raises:
            click.BadParameter: it is not finite, out of bounds, or no number; of a percentage, with the fraction.
        """
        percent = percentage(value) if self.max == 1 else None
        if percent is not None:
            self.fail(f"{value} looks like a percentage, and a fraction is wanted: {percent / 100:g}", param, ctx)
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number", param, ctx)
        return found
