"""The execution providers of ONNX Runtime that every command knows, and sessions on the one that was asked for.

ONNX Runtime falls back to the CPU when a provider's libraries are missing, and a result of the fallback would be a
result of the wrong thing: here it is an error, with one wording for every command.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toast_onnx.errors import BackendError, ConfigError, ModelError, one_line


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: ONNX Runtime's name for it.
        package: what installs it.
        helpers: short names of those that take the nodes it cannot run, in order.
        plugin: module that ONNX Runtime loads it from, where it is not built in.
        nvidia: whether it runs on NVIDIA's GPUs, which schedulers count.
        shape_prefix: of its options that give the shapes of one engine for all inputs; none for most.
    """

    name: str
    package: str
    helpers: tuple[str, ...] = ("cpu",)
    plugin: str | None = None
    shape_prefix: str | None = None
    nvidia: bool = False


#: Short name to provider; the only list there is.
PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "onnxruntime", ()),
    "cuda": Provider("CUDAExecutionProvider", "onnxruntime-gpu", nvidia=True),
    "tensorrt": Provider(
        "TensorrtExecutionProvider", "onnxruntime-gpu", ("cuda", "cpu"), shape_prefix="trt", nvidia=True
    ),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "onnxruntime-ep-nv-tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        shape_prefix="nv",
        nvidia=True,
    ),
    "openvino": Provider("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "coreml": Provider("CoreMLExecutionProvider", "onnxruntime on macOS"),
    "directml": Provider("DmlExecutionProvider", "onnxruntime-directml"),
}


def known_provider(name: str) -> Provider:
    """The provider of a short name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PROVIDERS:
        raise ConfigError(f"provider '{name}' is unknown; use one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


def installed_providers() -> list[str]:
    """Short names of the providers that ONNX Runtime lists here; a listed one may still lack its device."""
    from toast_onnx.ort import ort

    listed = set(ort.get_available_providers())
    return [
        name
        for name, provider in PROVIDERS.items()
        if provider.name in listed or (provider.plugin is not None and importlib.util.find_spec(provider.plugin))
    ]


def open_on(
    source: str | bytes, provider: str, options: Any, settings: Mapping[str, str] | None = None, label: str = ""
) -> Any:
    """Open a model on one execution provider; nodes it cannot run go to its helpers.

    Args:
        source: a file's path, or a serialized model.
        provider: a key of `PROVIDERS`.
        options: `onnxruntime.SessionOptions`; changed where the provider needs it.
        settings: the provider's own options.
        label: what errors call the model; the path by default.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ConfigError: an unknown provider.
        BackendError: the provider is not installed, or cannot start here.
        ModelError: the model does not load.
    """
    from toast_onnx.ort import ort, quiet

    wanted = known_provider(provider)
    available = ort.get_available_providers()
    if wanted.name not in available and (wanted.plugin is None or importlib.util.find_spec(wanted.plugin) is None):
        raise BackendError(_missing(provider, "is not installed"))
    if provider == "directml":  # it works with neither
        options.enable_mem_pattern = False
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    helpers = [PROVIDERS[name].name for name in wanted.helpers if PROVIDERS[name].name in available]
    arguments: dict[str, Any] = {"providers": [(wanted.name, dict(settings or {})), *helpers]}
    # A build for GPUs lists providers whose driver or libraries this machine lacks, and then runs on the CPU: it only
    # logs why. Its constructor would also retry on its own and print that to stdout, hence `enable_fallback`.
    with quiet():
        try:
            if wanted.name not in available:
                options.add_provider_for_devices(_plugin_devices(ort, provider), dict(settings or {}))
                arguments = {}
            session = ort.InferenceSession(source, options, enable_fallback=0, **arguments)
        except BackendError:
            raise
        except Exception as error:  # its exceptions share no base class
            if provider != "cpu" and ("TensorRT libraries" in str(error) or "CUDA failure" in str(error)):
                raise BackendError(_missing(provider, "cannot start here")) from error
            name = label or (source if isinstance(source, str) else "the model")
            raise ModelError(f"{name}: ONNX Runtime cannot load it: {one_line(error)}") from error
    if session.get_providers()[0] != wanted.name:
        raise BackendError(_missing(provider, "cannot start here"))
    return session


def _missing(provider: str, what: str) -> str:
    """The one message about a provider that cannot be used."""
    return (
        f"provider {provider} {what} (ONNX Runtime here lists {', '.join(installed_providers())}): install "
        f"{PROVIDERS[provider].package} with its device's driver and libraries, or use --provider cpu"
    )


def _plugin_devices(ort: Any, provider: str) -> list[Any]:
    """The devices that a provider in a package of its own offers."""
    wanted = PROVIDERS[provider]
    plugin: Any = importlib.import_module(str(wanted.plugin))
    if all(device.ep_name != wanted.name for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(wanted.name, plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == wanted.name]
    if not devices:
        raise BackendError(_missing(provider, "found no device"))
    return devices
