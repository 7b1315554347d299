"""Engine against model: the comparison against numpy, the runner against STAND-INS for TensorRT and the CUDA driver.

The stand-ins keep "device" memory in host buffers and compute the MLP in numpy, so the order of calls, addresses and
the copies are real; the GPU is not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from tests.engines import graphs
from toast_onnx.engines import cuda, engine_check
from toast_onnx.engines.engine_check import TOLERANCES, Difference, EngineRunner, compare, require_gpu
from toast_onnx.errors import BackendError, ConfigError


class FakeCuda:
    """STAND-IN for libcuda: memory is host memory, and what is not given back is counted."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA Test"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        buffer = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(buffer)
        self.memory[pointer._obj.value] = buffer
        return 0

    def cuMemFree_v2(self, pointer: Any) -> int:
        del self.memory[pointer.value]
        return 0

    def cuMemcpyHtoD_v2(self, pointer: Any, source: Any, size: Any) -> int:
        ctypes.memmove(pointer.value, source, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, pointer: Any, size: Any) -> int:
        ctypes.memmove(target, pointer.value, size.value)
        return 0


class FakeContext:
    """STAND-IN for an execution context of the MLP; `error` is added to every output."""

    def __init__(self, proto: Any, error: float) -> None:
        self._proto, self._error = proto, error
        self._shape: tuple[int, ...] = ()
        self._address: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = tuple(shape)
        return shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self._address[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        count = int(np.prod(self._shape))
        x = np.frombuffer((ctypes.c_float * count).from_address(self._address["x"]), np.float32).reshape(self._shape)
        y = (graphs.mlp_reference(self._proto, x) + self._error).astype(np.float32)
        ctypes.memmove(self._address["y"], y.ctypes.data, y.nbytes)
        return True


def fake_tensorrt(proto: Any, error: float = 0.0, loads: bool = True) -> SimpleNamespace:
    """STAND-IN for the tensorrt module, as much of it as running an engine takes."""
    mode = SimpleNamespace(INPUT="in", OUTPUT="out")
    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda i: "xy"[i],
        get_tensor_mode=lambda name: mode.INPUT if name == "x" else mode.OUTPUT,
        get_tensor_dtype=lambda name: "float",
        create_execution_context=lambda: FakeContext(proto, error),
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine if loads else None)
    return SimpleNamespace(
        __version__="0", Runtime=lambda logger: runtime, TensorIOMode=mode, nptype=lambda dtype: np.float32
    )


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that loads a stand-in engine with a given error on a stand-in GPU."""
    (tmp_path / "e.engine").write_bytes(b"engine")
    monkeypatch.setattr(engine_check, "tensorrt_logger", lambda trt: None)

    def make(error: float = 0.0, library: FakeCuda | None = None, **options: Any) -> EngineRunner:
        module = fake_tensorrt(graphs.mlp(), error, **options)
        monkeypatch.setattr(engine_check, "load", lambda backend: module)
        backend: Any = SimpleNamespace(name="tensorrt")
        return EngineRunner(backend, tmp_path / "e.engine", cuda.Driver(library or FakeCuda()))

    return make


def batches(count: int = 2) -> list[Mapping[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((3, 4, 32)).astype(np.float32)} for _ in range(count)]


def session() -> Any:
    return ort.InferenceSession(graphs.mlp().SerializeToString())


def test_an_engine_that_agrees_passes(runner: Any) -> None:
    library = FakeCuda()
    result = compare(session(), runner(library=library), batches(), TOLERANCES["fp32"])
    assert result["passed"]
    assert result["items"] == 6
    assert result["outputs"]["y"]["relative"] < 1e-5
    assert result["outputs"]["y"]["top1_agreement"] == 1.0
    assert library.memory == {}  # all of it was given back


def test_an_engine_that_differs_fails(runner: Any) -> None:
    result = compare(session(), runner(error=0.01), batches(), 1e-3)
    assert not result["passed"]
    assert result["outputs"]["y"]["max_abs"] == pytest.approx(0.01, rel=1e-3)


def test_nan_in_the_engine_fails(runner: Any) -> None:
    assert not compare(session(), runner(error=np.nan), batches(), TOLERANCES["bf16"])["passed"]


def test_nothing_to_compare_is_an_error(runner: Any) -> None:
    with pytest.raises(ConfigError, match="give some with --data"):
        compare(session(), runner(), [], 1e-3)


def test_a_shape_the_engine_lacks_is_an_error_and_leaves_no_memory(runner: Any) -> None:
    library = FakeCuda()
    with pytest.raises(BackendError, match="does not take shape"):
        runner(library=library).run({"x": np.zeros((9, 4, 32), np.float32)})
    assert library.memory == {}


def test_an_engine_of_another_version_is_an_error(runner: Any) -> None:
    with pytest.raises(BackendError, match="build it again"):
        runner(loads=False)


def test_driver_failures_are_named(runner: Any) -> None:
    with pytest.raises(BackendError, match="cuMemcpyHtoD_v2 failed with status 700"):
        runner(library=Failing()).run(batches()[0])


class Failing(FakeCuda):
    """A device that takes no copies."""

    def cuMemcpyHtoD_v2(self, pointer: Any, source: Any, size: Any) -> int:
        return 700


def test_the_gpu_is_named() -> None:
    assert cuda.Driver(FakeCuda()).device_name() == "NVIDIA Test (SM89)"


def test_no_gpu_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_check, "driver", lambda: None)
    with pytest.raises(BackendError, match="none is here"):
        require_gpu()


def test_differences_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((2, 5, 10)).astype(np.float32)
    got = reference + rng.normal(0, 0.1, reference.shape).astype(np.float32)
    difference = Difference("y")
    for half in (slice(0, 1), slice(1, 2)):
        difference.add(reference[half], got[half])
    gap = np.abs(reference.astype(np.float64) - got)
    assert difference.max_abs == pytest.approx(gap.max())
    assert difference.relative == pytest.approx(gap.max() / np.abs(reference).max())
    assert difference.agree == (reference.argmax(-1) == got.argmax(-1)).sum()
    assert difference.items == 10


@pytest.mark.parametrize(
    ("reference", "got", "relative"),
    [
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([1.0, -np.inf], [1.0, -np.inf], 0.0),
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([1.0, np.inf], [1.0, 2.0], np.inf),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
    ],
)
def test_values_that_are_not_finite(reference: list[float], got: list[float], relative: float) -> None:
    difference = Difference("y")
    difference.add(np.array([reference]), np.array([got]))
    assert difference.relative == relative


def test_another_shape_is_an_error() -> None:
    with pytest.raises(BackendError, match="has shape"):
        Difference("y").add(np.zeros((1, 2)), np.zeros((1, 3)))
