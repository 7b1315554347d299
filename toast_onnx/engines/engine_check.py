"""An engine against ONNX Runtime on the same inputs: engines have been wrong without a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toast_onnx.engines.backend import Backend, load
from toast_onnx.engines.cuda import Driver, driver
from toast_onnx.engines.engine import tensorrt_logger
from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.files import regular_file

#: Largest difference accepted, over the largest magnitude of the reference output. DeiT-T's float16 copy differs by up
#: to 0.005 on the CPU; bfloat16 has three bits less, so eight times that; TF32 rounds factors as float16 does.
TOLERANCES = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2, "bf16": 1e-1}


@dataclass
class Difference:
    """How far one output is from its reference, over everything compared so far.

    Attributes:
        name: the output.
        max_abs: largest absolute difference; infinite where one side has a value and the other NaN or infinity.
        scale: largest magnitude of the reference.
        agree: items whose largest entry on the last axis is at the same place.
        items: items compared.
    """

    name: str
    max_abs: float = 0.0
    scale: float = 0.0
    agree: int = 0
    items: int = 0

    @property
    def relative(self) -> float:
        """Largest difference over the reference's scale; absolute where the reference is all zeros."""
        return self.max_abs / self.scale if self.scale > 0 else self.max_abs

    def add(self, reference: np.ndarray, got: np.ndarray) -> None:
        """Take in one batch; both arrays have the same shape, (batch, ...).

        Raises:
            BackendError: the shapes differ.
        """
        if reference.shape != got.shape:
            raise BackendError(
                f"output '{self.name}' has shape {got.shape} in the engine and {reference.shape} in the model"
            )
        a, b = reference.astype(np.float64), got.astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            gap = np.where(same, 0.0, np.abs(a - b))
        finite = a[np.isfinite(a)]
        self.max_abs = max(self.max_abs, float(np.where(np.isnan(gap), np.inf, gap).max(initial=0.0)))
        self.scale = max(self.scale, float(np.abs(finite).max(initial=0.0)))
        if a.ndim >= 1 and a.shape[-1] > 1:
            hits = a.argmax(-1) == b.argmax(-1)
            self.agree, self.items = self.agree + int(hits.sum()), self.items + hits.size


def compare(
    reference: Any, engine: EngineRunner, batches: Iterable[Mapping[str, np.ndarray]], tolerance: float
) -> dict[str, Any]:
    """Run both sides on the same inputs.

    Args:
        reference: an ONNX Runtime session of the model.
        engine: the engine.
        batches: arrays by input name.
        tolerance: largest relative difference accepted.

    Returns:
        `passed`, `tolerance`, `items`, and for each output its largest difference, scale and top-1 agreement.

    Raises:
        ConfigError: there was nothing to compare.
        BackendError: an output is missing or has another shape, or the engine failed.
    """
    names = [output.name for output in reference.get_outputs()]
    differences = {name: Difference(name) for name in names}
    items = 0
    for feeds in batches:
        wanted = dict(zip(names, reference.run(None, dict(feeds)), strict=True))
        got = engine.run(feeds)
        for name, difference in differences.items():
            if name not in got:
                raise BackendError(f"the engine has no output '{name}'; it was built from another model")
            difference.add(wanted[name], got[name])
        items += len(next(iter(feeds.values())))
    if not items:
        raise ConfigError("there are no inputs to compare on; give some with --data")
    return {
        "passed": all(d.relative <= tolerance for d in differences.values()),
        "tolerance": tolerance,
        "items": items,
        "outputs": {
            d.name: {
                "max_abs": d.max_abs,
                "scale": d.scale,
                "relative": d.relative,
                "top1_agreement": d.agree / d.items if d.items else None,
            }
            for d in differences.values()
        },
    }


class EngineRunner:
    """A loaded engine on the GPU, fed from and read back into numpy arrays."""

    def __init__(self, backend: Backend, engine: Path, gpu: Driver | None = None) -> None:
        """Load an engine.

        Raises:
            BackendError: no GPU, the package is missing, or the engine was built by another version or for another GPU.
        """
        self._gpu = gpu or require_gpu()
        self._gpu.use()
        self._trt: Any = load(backend)
        self._runtime = self._trt.Runtime(tensorrt_logger(self._trt))
        regular_file(engine, BackendError, "give the path of an engine")
        try:
            data = engine.read_bytes()
        except OSError as e:
            raise BackendError(f"{engine} cannot be read: {e.strerror or e}") from e
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise BackendError(
                f"{backend.name} {self._trt.__version__} cannot load {engine}; it was built by another version or for "
                "another GPU: build it again"
            )
        self._context = self._engine.create_execution_context()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            BackendError: a shape the engine was not built for, or a failure on the GPU.
        """
        trt, engine, context = self._trt, self._engine, self._context
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        pointers: dict[str, int] = {}
        try:
            for name in inputs:
                array = np.ascontiguousarray(feeds[name], dtype=trt.nptype(engine.get_tensor_dtype(name)))
                if not context.set_input_shape(name, array.shape):
                    raise BackendError(f"the engine does not take shape {array.shape} for input '{name}'")
                pointers[name] = self._gpu.allocate(array.nbytes)
                self._gpu.upload(pointers[name], array)
            outputs = {
                n: np.empty(tuple(context.get_tensor_shape(n)), trt.nptype(engine.get_tensor_dtype(n)))
                for n in names
                if n not in inputs
            }
            for name, array in outputs.items():
                pointers[name] = self._gpu.allocate(array.nbytes)
            for name, pointer in pointers.items():
                context.set_tensor_address(name, pointer)
            if not context.execute_async_v3(0):
                raise BackendError("the engine failed on the GPU; run again with --verbose")
            self._gpu.synchronize()
            for name, array in outputs.items():
                self._gpu.download(array, pointers[name])
        finally:
            for pointer in pointers.values():
                self._gpu.free(pointer)
        return outputs


def require_gpu() -> Driver:
    """The CUDA driver.

    Raises:
        BackendError: there is no GPU.
    """
    found = driver()
    if found is None:
        raise BackendError(
            "an engine runs on an NVIDIA GPU and none is here; run the command on a machine that has one"
        )
    return found
