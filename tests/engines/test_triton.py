"""Model repositories for Triton: their files, and their configuration by Triton's own schema (slow: a package more)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format

from tests.engines import graphs
from toast_onnx.engines.profiles import ShapeRange
from toast_onnx.engines.triton import TYPES, configuration, repository_files, write_repository
from toast_onnx.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits_vit.onnx"
PROFILE = {"x": ShapeRange((1, 4, 32), (4, 4, 32), (16, 4, 32))}


def schema() -> Any:
    """The protobuf module with `ModelConfig`, without the client around it."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("tritonclient is not installed: pip install --no-deps tritonclient")
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(text: str) -> Any:
    return text_format.Parse(text, schema().ModelConfig())


def fixed(proto: onnx.ModelProto, size: int) -> onnx.ModelProto:
    """The graph with a batch of one size."""
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    return proto


def test_a_repository_holds_the_model_and_its_configuration(tmp_path: Path) -> None:
    source = graphs.save(graphs.mlp(), tmp_path / "a b.onnx")
    config = write_repository(tmp_path / "repository", source, onnx.load(source))
    assert config == tmp_path / "repository" / "a_b" / "config.pbtxt"
    ort.InferenceSession(config.parent / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    text = config.read_text()
    assert 'backend: "onnxruntime"' in text
    assert 'input [ { name: "x" data_type: TYPE_FP32 dims: [ 4, 32 ] } ]' in text
    assert "max_batch_size: 32" in text
    assert not [p for p in config.parent.rglob("*") if p.name.startswith(".")]


def test_an_engine_is_copied_and_its_profile_is_the_batch(tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"plan")
    config = write_repository(tmp_path / "r", engine, graphs.mlp(), PROFILE)
    assert repository_files(tmp_path / "r", engine)[1].read_bytes() == b"plan"
    text = config.read_text()
    assert 'backend: "tensorrt"' in text
    assert "max_batch_size: 16" in text
    assert "dynamic_batching { preferred_batch_size: [ 4, 16 ] max_queue_delay_microseconds: 100 }" in text


def test_without_an_open_batch_requests_are_not_put_together() -> None:
    text = configuration("m", "model.onnx", fixed(graphs.mlp(), 2))
    assert "max_batch_size: 0" in text
    assert "dims: [ 2, 4, 32 ]" in text
    assert "dynamic_batching" not in text


def test_what_triton_cannot_serve_is_said() -> None:
    proto = graphs.mlp()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ConfigError, match="has no rank"):
        configuration("m", "model.onnx", proto)
    proto = graphs.mlp()
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.COMPLEX64
    with pytest.raises(ConfigError, match="Triton does not serve"):
        configuration("m", "model.onnx", proto)


@pytest.mark.slow
def test_the_examples_configuration_fits_tritons_schema() -> None:
    proto = onnx.load(EXAMPLE)
    found = parsed(configuration("digits", "model.onnx", proto))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][1:] for v in proto.graph.input}
    assert {entry.name: list(entry.dims) for entry in found.input} == shapes
    assert [entry.name for entry in found.output] == [value.name for value in proto.graph.output]
    assert found.max_batch_size == 32
    assert list(found.dynamic_batching.preferred_batch_size) == [8, 32]
    group = schema().ModelInstanceGroup
    assert [(entry.count, entry.kind) for entry in found.instance_group] == [(1, group.KIND_GPU)]


@pytest.mark.slow
def test_odd_names_and_shapes_fit_tritons_schema() -> None:
    proto = graphs.mlp()
    proto.graph.output[0].name = 'y "1"\n\\é'
    del proto.graph.output[0].type.tensor_type.shape.dim[1:]
    found = parsed(configuration("m", "model.plan", proto, PROFILE))
    assert found.output[0].name == 'y "1"\n\\é'
    assert list(found.output[0].dims) == [1]
    assert list(found.output[0].reshape.shape) == []
    assert found.output[0].HasField("reshape")
    assert set(TYPES.values()) <= set(schema().DataType.keys())
