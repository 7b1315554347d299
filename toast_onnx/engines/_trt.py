"""Backend for the `tensorrt` package, 10.12 and later, 11 included: engines for the GPU of the machine that builds."""

from __future__ import annotations

from typing import Any

from toast_onnx.engines.backend import EngineOptions, read_if_there
from toast_onnx.engines.cuda import gpu_name
from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.files import write_bytes


class TensorRT:
    """TensorRT proper. It times kernels on the GPU while it builds, so it needs one."""

    name = "tensorrt"
    module_name = "tensorrt"

    def check(self, options: EngineOptions) -> list[str]:
        """See `Backend.check`."""
        if options.compute_capabilities:
            raise ConfigError(
                "tensorrt builds for the GPU it runs on; leave --compute-capability out, use --hardware-compatible, "
                "or build with --backend tensorrt-rtx"
            )
        if gpu_name() is None:
            raise BackendError(
                "tensorrt needs a GPU to build and none is here; use --backend tensorrt-rtx or build on the target"
            )
        return []

    def configure(self, trt: Any, config: Any, options: EngineOptions) -> None:
        """See `Backend.configure`."""
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.timing_cache is not None:
            cache = config.create_timing_cache(read_if_there(options.timing_cache))
            if not config.set_timing_cache(cache, False):
                raise BackendError(
                    f"{options.timing_cache} holds timings of another TensorRT or GPU; delete it or name another"
                )

    def finish(self, config: Any, options: EngineOptions) -> None:
        """Write the timing cache, old entries and new ones."""
        if options.timing_cache is not None:
            write_bytes(options.timing_cache, bytes(config.get_timing_cache().serialize()))
