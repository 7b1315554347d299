"""Latency under ONNX Runtime: the order of turns, the statistics against numpy, and providers that are not here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from tests.engines import graphs
from toast_onnx.engines import cuda, providers
from toast_onnx.engines.ortbench import (
    Timing,
    benchmark,
    interleave,
    made_up_feeds,
    session_inputs,
    shapes_at,
)
from toast_onnx.engines.profiles import InputSpec, ShapeRange
from toast_onnx.errors import BackendError, ConfigError, ModelError

IMAGE = InputSpec("x", (None, 3, 8, 8), ("batch", "?", "?", "?"), TensorProto.FLOAT)
TOKENS = InputSpec("ids", (None, None), ("batch", "sequence"), TensorProto.INT64)


def test_models_take_turns_and_warm_up_is_not_counted() -> None:
    now = itertools.count()
    order: list[str] = []
    rounds: list[int] = []
    seconds = interleave(
        [lambda: order.append("A"), lambda: order.append("B")],
        warmup=2,
        rounds=3,
        clock=lambda: float(next(now)),
        after_round=lambda: rounds.append(1),
    )
    assert "".join(order) == "AB" * 5
    assert len(rounds) == 5
    np.testing.assert_array_equal(seconds, np.ones((2, 3)))


def test_a_slowdown_of_the_machine_cancels_in_the_ratios() -> None:
    machine = np.array([1.0, 5.0, 1.0, 9.0, 2.0])
    timing = Timing("b", 4, 0.5 * machine, 1.0 * machine)
    assert timing.summary()["speedup"] == pytest.approx(2.0)
    assert timing.summary()["speedup_quartiles"] == pytest.approx([2.0, 2.0])


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=40), st.integers(1, 64))
def test_the_summary_agrees_with_numpy(seconds: list[float], batch: int) -> None:
    own = np.array(seconds)
    found = Timing("m", batch, own, own[::-1]).summary()
    assert found["median_ms"] == pytest.approx(np.median(own) * 1e3)
    assert found["images_per_second"] == pytest.approx(batch / np.median(own))
    assert found["spread"] == pytest.approx(
        (np.percentile(own, 75) - np.percentile(own, 25)) / np.median(own), abs=1e-12
    )
    assert found["speedup"] == pytest.approx(np.median(own[::-1] / own))


def test_shapes_follow_the_batch() -> None:
    assert shapes_at([IMAGE], 4) == {"x": (4, 3, 8, 8)}
    assert shapes_at([TOKENS], 4, {"ids": (1, 16)}) == {"ids": (4, 16)}


@pytest.mark.parametrize(
    ("spec", "shapes", "message"),
    [
        (TOKENS, None, r"'ids' \(batch x sequence\) has open dimensions; give --shape ids=AxBxC"),
        (InputSpec("f", (2, 3), ("?", "?"), TensorProto.FLOAT), None, "fixed batch of 2; use --batch 2"),
        (TOKENS, {"ids": (1, 2, 3)}, "has 3 dimensions, not 2"),
    ],
)
def test_shapes_that_cannot_be_are_refused(spec: InputSpec, shapes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shapes_at([spec], 4, shapes)


def test_made_up_inputs_are_valid_and_repeatable() -> None:
    shapes = {"x": (4, 3, 8, 8), "ids": (4, 16)}
    feeds = made_up_feeds([IMAGE, TOKENS], shapes, seed=3)
    assert (feeds["x"].dtype, feeds["ids"].dtype) == (np.float32, np.int64)
    assert set(np.unique(feeds["ids"])) == {1}
    np.testing.assert_array_equal(feeds["x"], made_up_feeds([IMAGE, TOKENS], shapes, seed=3)["x"])


def test_real_models_are_measured(tmp_path: Path) -> None:
    wide, narrow = (graphs.save(graphs.mlp(h), tmp_path / f"{h}.onnx") for h in (16384, 16))
    ran: list[int] = []
    results = benchmark([wide, narrow], [2, 64], threads=1, warmup=1, rounds=7, after_round=lambda: ran.append(1))
    assert [(r.model, r.batch, len(r.seconds)) for r in results] == [
        (str(p), b, 7) for b in (2, 64) for p in (wide, narrow)
    ]
    assert len(ran) == 16
    assert results[0].summary()["speedup"] == 1.0
    assert results[3].summary()["speedup"] > 2  # a thousand times the work


def test_a_model_that_fails_is_one_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"broken\.onnx: ONNX Runtime cannot load it"):
        benchmark([broken], [1])
    model = graphs.save(graphs.model("y = MatMul (x, w)", {"w": np.eye(32, dtype=np.float32)}), tmp_path / "m.onnx")
    session = providers.open_session(model)
    assert [(s.name, s.dims, s.elem_type) for s in session_inputs(session)] == [("x", (None, 4, 32), TensorProto.FLOAT)]


def test_an_unknown_provider_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use one of cpu, cuda, tensorrt, tensorrt-rtx"):
        providers.open_session(tmp_path / "m.onnx", "vulkan")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_a_provider_that_does_not_work_here_never_becomes_the_cpu(
    tmp_path: Path, provider: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    if cuda.gpu_name() is not None:
        pytest.skip("a GPU is here, so the provider may work")
    with pytest.raises(BackendError) as caught:
        providers.open_session(model, provider)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""  # ONNX Runtime would announce its fallback here


def test_a_silent_fallback_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    real = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, **_: real(path, options, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(BackendError, match="provider cuda cannot start here"):
        providers.open_session(model, "cuda")


def test_tensorrt_providers_are_told_all_shapes_at_once() -> None:
    profile = {"x": ShapeRange((1, 3), (8, 3), (8, 3)), "m": ShapeRange((1,), (8,), (8,))}
    assert providers.profile_settings("tensorrt", profile)["trt_profile_min_shapes"] == "x:1x3,m:1"
    assert providers.profile_settings("tensorrt-rtx", profile)["nv_profile_max_shapes"] == "x:8x3,m:8"
    assert providers.profile_settings("cpu", profile) == {}
