"""Single operators against ONNX Runtime, in the forms that exporters write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.helper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.finetune.graphs import FLOAT, graph_model, run_onnx
from toast_onnx.errors import ModelError
from toast_onnx.finetune import to_torch


def compare(
    op: str,
    x: np.ndarray,
    *others: np.ndarray | None,
    outputs: int = 1,
    opset: int = 18,
    tolerance: float = 1e-5,
    **attributes: Any,
) -> None:
    """One node on x and constant further inputs, in PyTorch and in ONNX Runtime."""
    constants = {f"c{k}": value for k, value in enumerate(others) if value is not None}
    names = ["x", *("" if value is None else f"c{k}" for k, value in enumerate(others))]
    results = [f"y{k}" for k in range(outputs)]
    node = onnx.helper.make_node(op, names, results, **attributes)
    shape = [f"d{k}" for k in range(x.ndim)]
    model = graph_model([node], {"x": (FLOAT, shape)}, results, constants, opset)
    found = to_torch(model)(torch.from_numpy(x))
    found = found if isinstance(found, tuple) else (found,)
    for ours, theirs in zip(found, run_onnx(model, {"x": x}), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=tolerance, atol=tolerance)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(
    "where", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
)
@pytest.mark.parametrize("size", [(3, 9), (7, 4), (1, 5)])
def test_resize(mode: str, where: str, size: tuple[int, int]) -> None:
    # At 5 -> 3 symmetric positions are whole numbers up to rounding, where "floor" would be a matter of chance.
    extra = {"nearest_mode": "floor"} if mode == "nearest" and where != "half_pixel_symmetric" else {}
    x = noise(2, 3, 5, 6)
    compare(
        "Resize", x, None, None, ints(2, 3, *size), mode=mode, coordinate_transformation_mode=where, opset=19, **extra
    )


@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_resize_to_the_nearest(nearest: str) -> None:
    compare(
        "Resize", noise(1, 1, 4, 6), None, np.array([1, 1, 2, 0.5], np.float32), mode="nearest", nearest_mode=nearest
    )


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_with_antialiasing(mode: str) -> None:
    compare("Resize", noise(1, 2, 12, 10), None, None, ints(1, 2, 5, 7), mode=mode, antialias=1, tolerance=1e-4)


def test_resize_of_some_axes_by_scales() -> None:
    scales = np.array([1.6, 0.7], np.float32)
    compare("Resize", noise(2, 3, 5, 10), None, scales, mode="linear", axes=[2, 3])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slice(data: st.DataObject) -> None:
    bounds = st.integers(-9, 9)
    step = data.draw(st.sampled_from([1, 2, 3, -1, -2]))
    last = st.just(2**63 - 1 if step > 0 else -(2**63) + 1)  # how exporters write "to the end"
    start, end, axis = data.draw(bounds), data.draw(st.one_of(bounds, last)), data.draw(st.integers(-2, 1))
    compare("Slice", noise(6, 5), ints(start), ints(end), ints(axis), ints(step))


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
def test_pad(mode: str) -> None:
    compare("Pad", noise(1, 2, 4, 5), ints(0, 0, 1, 2, 0, 0, 3, 1), mode=mode)


def test_pad_with_a_value_on_some_axes() -> None:
    compare("Pad", noise(2, 4, 5), ints(1, -2), np.array(7, np.float32), ints(-1))


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("axis", [1, -1])
def test_softmax_before_and_since_opset_13(opset: int, axis: int) -> None:
    compare("Softmax", noise(2, 3, 4), axis=axis, opset=opset)


@pytest.mark.parametrize("axis", [1, 2])
def test_layer_norm_over_several_axes(axis: int) -> None:
    shape = (3, 4)[axis - 1 :]
    compare("LayerNormalization", noise(2, 3, 4), noise(*shape, seed=1), noise(*shape, seed=2), axis=axis, epsilon=1e-3)


def test_layer_norm_with_broadcast_gain() -> None:
    compare("LayerNormalization", noise(2, 3, 4), noise(1, seed=1), axis=-1)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceL2", "ReduceMax", "ReduceLogSumExp", "ReduceProd"])
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions(op: str, keep: int) -> None:
    compare(op, noise(2, 3, 4), ints(-1, 0), keepdims=keep)
    compare(op, noise(2, 3, 4), keepdims=keep)


def test_gemm_with_everything() -> None:
    compare("Gemm", noise(4, 3), noise(5, 4), noise(5), transA=1, transB=1, alpha=0.5, beta=2.0)


@pytest.mark.parametrize("auto", ["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
def test_convolution(auto: str) -> None:
    pads = {"pads": [1, 0, 2, 1]} if auto == "NOTSET" else {}
    compare("Conv", noise(2, 4, 7, 8), noise(6, 2, 3, 3), noise(6), group=2, strides=[2, 1], auto_pad=auto, **pads)


def test_transposed_convolution() -> None:
    w = noise(4, 3, 2, 3)
    compare("ConvTranspose", noise(1, 4, 3, 5), w, noise(3), strides=[2, 2], pads=[0, 1, 1, 0], output_padding=[1, 0])


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pooling(op: str) -> None:
    compare(op, noise(1, 2, 9, 8), kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 0])


def test_gathers_and_scatters() -> None:
    index = np.array([[0, -1], [2, 1]])
    compare("Gather", noise(3, 4), index, axis=1)
    compare("Gather", noise(3, 4), index, axis=0)
    compare("Gather", noise(3), np.array(1))
    compare("GatherElements", noise(3, 2), index, axis=0)
    compare("GatherND", noise(3, 4, 5), np.array([[0, 1], [2, -1]]))
    compare("GatherND", noise(2, 3, 4), np.array([[1], [0]]), batch_dims=1)
    compare("ScatterND", noise(4, 3), np.array([[1], [3]]), noise(2, 3))
    compare("ScatterElements", noise(3, 3), np.array([[1, 0, 2]]), noise(1, 3), axis=0)


def test_the_first_of_equal_values_comes_first_in_top_k() -> None:
    x = np.array([[1, 3, 3, 2, 3]], np.float32)
    compare("TopK", x, ints(4), outputs=2)


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("exclusive", [0, 1])
def test_cumulative_sum(reverse: int, exclusive: int) -> None:
    compare("CumSum", noise(2, 5), np.array(1), reverse=reverse, exclusive=exclusive)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    compare("Gelu", noise(50), approximate=approximate, opset=20)


def test_grid_sample() -> None:
    grid = np.random.default_rng(1).uniform(-1.2, 1.2, (1, 3, 4, 2)).astype(np.float32)
    compare("GridSample", noise(1, 2, 5, 6), grid, align_corners=0)


def test_grid_sample_takes_a_grid_of_another_type() -> None:
    """As Mask2Former's static export has it; ONNX Runtime has no kernel for that, so the middle pixel is known."""
    nodes = [onnx.helper.make_node("GridSample", ["x", "grid"], ["y"], align_corners=0)]
    model = graph_model(nodes, {"x": (FLOAT, [1, 1, 3, 3])}, ["y"], {"grid": np.zeros((1, 1, 1, 2))})
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert to_torch(model)(x).item() == 4.0


