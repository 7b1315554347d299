"""The CUDA driver, as little of it as engines need: is a GPU there, its name, and memory on it.

It goes through ctypes to the driver library that every machine with a GPU has, so no CUDA package is needed, and a
machine without one answers "no GPU" instead of failing an import.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numpy as np

from toast_onnx.errors import BackendError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NAME_BYTES = 256
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@functools.cache
def driver() -> Driver | None:
    """The driver of this machine with its first GPU, or None where there is no driver or no GPU."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    count = ctypes.c_int()
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    return Driver(library)


def gpu_name() -> str | None:
    """Name and compute capability of the first GPU, such as `NVIDIA L4 (SM89)`; None where there is none."""
    found = driver()
    return None if found is None else found.device_name()


class Driver:
    """Calls into the CUDA driver on device 0, in the primary context that TensorRT uses too."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise BackendError(f"the CUDA driver's {name} failed with status {status}; check the GPU with nvidia-smi")

    def device_name(self) -> str:
        """Name and compute capability, such as `NVIDIA L4 (SM89)`."""
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", name, _NAME_BYTES, self._device)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_MAJOR, self._device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), _COMPUTE_MINOR, self._device)
        return f"{name.value.decode()} (SM{major.value}{minor.value})"

    def use(self) -> None:
        """Make the device's primary context current on this thread."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device; to be given back with `free`."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def upload(self, pointer: int, array: np.ndarray) -> None:
        """Copy a contiguous host array to the device."""
        self._call(
            "cuMemcpyHtoD_v2",
            ctypes.c_uint64(pointer),
            array.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(array.nbytes),
        )

    def download(self, array: np.ndarray, pointer: int) -> None:
        """Copy device memory into a contiguous host array."""
        self._call(
            "cuMemcpyDtoH_v2",
            array.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(pointer),
            ctypes.c_size_t(array.nbytes),
        )

    def synchronize(self) -> None:
        """Wait until everything submitted to the current context is done."""
        self._call("cuCtxSynchronize")
