"""16-bit graphs as files: what a build makes of one is what it makes of the float32 model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import toast_onnx.model as room
from tests.engines import graphs
from toast_onnx.engines.build import BuildRequest, build, with_weights
from toast_onnx.engines.convert import convert_file
from toast_onnx.engines.precision import convert_precision, stated_precision
from toast_onnx.engines.record import record_path
from toast_onnx.errors import ConfigError, ModelError
from toast_onnx.model import load_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return graphs.save(graphs.mlp(), tmp_path / "m.onnx")


def test_the_file_computes_what_the_model_does(model: Path) -> None:
    record = convert_file(model, model.with_name("h.onnx"), precision="fp16")
    x = np.random.default_rng(0).normal(size=(3, 4, 32)).astype(np.float32)
    session = ort.InferenceSession(model.with_name("h.onnx"), providers=["CPUExecutionProvider"])
    y = np.asarray(session.run(None, {"x": x})[0])
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, graphs.mlp_reference(graphs.mlp(), x), atol=2e-3)
    assert record["engine_bytes"] == model.with_name("h.onnx").stat().st_size < model.stat().st_size
    assert record_path(model.with_name("h.onnx")).exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_engine_built_from_the_file_is_the_one_built_from_the_model(model: Path, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")
    half = model.with_name("h.onnx")
    convert_file(model, half, precision=precision)
    request = BuildRequest(precision=precision, batch=(1, 2, 4))
    build(model, model.with_name("a.engine"), request)
    build(half, model.with_name("b.engine"), request)
    assert model.with_name("a.engine").read_bytes() == model.with_name("b.engine").read_bytes()


def test_weights_outside_the_file_are_converted_too(model: Path) -> None:
    outside = model.with_name("outside.onnx")
    onnx.save(graphs.mlp(), outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    for source, target in ((model, "a.onnx"), (outside, "b.onnx")):
        convert_file(source, model.with_name(target), precision="bf16")
    assert model.with_name("a.onnx").read_bytes() == model.with_name("b.onnx").read_bytes()


def test_a_graph_whose_weights_lie_in_a_file_is_refused_and_told_how(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LEAVE_INSIDE", 1)
    loaded = load_model(model)
    wide = next(t.name for t in loaded.proto.graph.initializer if onnx.external_data_helper.uses_external_data(t))
    with pytest.raises(ModelError, match=rf"'{wide}' lies in a file: give convert_precision with_weights\(model\)"):
        convert_precision(loaded.proto, "fp16")
    read, _ = convert_precision(with_weights(loaded), "fp16")
    inside, _ = convert_precision(graphs.mlp(), "fp16")
    assert read.SerializeToString(deterministic=True) == inside.SerializeToString(deterministic=True)


def test_weights_in_memory_are_those_that_replace_the_file_s(model: Path) -> None:
    loaded = load_model(model)
    loaded.arrays["w1"] = np.full((32, 64), 0.25, np.float32)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in with_weights(loaded).graph.initializer}
    np.testing.assert_array_equal(tensors["w1"], loaded.arrays["w1"])
    np.testing.assert_array_equal(tensors["b1"], onnx.numpy_helper.to_array(graphs.mlp().graph.initializer[3]))


def test_the_record_names_the_default_operator_set_whatever_comes_first(model: Path) -> None:
    proto = graphs.mlp()
    del proto.opset_import[:]
    proto.opset_import.extend([onnx.helper.make_opsetid("com.microsoft", 1), onnx.helper.make_opsetid("", 17)])
    graphs.save(proto, model)
    assert convert_file(model, model.with_name("h.onnx"), precision="fp16")["backend_version"] == "17"


def test_nothing_is_converted_twice() -> None:
    once, _ = convert_precision(graphs.mlp(), "fp16")
    assert stated_precision(graphs.mlp()) is None
    assert stated_precision(once) == "fp16"
    twice, notes = convert_precision(once, "fp16")
    assert twice is once
    assert notes == []
    for other in ("bf16", "fp32", "tf32"):
        with pytest.raises(ConfigError, match="was converted to fp16 before: use --precision fp16"):
            convert_precision(once, other)
    with pytest.raises(ConfigError, match="converted with float32 inputs"):
        convert_precision(once, "fp16", fp16_io=True)


def test_what_is_no_16_bit_file_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="choose --precision fp16 or bf16, not tf32"):
        convert_file(model, model.with_name("h.onnx"), precision="tf32")
    with pytest.raises(ConfigError, match="is the model itself"):
        convert_file(model, model, precision="fp16")
    assert [p.name for p in model.parent.iterdir()] == ["m.onnx"]
