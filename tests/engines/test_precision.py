"""16-bit conversion: outputs against float64 numpy, what stays in float32, what passes through."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.engines import graphs
from toast_onnx.engines.precision import convert_precision
from toast_onnx.errors import ConfigError
from toast_onnx.model import sort_nodes


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """ONNX Runtime's output, with the graph taken as it is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})[0]


def weight(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if t.name == name)


def input_types(proto: onnx.ModelProto, op_types: set[str]) -> set[int]:
    """Element types that nodes of these operators read, by ONNX's own inference."""
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    types |= {t.name: t.data_type for t in graph.initializer}
    return {types[name] for n in graph.node if n.op_type in op_types for name in n.input if name}


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_32_bit_precisions_leave_the_graph_alone(precision: str) -> None:
    proto = graphs.mlp()
    converted, notes = convert_precision(proto, precision)
    assert converted is proto
    assert notes == []


def test_float16_computes_the_same_within_its_rounding() -> None:
    proto = graphs.mlp()
    x = np.random.default_rng(1).standard_normal((3, 4, 32)).astype(np.float32)
    converted, _ = convert_precision(proto, "fp16")
    onnx.checker.check_model(converted, full_check=True)
    wanted = graphs.mlp_reference(proto, x)
    assert np.abs(run(proto, x) - wanted).max() < 1e-6
    assert np.abs(run(converted, x) - wanted).max() < 3e-3 * wanted.max()
    assert weight(converted, "w1").data_type == TensorProto.FLOAT16


def test_bfloat16_computes_the_same_within_its_rounding() -> None:
    proto = graphs.mlp()
    x = np.random.default_rng(2).standard_normal((3, 4, 32)).astype(np.float32)
    converted, _ = convert_precision(proto, "bf16")
    onnx.checker.check_model(converted, full_check=True)
    wanted = graphs.mlp_reference(proto, x)
    got = ReferenceEvaluator(converted).run(None, {"x": x})[0]
    assert np.abs(got - wanted).max() < 3e-2 * wanted.max()
    assert input_types(converted, {"MatMul"}) == {TensorProto.BFLOAT16}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_norms_and_softmax_stay_in_float32(precision: str) -> None:
    converted, _ = convert_precision(graphs.mlp(), precision)
    assert input_types(converted, {"LayerNormalization", "Softmax"}) == {TensorProto.FLOAT}
    spelled_out, _ = convert_precision(graphs.spelled_out_layer_norm(), precision)
    assert input_types(spelled_out, {"ReduceMean", "Sub", "Pow", "Sqrt", "Div"}) == {TensorProto.FLOAT}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_original_is_not_changed(precision: str) -> None:
    proto = graphs.spelled_out_layer_norm()
    before = proto.SerializeToString(deterministic=True)
    convert_precision(proto, precision)
    assert proto.SerializeToString(deterministic=True) == before


def test_squares_beyond_float16_survive_in_a_spelled_out_norm() -> None:
    # 1000 squared does not fit float16 (65504): any cast between Pow and ReduceMean would make it infinite.
    x = (1000 * np.random.default_rng(3).standard_normal((2, 4, 32))).astype(np.float32)
    converted, _ = convert_precision(graphs.spelled_out_layer_norm(), "fp16")
    assert np.abs(run(converted, x) - graphs.layer_norm_reference(x)).max() < 1e-2


def test_a_tiny_epsilon_keeps_its_value() -> None:
    # Tokens of equal entries leave only epsilon under the root: at 1e-12 the result shows which epsilon was used.
    x = np.full((1, 4, 32), 0.5, np.float32)
    x[..., 0] += np.float32(2**-11)
    converted, _ = convert_precision(graphs.spelled_out_layer_norm(1e-12), "fp16")
    wanted = graphs.layer_norm_reference(x, 1e-12)
    assert np.abs(run(converted, x) - wanted).max() < 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize(("fp16_io", "elem_type"), [(False, TensorProto.FLOAT), (True, TensorProto.FLOAT16)])
