"""Backend for the `tensorrt_rtx` package: engines for several architectures, built on a machine without a GPU."""

from __future__ import annotations

from typing import Any

from toast_onnx.engines.backend import EngineOptions
from toast_onnx.errors import ConfigError


class TensorRTRTX:
    """TensorRT for RTX. It compiles ahead of time and picks kernels on the target, so a build times nothing."""

    name = "tensorrt-rtx"
    module_name = "tensorrt_rtx"

    def check(self, options: EngineOptions) -> list[str]:
        """See `Backend.check`."""
        if options.version_compatible:
            raise ConfigError(
                "tensorrt-rtx engines load only in the version that built them; leave --version-compatible out"
            )
        if options.hardware_compatible:
            raise ConfigError(
                "tensorrt-rtx has no --hardware-compatible; name the architectures with --compute-capability instead"
            )
        if options.timing_cache is not None:
            return ["tensorrt-rtx times no kernels while building: --timing-cache is ignored"]
        return []

    def configure(self, trt: Any, config: Any, options: EngineOptions) -> None:
        """See `Backend.configure`."""
        if not options.compute_capabilities:
            return
        known = {n: v for n, v in trt.ComputeCapability.__members__.items() if n.startswith("SM")}
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, number in enumerate(options.compute_capabilities):
            value = known.get(f"SM{number}")
            if value is None or not config.set_compute_capability(value, index):
                raise ConfigError(
                    f"tensorrt-rtx {trt.__version__} has no compute capability {number}; it knows "
                    f"{', '.join(n.removeprefix('SM') for n in known)}"
                )

    def finish(self, config: Any, options: EngineOptions) -> None:
        """See `Backend.finish`; nothing is learned from a build."""
