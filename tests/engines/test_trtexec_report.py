"""trtexec's three outputs, in the format that its source (sampleReporting.cpp) writes; figures against numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from toast_onnx.engines.trtexec_report import (
    LayerTime,
    QueryTimes,
    parse_layers,
    parse_profile,
    parse_summary,
    parse_times,
    summarise,
    time_by_block,
    warnings,
)
from toast_onnx.errors import BackendError

SUMMARY = """
[11/22/2026-10:00:00] [I] === Performance summary ===
[11/22/2026-10:00:00] [I] Throughput: 812.5 qps
[11/22/2026-10:00:00] [I] Latency: min = 1.3 ms, max = 2.1 ms, mean = 1.4 ms, median = 1.35 ms, percentile(90%) = 1.5 ms
[11/22/2026-10:00:00] [I] Enqueue Time: min = 0.01 ms, max = 0.2 ms, mean = 0.05 ms, median = 0.04 ms
[11/22/2026-10:00:00] [I] H2D Latency: min = 0.1 ms, max = 0.3 ms, mean = 0.15 ms, median = 0.14 ms
[11/22/2026-10:00:00] [I] GPU Compute Time: min = 1.1 ms, max = 1.9 ms, mean = 1.2 ms, percentile(99.9%) = 1.8 ms
[11/22/2026-10:00:00] [I] D2H Latency: min = 1e-05 ms, max = 0.02 ms, mean = 0.01 ms, median = 0.01 ms
[11/22/2026-10:00:00] [I] Total Host Walltime: 3.0 s
"""


def queries(compute: np.ndarray, enqueue: float = 0.01, h2d: float = 0.0, d2h: float = 0.0) -> QueryTimes:
    same = np.ones_like(compute)
    return QueryTimes(compute, compute + h2d + d2h, enqueue * same, h2d * same, d2h * same)


def test_the_summary_is_read() -> None:
    found = parse_summary(SUMMARY)
    assert found["qps"] == 812.5
    assert found["latency"] == {"min": 1.3, "max": 2.1, "mean": 1.4, "median": 1.35, "p90": 1.5}
    assert found["compute"]["p99.9"] == 1.8
    assert found["d2h"]["min"] == 1e-5
    assert found["enqueue"]["median"] == 0.04


def test_a_run_without_a_summary_is_an_error() -> None:
    with pytest.raises(BackendError, match="no performance summary"):
        parse_summary("&&&& FAILED TensorRT.trtexec")


def test_times_are_read() -> None:
    row = {
        "startEnqMs": 1.0, "endEnqMs": 1.5, "startH2dMs": 1.0, "endH2dMs": 1.2, "startComputeMs": 1.2,
        "endComputeMs": 3.2,
        "startD2hMs": 3.2, "endD2hMs": 3.3, "h2dMs": 0.2, "computeMs": 2.0, "d2hMs": 0.1, "latencyMs": 2.3,
    }  # fmt: skip
    times = parse_times(json.dumps([row, row]))
    np.testing.assert_allclose(times.enqueue, [0.5, 0.5])
    np.testing.assert_allclose(times.compute, [2.0, 2.0])
    np.testing.assert_allclose(times.latency, [2.3, 2.3])


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"computeMs": 1}]', "[1"])
def test_broken_times_are_an_error(text: str) -> None:
    with pytest.raises(BackendError, match="exported times cannot be read"):
        parse_times(text)


def test_profile_and_layers_are_read() -> None:
    text = '[{ "count" : 7 }, { "name" : "a", "timeMs" : 7, "averageMs" : 1, "medianMs" : 1, "percentage" : nan }]'
    assert parse_profile(text.replace("nan", "NaN")) == [LayerTime("a", 1.0)]
    with pytest.raises(BackendError, match="exported profile cannot be read"):
        parse_profile("")
    assert parse_layers('{"Layers": [{"Name": "a", "Metadata": "[ONNX Layer: b]"}]}') == {"a": "[ONNX Layer: b]"}
    assert parse_layers('{"Layers": ["a", "b"]}') == {}  # an engine without detailed layer information
    assert parse_layers("") == {}


def test_figures_agree_with_numpy() -> None:
    compute = np.random.default_rng(0).normal(2.0, 0.01, 500)
    found = summarise(Path("m.engine"), 8, queries(compute), qps=480.0)
    assert found["images_per_second"] == 8 * 480.0
    assert found["median_ms"] == pytest.approx(np.median(compute))
    assert found["percentiles_ms"]["p99"] == pytest.approx(np.quantile(compute, 0.99))
    assert found["variation"] == pytest.approx(np.std(compute) / np.mean(compute))
    assert found["warnings"] == []


@pytest.mark.parametrize(
    ("times", "word"),
    [
        (queries(np.full(10, 1.0), enqueue=0.81), "enqueueing"),
        (queries(np.full(10, 1.0), h2d=1.0), "host-to-device"),
        (queries(np.full(10, 1.0), d2h=1.0), "device-to-host"),
        (queries(np.array([1.0, 1.06] * 10)), "unstable"),
    ],
)
def test_doubtful_measurements_are_named(times: QueryTimes, word: str) -> None:
    assert [word in text for text in warnings(times)] == [True]


def test_measurements_at_the_thresholds_pass() -> None:
    assert warnings(queries(np.array([1.0, 1.048] * 10), enqueue=0.8, h2d=0.99)) == []


def test_layers_add_up_by_block() -> None:
    layers = [LayerTime("k1", 1.0), LayerTime("k2", 2.0), LayerTime("/head/MatMul", 4.0), LayerTime("k3", 8.0)]
    made_of = {
        "k1": "[ONNX Layer: /blocks/blocks.0/attn/MatMul][ONNX Layer: /blocks/blocks.0/Add]",
        "k2": "[ONNX Layer: node_linear_3]",
        "k3": "[ONNX Layer: /blocks/blocks.0/mlp/fc2/MatMul]",
    }
    assert time_by_block(layers, made_of, {"node_linear_3": "blocks.1.mlp.fc1"}) == {
        "blocks.0": 9.0,
        "blocks.1": 2.0,
        "other": 4.0,
    }