def test_clip_with_one_bound() -> None:
    compare("Clip", noise(9), None, np.array(0.3, np.float32))


def attention_model(mask: np.ndarray | None, **attributes: Any) -> Any:
    names = ["q", "k", "v", *([] if mask is None else ["mask"])]
    node = onnx.helper.make_node("Attention", names, ["y"], **attributes)
    inputs = {n: (FLOAT, ["b", "s", f"w{n}"]) for n in "qkv"}
    return graph_model([node], inputs, ["y"], {} if mask is None else {"mask": mask}, 23)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_attention_with_other_widths_for_values(causal: int, softcap: float, kind: str) -> None:
    rng = np.random.default_rng(3)
    allowed = rng.random((5, 5)) < 0.7
    np.fill_diagonal(allowed, True)
    mask = {"none": None, "bool": allowed, "float": rng.standard_normal((5, 5)).astype(np.float32)}[kind]
    model = attention_model(mask, q_num_heads=2, kv_num_heads=2, scale=0.3, is_causal=causal, softcap=softcap)
    feeds = {n: noise(2, 5, width, seed=k) for k, (n, width) in enumerate((("q", 8), ("k", 8), ("v", 6)))}
    found = to_torch(model)(*(torch.from_numpy(feeds[n]) for n in "qkv"))
    # A reference of our own: ONNX Runtime applies softcap after the mask in some versions, the specification before it.
    q, k, v = (feeds[n].reshape(2, 5, 2, -1).transpose(0, 2, 1, 3).astype(np.float64) for n in "qkv")
    scores = 0.3 * q @ k.transpose(0, 1, 3, 2)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    if kind == "bool":
        scores = np.where(allowed, scores, -np.inf)
    elif mask is not None:
        scores = scores + mask
    if causal:
        scores = np.where(np.tril(np.ones((5, 5), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(2, 5, -1)
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-4, atol=1e-5)


def test_shape_arithmetic_follows_the_batch_without_touching_tensors() -> None:
    """Half of the tokens, computed from the shape as TorchScript does it: float square roots and integer division."""
    nodes = [
        onnx.helper.make_node("Shape", ["x"], ["shape"]),
        onnx.helper.make_node("Gather", ["shape", "one"], ["n"]),
        onnx.helper.make_node("Div", ["n", "two"], ["half"]),
        onnx.helper.make_node("Unsqueeze", ["half", "zero"], ["end"]),
        onnx.helper.make_node("Slice", ["x", "zero", "end", "axis"], ["front"]),
        onnx.helper.make_node("Cast", ["n"], ["float"], to=1),
        onnx.helper.make_node("Sqrt", ["float"], ["root"]),
        onnx.helper.make_node("Mul", ["front", "root"], ["y"]),
    ]
    constants = {"one": np.array(1), "two": np.array(2), "zero": ints(0), "axis": ints(1)}
    model = graph_model(nodes, {"x": (FLOAT, ["b", "n", 3])}, ["y"], constants)
    module = to_torch(model)
    for tokens in (4, 7, 4):
        x = noise(2, tokens, 3)
        np.testing.assert_allclose(module(torch.from_numpy(x)), run_onnx(model, {"x": x})[0], rtol=1e-6)


def test_a_form_that_is_not_covered_is_named() -> None:
    node = onnx.helper.make_node("ScatterND", ["x", "i", "u"], ["y"], reduction="max", name="here")
    constants = {"i": np.array([[0]]), "u": np.ones((1, 2), np.float32)}
    module = to_torch(graph_model([node], {"x": (FLOAT, [3, 2])}, ["y"], constants))
    with pytest.raises(ModelError, match="'here' cannot run in PyTorch: ScatterND with reduction 'max'"):
        module(torch.zeros(3, 2))
