"""What trtexec reports: the text summary, the time of every query, the time of every layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toast_onnx.engines.blocknames import block_of
from toast_onnx.engines.trtexec import PERCENTILES
from toast_onnx.errors import BackendError
from toast_onnx.planning.strict_json import parse_json

#: Thresholds of trtexec's own warnings.
ENQUEUE_SHARE = 0.8
UNSTABLE_VARIATION = 0.025
_METRICS = {
    "Latency": "latency",
    "Enqueue Time": "enqueue",
    "H2D Latency": "h2d",
    "GPU Compute Time": "compute",
    "D2H Latency": "d2h",
}
_NUMBER = r"([-+\d.eE]+|inf|nan)"

_HINT = "it may have been stopped early"


@dataclass(frozen=True)
class LayerTime:
    """Average time of one engine layer in one query, in milliseconds."""

    name: str
    average_ms: float


@dataclass(frozen=True)
class QueryTimes:
    """Milliseconds of every measured query, each array (queries,).

    Attributes:
        compute: kernels on the GPU.
        latency: copy in, compute, copy out.
        enqueue: host time to submit a query.
        h2d: copying inputs to the device.
        d2h: copying outputs from the device.
    """

    compute: np.ndarray
    latency: np.ndarray
    enqueue: np.ndarray
    h2d: np.ndarray
    d2h: np.ndarray


def parse_summary(text: str) -> dict[str, Any]:
    """Read the text summary.

    Returns:
        `qps`, and for each of `latency`, `enqueue`, `h2d`, `compute`, `d2h` a mapping of `min`, `max`, `mean`, `median`
        and `p90`-like keys to milliseconds.

    Raises:
        BackendError: it has no throughput line, so the run did not get that far.
    """
    throughput = re.search(rf"Throughput: {_NUMBER} qps", text)
    if throughput is None:
        raise BackendError("trtexec printed no performance summary; run its command by hand to see why")
    result: dict[str, Any] = {"qps": float(throughput.group(1))}
    for label, key in _METRICS.items():
        # "Latency:" also ends "H2D Latency:", so a label has to follow the log prefix or the start of the line.
        line = re.search(rf"(?:^|\] ){re.escape(label)}: (min = .*)$", text, re.MULTILINE)
        if line is not None:
            values = re.findall(rf"(min|max|mean|median|percentile\(([\d.]+)%\)) = {_NUMBER} ms", line.group(1))
            result[key] = {f"p{p}" if p else name: float(v) for name, p, v in values}
    return result


def parse_times(text: str) -> QueryTimes:
    """Read what --exportTimes wrote.

    Raises:
        BackendError: it is not that format, or holds no query.
    """
    try:
        rows: Any = parse_json(text, "trtexec's exported times cannot be read: the text", BackendError, _HINT)
        columns = {key: np.array([row[key] for row in rows], np.float64) for key in rows[0]}
        return QueryTimes(
            compute=columns["computeMs"],
            latency=columns["latencyMs"],
            enqueue=columns["endEnqMs"] - columns["startEnqMs"],
            h2d=columns["h2dMs"],
            d2h=columns["d2hMs"],
        )
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise BackendError(f"trtexec's exported times cannot be read ({e!r}); it may have been stopped early") from e


def parse_profile(text: str) -> list[LayerTime]:
    """Read what --exportProfile wrote: `[{"count": N}, {"name": ..., "averageMs": ...}, ...]`.

    Raises:
        BackendError: it is not that format.
    """
    try:
        rows: Any = parse_json(
            text, "trtexec's exported profile cannot be read: the text", BackendError, _HINT, lenient=True
        )
        return [LayerTime(str(row["name"]), float(row["averageMs"])) for row in rows if "name" in row]
    except (ValueError, KeyError, TypeError) as e:
        raise BackendError(f"trtexec's exported profile cannot be read ({e!r}); it may have been stopped early") from e


def parse_layers(text: str) -> dict[str, str]:
    """Read what --exportLayerInfo wrote in detail: layer name to the ONNX nodes it was made of.

    Engines built without detailed layer information give an empty mapping.
    """
    try:
        document = parse_json(text, "trtexec's layers", BackendError, lenient=True)
    except BackendError:
        return {}
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        return {}
    return {str(row["Name"]): str(row.get("Metadata", "")) for row in layers if isinstance(row, dict) and "Name" in row}


def summarise(model: Path, batch: int, times: QueryTimes, qps: float) -> dict[str, Any]:
    """Figures of one engine at one batch size.

    Args:
        model: the engine.
        batch: items in one query; trtexec's throughput counts queries.
        times: its queries.
        qps: queries per second, from the text summary.

    Returns:
        Milliseconds by percentile, images per second, warnings.
    """
    return {
        "model": str(model),
        "batch": batch,
        "queries": len(times.compute),
        "median_ms": float(np.median(times.compute)),
        "percentiles_ms": {f"p{p}": float(np.percentile(times.compute, p)) for p in PERCENTILES},
        "latency_median_ms": float(np.median(times.latency)),
        "enqueue_median_ms": float(np.median(times.enqueue)),
        "variation": float(times.compute.std() / times.compute.mean()),
        "queries_per_second": qps,
        "images_per_second": qps * batch,
        "warnings": warnings(times),
    }


def warnings(times: QueryTimes) -> list[str]:
    """What makes a measurement doubtful, by trtexec's own thresholds."""
    compute = float(np.median(times.compute))
    found = []
    if float(np.median(times.enqueue)) > ENQUEUE_SHARE * compute:
        found.append("bound by enqueueing on the host, not by the GPU: use a CUDA graph or a larger batch")
    for name, values in (("host-to-device", times.h2d), ("device-to-host", times.d2h)):
        if float(np.median(values)) >= compute:
            found.append(f"bound by {name} copies, not by the GPU: leave transfers out")
    variation = float(times.compute.std() / times.compute.mean())
    if variation > UNSTABLE_VARIATION:
        found.append(f"unstable: the GPU time varies by {variation:.1%}; lock the GPU's clocks")
    return found


def time_by_block(
    layers: Sequence[LayerTime], made_of: Mapping[str, str], scopes: Mapping[str, str]
) -> dict[str, float]:
    """Average milliseconds of each transformer block in one query, in network order; what is in none is `other`.

    Args:
        layers: the profile.
        made_of: layer name to the ONNX nodes inside, from `parse_layers`.
        scopes: ONNX node name to the module it came from, from `blocknames.node_scopes`.
    """
    totals: dict[str, float] = {}
    for layer in layers:
        block = block_of(layer.name, made_of.get(layer.name, ""), scopes) or "other"
        totals[block] = totals.get(block, 0.0) + layer.average_ms
    return totals