def test_inputs_and_outputs_change_only_on_request(fp16_io: bool, elem_type: int) -> None:
    converted, _ = convert_precision(graphs.mlp(), "fp16", fp16_io=fp16_io)
    onnx.checker.check_model(converted, full_check=True)
    values = (*converted.graph.input, *converted.graph.output)
    assert [(v.name, v.type.tensor_type.elem_type) for v in values] == [("x", elem_type), ("y", elem_type)]
    assert values[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_bfloat16_weights_are_rounded_once_from_float32() -> None:
    # Through float16 the first value would round to 1, the second would be cut to 65504, the third would become 0.
    exact = np.array([1 + 2**-8 + 2**-12, 1e5, 1e-9], np.float32)
    proto = graphs.model(
        "t = MatMul (x, w) y = Add (t, b)", {"w": np.eye(3, dtype=np.float32), "b": exact}, x="float[n, 3]"
    )
    converted, _ = convert_precision(proto, "bf16")
    got = numpy_helper.to_array(weight(converted, "b")).astype(np.float32)
    np.testing.assert_array_equal(got, exact.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(("opset", "elem_type"), [(17, TensorProto.FLOAT), (22, TensorProto.BFLOAT16)])
def test_an_operator_without_bfloat16_stays_in_float32(opset: int, elem_type: int) -> None:
    kernel = {"k": np.ones((3, 3, 1, 1), np.float32)}
    proto = graphs.model("y = Conv (x, k)", kernel, opset=opset, x="float[n, 3, 8, 8]")
    proto.ir_version = 10
    converted, _ = convert_precision(proto, "bf16")
    onnx.checker.check_model(converted, full_check=True)
    assert input_types(converted, {"Conv"}) == {elem_type}


def test_a_quantized_graph_passes_through() -> None:
    scales = {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8), "w": np.eye(32, dtype=np.float32)}
    proto = graphs.model("q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = MatMul (d, w)", scales)
    converted, notes = convert_precision(proto, "fp16")
    assert converted is proto
    assert "quantized" in notes[0]


def test_a_float16_graph_passes_through() -> None:
    converted, _ = convert_precision(graphs.mlp(), "fp16", fp16_io=True)
    for tensor in [t for t in converted.graph.initializer if t.data_type == TensorProto.FLOAT]:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
        del converted.metadata_props[:]  # somebody else made it
    again, notes = convert_precision(converted, "bf16")
    assert again is converted
    assert "no float32 weights" in notes[0]


def test_nodes_without_names_or_with_the_same_name_convert() -> None:
    proto = graphs.mlp()
    for node in proto.graph.node:
        node.name = "same"
    converted, _ = convert_precision(proto, "fp16")
    assert input_types(converted, {"LayerNormalization", "Softmax"}) == {TensorProto.FLOAT}


@pytest.mark.parametrize(("precision", "fp16_io"), [("int8", False), ("bf16", True), ("fp32", True)])
def test_what_cannot_be_is_refused(precision: str, fp16_io: bool) -> None:
    with pytest.raises(ConfigError):
        convert_precision(graphs.mlp(), precision, fp16_io=fp16_io)


@given(st.randoms(use_true_random=False), st.integers(1, 12))
def test_sorting_puts_every_node_after_what_it_reads(random: object, count: int) -> None:
    chain = [helper.make_node("Add", [f"t{i}", f"t{max(i - 2, 0)}"], [f"t{i + 1}"]) for i in range(count)]
    random.shuffle(chain)  # type: ignore[attr-defined]
    graph = helper.make_graph(chain, "g", [], [])
    sort_nodes(graph)
    assert [n.output[0] for n in graph.node] == [f"t{i + 1}" for i in range(count)]


@pytest.mark.parametrize("size", [2e4, 1e6])
def test_weights_that_would_be_clipped_stay_as_they_are(size: float) -> None:
    """The converter clips weights at 10,000 without a word; a mask's minus infinity is meant to be."""
    mask = np.where(np.arange(32) < 3, np.finfo(np.float32).min, 0).astype(np.float32)
    weights = {"large": np.float32(size), "small": np.float32(1 / size), "mask": mask}
    proto = graphs.model("b = Mul (x, large) s = Mul (b, small) m = Add (s, mask) y = Softmax (m)", weights)
    x = np.random.default_rng(1).standard_normal((3, 4, 32)).astype(np.float32) / 64
    converted, _ = convert_precision(proto, "fp16", large=["b"])
    assert weight(converted, "large").data_type == TensorProto.FLOAT
    assert weight(converted, "mask").data_type == TensorProto.FLOAT16
    assert np.abs(run(converted, x) - run(proto, x)).max() < 1e-3
