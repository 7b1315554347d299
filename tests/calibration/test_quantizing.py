"""Eight-bit models: what is quantized, that equalization changes nothing, and that the result stays close."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import zoo
from tests.pruning import run, worst
from toast_onnx.engines.build import with_weights
from toast_onnx.errors import ConfigError
from toast_onnx.model import Model, load_model, save_model
from toast_onnx_calibration.quantizing import (
    QuantizeOptions,
    choose_layers,
    equalize_norms,
    quantize,
    table_of_steps,
)
from toast_onnx_calibration.sessions import make_session, model_inputs
from toast_onnx_calibration.sources import open_source

Exported = Callable[[zoo.Case], Path]
PLAIN = QuantizeOptions(preprocess="none", samples=None, batch=4)


@pytest.fixture
def prepared(exported: Exported, tmp_path: Path) -> tuple[Path, Path]:
    """A model with two blocks, and samples of it."""
    model = exported(zoo.Case("timm-vit"))
    np.save(tmp_path / "x.npy", zoo.inputs(model, 8)["input"])
    return model, tmp_path / "x.npy"


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_linear_layers_are_quantized_and_the_rest_stays(
    method: str, prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = prepared
    out = tmp_path / "q.onnx"
    options = QuantizeOptions(preprocess="none", samples=None, batch=4, method=method)
    result = quantize(model, data, out, options)
    assert len(result.layers) == 2 * 4  # qkv, projection, fc1 and fc2 of both blocks
    assert len(result.kept) == 2  # the patches' and the classes' layers
    assert result.samples == 8
    dense, small = (onnx.load(p).graph for p in (model, out))
    before, after = (Counter(n.op_type for n in g.node) for g in (dense, small))
    assert {op: after[op] for op in before} == dict(before)
    assert after["DequantizeLinear"] == 2 * len(result.layers)
    by_name = {t.name: t for t in small.initializer}
    weights = [t for t in by_name.values() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert len(weights) == len(result.layers)
    readers = {n.input[0]: n for n in small.node if n.op_type == "DequantizeLinear"}
    assert all(by_name[readers[w.name].input[1]].dims[0] == w.dims[1] for w in weights)  # one scale a channel
    x = zoo.inputs(model, 3)
    assert 1e-6 < worst(run(out, x), run(model, x)) < 0.1


def equalized(path: Path, data: Path, out: Path) -> int:
    """Write a model with its norms equalized, make sure that it computes the same, and tell how many there are."""
    inputs = model_inputs(make_session(path))
    loaded = Model(with_weights(load_model(path)), path)
    model, count = equalize_norms(loaded, open_source(data, inputs, None), inputs, 0.5)
    save_model(model, out)
    x = zoo.inputs(path, 3)
    assert worst(run(out, x), run(path, x)) < 1e-5
    return count


def test_equalized_channels_change_nothing(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    path, data = prepared
    # both norms of both blocks; the last one is read as one token
    assert equalized(path, data, tmp_path / "e.onnx") == 4
    gains = [
        [onnx.numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer if "norm" in t.name]
        for p in (path, tmp_path / "e.onnx")
    ]
    assert any(not np.allclose(a, b) for a, b in zip(*gains, strict=True))


def test_a_norm_whose_bias_another_node_makes_is_not_equalized(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """As exporters hand on one of several equal weights; written beside that node, it would be defined twice."""
    path, data = prepared
    model = onnx.load(path)
    norm = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    bias = next(t for t in model.graph.initializer if t.name == norm.input[2])
    norm.input[2], bias.name = "handed.on", "shared"
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["shared"], ["handed.on"]))
    onnx.save(model, tmp_path / "shared.onnx")
    assert equalized(tmp_path / "shared.onnx", data, tmp_path / "e.onnx") == 3


def test_a_norm_whose_layer_shares_its_weight_is_not_equalized(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    path, data = prepared
    model = onnx.load(path)
    first, other = [n.output[0] for n in model.graph.node if n.op_type == "LayerNormalization"][:2]
    layer = next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[0] == first)
    at = next(k for k, n in enumerate(model.graph.node) if other in n.output)
    model.graph.node.insert(at + 1, onnx.helper.make_node("MatMul", [other, layer.input[1]], ["again"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("again", 1, ["batch", "tokens", "wide"]))
    onnx.save(model, tmp_path / "shared.onnx")
    assert equalized(tmp_path / "shared.onnx", data, tmp_path / "e.onnx") == 2


def test_layers_are_kept_by_name(prepared: tuple[Path, Path]) -> None:
    model = load_model(prepared[0])
    every, _ = choose_layers(model, PLAIN)
    some, kept = choose_layers(model, QuantizeOptions(keep=("*blocks.0*",), ends=True))
    assert not any("blocks.0" in name for name in some)
    assert len(some) + len(kept) == len(every) + 2
    with pytest.raises(ConfigError, match="matches no linear layer"):
        choose_layers(model, QuantizeOptions(keep=("nothing",)))
    with pytest.raises(ConfigError, match="no linear layer is left"):
        choose_layers(model, QuantizeOptions(keep=("*",)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (QuantizeOptions(to="int4"), "use one of int8, fp8"),
        (QuantizeOptions(method="mse"), "percentile, entropy, minmax"),
        (QuantizeOptions(to="fp8"), "fp8 needs opset 19, the model has 17"),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: QuantizeOptions, said: str, prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        quantize(*prepared, tmp_path / "q.onnx", options)


def test_a_quantized_model_is_no_model_to_quantize(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    quantize(*prepared, tmp_path / "q.onnx", PLAIN)
    with pytest.raises(ConfigError, match="give the float32 model"):
        quantize(tmp_path / "q.onnx", prepared[1], tmp_path / "qq.onnx", PLAIN)


def test_every_step_has_its_row(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = prepared
    quantize(model, data, tmp_path / "q.onnx", PLAIN)
    logits = run(model, {"input": np.load(data)})[0].argmax(-1)
    labels = np.where(np.arange(8) < 6, logits, (logits + 1) % 10)  # the dense model is right six times of eight
    np.savez(tmp_path / "d.npz", input=np.load(data), labels=labels)
    steps = {"dense": model, "int8": tmp_path / "q.onnx"}
    rows = table_of_steps(steps, tmp_path / "d.npz", str(tmp_path / "d.npz"), preprocess="none", batch=4)
    agreement = float((run(tmp_path / "q.onnx", {"input": np.load(data)})[0].argmax(-1) == logits).mean())
    assert [(r["step"], r["agreement"]) for r in rows] == [("dense", 1.0), ("int8", agreement)]
    assert rows[0]["top1"] == 6 / 8


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_tensorrt_builds_what_comes_out(to: str, exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt_rtx")
    from toast_onnx.engines.backend import EngineOptions
    from toast_onnx.engines.build import BuildRequest, build

    model, data, out = exported(zoo.Case("timm-vit", "dynamo-20")), tmp_path / "x.npy", tmp_path / "q.onnx"
    np.save(data, zoo.inputs(model, 8)["input"])
    quantize(model, data, out, QuantizeOptions(to=to, preprocess="none", samples=None, batch=4))
    _, row = table_of_steps({"float": model, to: out}, data, preprocess="none", batch=4)
    assert row["agreement"] > 0.5
    request = BuildRequest("tensorrt-rtx", batch=(1, 2, 4), options=EngineOptions(compute_capabilities=(89,)))
    assert build(out, tmp_path / "q.engine", request)["engine_bytes"] > 1000


def test_layers_are_tried_one_at_a_time(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Each against a model in which every other layer was kept."""
    model, data = prepared
    options = replace(PLAIN, method="minmax", equalize=None, sensitivity=True)
    result = quantize(model, data, tmp_path / "q.onnx", options)
    assert sorted(result.damages) == sorted(result.layers)
    assert list(result.damages.values()) == sorted(result.damages.values(), reverse=True)
    x = {"input": np.load(data)}
    dense = run(model, x)[0].astype(np.float64)
    for layer in (result.layers[1], result.layers[-1]):
        others = tuple(name for name in result.layers if name != layer)
        alone = tmp_path / "alone.onnx"
        quantize(model, data, alone, replace(options, sensitivity=False, keep=others))
        error = np.linalg.norm(run(alone, x)[0] - dense) / np.linalg.norm(dense)
        assert error > 0
        assert result.damages[layer] == pytest.approx(error, rel=1e-3)
