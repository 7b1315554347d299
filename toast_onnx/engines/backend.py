"""What a TensorRT backend is; `backends` has them all and takes one.

A backend is thin: it names its Python module and says which options it has. The build itself (`engine.py`) is shared,
since both modules offer the same Builder, OnnxParser and BuilderConfig.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from toast_onnx.engines.profiles import ShapeRange
from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.files import regular_file


@dataclass(frozen=True)
class EngineOptions:
    """Settings of one build.

    Attributes:
        profile: shape range by input name; empty for a graph with fixed shapes.
        tf32: allow 10-bit mantissas inside float32 matrix products.
        workspace: bytes of scratch memory kernels may use; None leaves TensorRT's default (all of the device).
        optimization_level: 0 (fast build) to 5 (search longest); None leaves TensorRT's default, 3.
        timing_cache: file of kernel timings to read and to extend.
        compute_capabilities: architectures to build for, such as 89; empty leaves the backend's default.
        hardware_compatible: one engine for every architecture from Ampere on.
        version_compatible: an engine that later TensorRT releases can load.
    """

    profile: Mapping[str, ShapeRange] = field(default_factory=dict)
    tf32: bool = True
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    compute_capabilities: tuple[int, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False


class Progress(Protocol):
    """Told how far a build is; TensorRT's phases nest, and a phase inside another has the other as its parent."""

    def __call__(self, phase: str, parent: str | None, done: int, total: int) -> None:
        """`done` of `total` steps of `phase` are done; `done == total` ends it."""


class Backend(Protocol):
    """One TensorRT package."""

    name: str
    module_name: str

    def check(self, options: EngineOptions) -> list[str]:
        """Refuse options this package lacks, before any work.

        Returns:
            Sentences about options that are ignored.

        Raises:
            ConfigError: an option that the package cannot honour.
            BackendError: the package cannot build on this machine.
        """

    def configure(self, trt: Any, config: Any, options: EngineOptions) -> None:
        """Put the options that only this package has into a builder configuration."""

    def finish(self, config: Any, options: EngineOptions) -> None:
        """Store what the build learned, such as kernel timings."""


def load(backend: Backend) -> ModuleType:
    """Import a backend's Python module.

    Raises:
        BackendError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(backend.module_name)
    except (ImportError, OSError) as e:
        raise BackendError(
            f"{backend.module_name} cannot be imported ({e}); install it with: pip install {backend.module_name}"
        ) from e


def parse_compute_capabilities(texts: tuple[str, ...]) -> tuple[int, ...]:
    """Read architectures written as `8.9`, `89` or `sm89`, apart by commas or given one by one.

    Raises:
        ConfigError: an entry is none of these.
    """
    found = []
    for entry in (part.strip() for text in texts for part in text.split(",")):
        digits = entry.lower().removeprefix("sm").lstrip("_").replace(".", "")
        if not digits.isdecimal() or len(digits) not in (2, 3):
            raise ConfigError(f"compute capability '{entry}' is not like 8.9, 89 or sm89")
        found.append(int(digits))
    return tuple(dict.fromkeys(found))


def read_if_there(path: os.PathLike[str]) -> bytes:
    """Bytes of a file, or none where there is no such file yet.

    Raises:
        BackendError: it exists and cannot be read.
    """
    if not os.path.lexists(path):
        return b""
    regular_file(path, BackendError, "name another file")
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise BackendError(f"{path} cannot be read: {e.strerror or e}") from e
