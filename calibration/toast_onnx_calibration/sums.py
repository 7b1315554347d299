"""What one run of a measuring graph gives, as sums that add up: panels joined, shifts taken out, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def add_run(
    sums: dict[str, Array], outputs: Mapping[str, str], found: Mapping[str, NDArray[Any]], factor: float
) -> None:
    """Add the sums of one run, in place.

    Args:
        sums: key -> sum over the runs so far, float64.
        outputs: key -> tensor of the measuring graph.
        found: tensor -> what the run gave.
        factor: how much the run counts.
    """
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    for key, tensor in outputs.items():
        parts.setdefault(key.rpartition(".")[0], {})[key] = found[tensor]
    for part in parts.values():  # one at a time in float64
        for key, value in unshift(joined(part)).items():
            if key not in sums:
                sums[key] = np.zeros(value.shape)
            sums[key] += value if factor == 1.0 else factor * value.astype(np.float64)


def joined(found: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """A batch's sums, Gram matrices made whole that come in panels: `gram/i/j`, on and above the diagonal."""
    whole = {key: value for key, value in found.items() if "/" not in key}
    panels: dict[str, dict[tuple[int, int], NDArray[Any]]] = {}
    for key, value in found.items():
        if "/" in key:
            name, i, j = key.split("/")
            panels.setdefault(name, {})[int(i), int(j)] = value
    for name, parts in panels.items():
        count = 1 + max(j for _, j in parts)
        mirrored = parts | {(j, i): value.T for (i, j), value in parts.items() if i < j}
        whole[name] = np.block([[mirrored[i, j] for j in range(count)] for i in range(count)])
    return whole


def unshift(found: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """A batch's sums with its shifts taken out, in float64: sum of x x^T from that of (x - m)(x - m)^T, and so on."""
    raw = {key: value for key, value in found.items() if not key.endswith(".shift")}
    for key, value in found.items():
        if key.endswith(".shift"):
            part, m = key.removesuffix(".shift"), value.astype(np.float64)
            total, count = found[f"{part}.total"].astype(np.float64), float(found[f"{part}.count"][0])
            # gram + m t^T + t m^T + n m m^T, as two outer products
            half = np.outer(m, total + count / 2 * m)
            around = half + half.T
            around += found[f"{part}.gram"]
            raw[f"{part}.gram"] = around
            raw[f"{part}.total"] = total + count * m
    return raw
