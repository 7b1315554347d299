"""Which backend is taken, which options each refuses, and what goes into TensorRT's configuration."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toast_onnx.engines._rtx import TensorRTRTX
from toast_onnx.engines._trt import TensorRT
from toast_onnx.engines.backend import EngineOptions, load, parse_compute_capabilities
from toast_onnx.engines.backends import choose
from toast_onnx.errors import BackendError, ConfigError


def pretend(monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: str | None) -> None:
    """A machine with these packages and this GPU."""
    spec = importlib.machinery.ModuleSpec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec(name, None) if name in installed else None)
    for module in ("backends", "_trt"):
        monkeypatch.setattr(f"toast_onnx.engines.{module}.gpu_name", lambda: gpu)


@pytest.mark.parametrize(
    ("installed", "gpu", "name"),
    [
        ({"tensorrt"}, None, "tensorrt"),
        ({"tensorrt_rtx"}, "L4", "tensorrt-rtx"),
        ({"tensorrt", "tensorrt_rtx"}, "L4", "tensorrt"),
        ({"tensorrt", "tensorrt_rtx"}, None, "tensorrt-rtx"),
    ],
)
def test_auto_takes_what_can_build(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: str | None, name: str
) -> None:
    pretend(monkeypatch, installed, gpu)
    assert choose("auto").name == name


def test_a_missing_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, set(), None)
    with pytest.raises(BackendError, match="pip install tensorrt_rtx"):
        choose("auto")
    with pytest.raises(BackendError, match=r"pip install tensorrt$"):
        choose("tensorrt")
    with pytest.raises(ConfigError, match="use one of auto, tensorrt, tensorrt-rtx"):
        choose("openvino")


def test_a_package_that_does_not_import_is_one_error() -> None:
    with pytest.raises(BackendError, match="no_such_tensorrt cannot be imported"):
        load(SimpleNamespace(module_name="no_such_tensorrt"))  # type: ignore[arg-type]


def test_tensorrt_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"tensorrt"}, None)
    with pytest.raises(BackendError, match="needs a GPU to build"):
        TensorRT().check(EngineOptions())


def test_options_a_backend_lacks_are_refused_or_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"tensorrt"}, "L4")
    with pytest.raises(ConfigError, match="leave --compute-capability out"):
        TensorRT().check(EngineOptions(compute_capabilities=(89,)))
    with pytest.raises(ConfigError, match="leave --version-compatible out"):
        TensorRTRTX().check(EngineOptions(version_compatible=True))
    with pytest.raises(ConfigError, match="with --compute-capability"):
        TensorRTRTX().check(EngineOptions(hardware_compatible=True))
    assert TensorRT().check(EngineOptions(timing_cache=Path("t"))) == []
    assert "--timing-cache is ignored" in TensorRTRTX().check(EngineOptions(timing_cache=Path("t")))[0]


class RecordingConfig:
    """STAND-IN for the IBuilderConfig of `tensorrt`, which needs a GPU to do anything: it keeps what it is told."""

    hardware_compatibility_level: Any = None

    def __init__(self, accepts: bool = True) -> None:
        self.flags: list[str] = []
        self.cache = b""
        self._accepts = accepts

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def create_timing_cache(self, data: bytes) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: data + b"+new")

    def set_timing_cache(self, cache: SimpleNamespace, ignore_mismatch: bool) -> bool:
        self.cache = cache
        assert ignore_mismatch is False
        return self._accepts

    def get_timing_cache(self) -> SimpleNamespace:
        return self.cache  # type: ignore[return-value]


TRT = SimpleNamespace(
    HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere+"),
    BuilderFlag=SimpleNamespace(VERSION_COMPATIBLE="vc"),
)


def test_tensorrt_is_configured() -> None:
    config = RecordingConfig()
    TensorRT().configure(TRT, config, EngineOptions(hardware_compatible=True, version_compatible=True))
    assert (config.flags, config.hardware_compatibility_level) == (["vc"], "ampere+")
    plain = RecordingConfig()
    TensorRT().configure(TRT, plain, EngineOptions())
    assert (plain.flags, plain.hardware_compatibility_level) == ([], None)


def test_the_timing_cache_is_read_extended_and_written(tmp_path: Path) -> None:
    options = EngineOptions(timing_cache=tmp_path / "cache")
    for expected in (b"+new", b"+new+new"):
        config = RecordingConfig()
        TensorRT().configure(TRT, config, options)
        TensorRT().finish(config, options)
        assert (tmp_path / "cache").read_bytes() == expected
    with pytest.raises(BackendError, match="timings of another TensorRT or GPU"):
        TensorRT().configure(TRT, RecordingConfig(accepts=False), options)


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [(("8.9",), (89,)), (("sm80,SM_89", "12.0"), (80, 89, 120)), (("89", "8.9"), (89,)), ((), ())],
)
def test_compute_capabilities_are_read(texts: tuple[str, ...], numbers: tuple[int, ...]) -> None:
    assert parse_compute_capabilities(texts) == numbers


@pytest.mark.parametrize("text", ["", "ada", "8", "8.9.1.2", "sm"])
def test_other_compute_capabilities_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not like 8\.9"):
        parse_compute_capabilities((text,))
