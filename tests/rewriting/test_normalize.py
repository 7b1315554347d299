"""Spelled-out LayerNorms become the operator, compute the same, and pass the twin; nothing else is taken for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.reference
import onnx.version_converter
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import TensorProto, numpy_helper

from tests import zoo
from tests.pruning import UNEVEN, prune_file, run, worst
from toast_onnx.errors import ConfigError
from toast_onnx.model import Model
from toast_onnx.rewriting.norms import normalize_layer_norms
from toast_onnx_cli.main import main

Exported = Callable[[zoo.Case], Path]
SHAPE = {"x": (2, 5, 8)}
RNG = np.random.default_rng(0)
GAIN, BIAS = RNG.normal(1, 0.2, 8).astype(np.float32), RNG.normal(0, 0.2, 8).astype(np.float32)


def spelled(
    *,
    gain: np.ndarray | None = GAIN,
    bias: np.ndarray | None = BIAS,
    axis: int = -1,
    power: float = 2.0,
    square: str = "Pow",
    divide: str = "Div",
    twice: bool = False,
    opset: int = 18,
    float_type: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """y = LayerNorm(x), x (2, 5, 8), as exporters without the operator write it; epsilon 1e-3.

    Args:
        gain, bias: applied last, absent where None.
        axis, power: anything but -1 and 2 makes it something else than a LayerNorm.
        square: `Pow` or `Mul`.
        divide: `Div` or `Reciprocal`.
        twice: whether x - mean is computed once for the numerator and once for the variance.
    """
    make, dtype = onnx.helper.make_node, onnx.helper.tensor_dtype_to_np_dtype(float_type)
    weights = {"eps": np.array(1e-3), "two": np.array(power), "g": gain, "b": bias}
    initializers = [numpy_helper.from_array(v.astype(dtype), k) for k, v in weights.items() if v is not None]
    initializers.append(numpy_helper.from_array(np.array([axis], np.int64), "axes"))
    mean = {"inputs": ["axes"], "attributes": {}} if opset >= 18 else {"inputs": [], "attributes": {"axes": [axis]}}
    centred = "d2" if twice else "d"
    nodes = [
        make("ReduceMean", ["x", *mean["inputs"]], ["m"], **mean["attributes"]),
        make("Sub", ["x", "m"], ["d"]),
        *([make("Sub", ["x", "m"], ["d2"])] if twice else []),
        make("Pow", [centred, "two"], ["s"]) if square == "Pow" else make("Mul", [centred, centred], ["s"]),
        make("ReduceMean", ["s", *mean["inputs"]], ["v"], **mean["attributes"]),
        make("Add", ["v", "eps"], ["ve"]),
        make("Sqrt", ["ve"], ["sd"]),
    ]
    if divide == "Div":
        nodes.append(make("Div", ["d", "sd"], ["n"]))
    else:
        nodes += [make("Reciprocal", ["sd"], ["inverse"]), make("Mul", ["inverse", "d"], ["n"])]
    last = "n"
    for op, name in (("Mul", "g"), ("Add", "b")):
        if weights[name] is not None:
            nodes.append(make(op, [name, last], [f"{last}{name}"]))
            last = f"{last}{name}"
    nodes.append(make("Identity", [last], ["y"]))
    x, y = (onnx.helper.make_tensor_value_info(n, float_type, ["batch", 5, 8]) for n in "xy")
    graph = onnx.helper.make_graph(nodes, "norm", [x], [y], initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def layer_norm(x: np.ndarray, gain: Any, bias: Any) -> np.ndarray:
    """The definition, in double precision."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-3) * gain + bias


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"opset": 17},
        {"square": "Mul"},
        {"divide": "Reciprocal"},
        {"twice": True},
        {"gain": None},
        {"bias": None},
        {"gain": None, "bias": None},
        {"gain": GAIN.reshape(1, 1, 8), "bias": BIAS.reshape(1, 8)},
        {"axis": 2},
    ],
    ids=str,
)
def test_every_spelling_becomes_one_operator_with_the_same_values(spelling: dict[str, Any]) -> None:
    new, count = normalize_layer_norms(Model(spelled(**spelling), Path("m.onnx")), SHAPE)
    assert count == 1
    assert ops(new.proto) == ["LayerNormalization", "Identity"]
    saved = onnx.ModelProto()
    saved.CopyFrom(new.proto)
    for tensor in saved.graph.initializer:
        if tensor.name in new.arrays:
            tensor.CopyFrom(numpy_helper.from_array(new.arrays[tensor.name], tensor.name))
    onnx.checker.check_model(saved, full_check=True)
    x = RNG.normal(3, 2, SHAPE["x"]).astype(np.float32)
    (y,) = ort.InferenceSession(saved.SerializeToString()).run(None, {"x": x})
    gain, bias = ({"gain": GAIN, "bias": BIAS} | spelling)["gain"], ({"bias": BIAS} | spelling)["bias"]
    want = layer_norm(x, 1 if gain is None else gain.reshape(-1), 0 if bias is None else bias.reshape(-1))
    assert np.abs(y - want).max() < 1e-5


@pytest.mark.parametrize("spelling", [{"axis": 1, "gain": None, "bias": None}, {"power": 3.0}, {"axis": 1}], ids=str)
def test_what_is_no_layer_norm_over_the_last_axis_stays(spelling: dict[str, Any]) -> None:
    model = Model(spelled(**spelling), Path("m.onnx"))
    new, count = normalize_layer_norms(model, SHAPE)
    assert count == 0
    assert new is model


def test_a_gain_that_is_no_weight_stays_outside() -> None:
    """A factor that is computed from the input, of the right shape."""
    proto = spelled(bias=None)
    proto.graph.initializer.remove(next(t for t in proto.graph.initializer if t.name == "g"))
    proto.graph.input.append(onnx.helper.make_tensor_value_info("g", TensorProto.FLOAT, [8]))
    new, _ = normalize_layer_norms(Model(proto, Path("m.onnx")), SHAPE | {"g": (8,)})
    assert ops(new.proto) == ["LayerNormalization", "Mul", "Identity"]


def test_half_precision_no_longer_overflows() -> None:
    """|x - mean| of 300 has a square beyond float16; the operator accumulates in float32."""
    proto = spelled(float_type=TensorProto.FLOAT16)
    x = np.tile(np.array([0, 600], np.float16), 40).reshape(SHAPE["x"])
    want = layer_norm(x, GAIN, BIAS)
    with np.errstate(over="ignore"):  # node by node in float16, as a runtime on a GPU may do it
        (plain,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
    assert not np.abs(plain - want).max() < 0.1
    new, _ = normalize_layer_norms(Model(proto, Path("m.onnx")), SHAPE)
    (y,) = ort.InferenceSession(new.proto.SerializeToString()).run(None, {"x": x})
    assert np.abs(y - want).max() < 1e-2


def raised(case: zoo.Case, exported: Exported, folder: Path) -> Path:
    """An opset-14 export with its norms as they are, at opset 17."""
    path = folder / "model.onnx"
    onnx.save(onnx.version_converter.convert_version(onnx.load(exported(case)), 17), path)
    return path


@pytest.mark.parametrize(
    ("family", "norms"), [("timm-vit", 5), ("hf-vit", 5), pytest.param("hf-bert", 5, marks=pytest.mark.slow)]
)
def test_a_pruned_graph_is_normalized_and_proven(family: str, norms: int, exported: Exported, tmp_path: Path) -> None:
    """The twin keeps the old spelling, so it proves the norms with the widths."""
    path, out = raised(zoo.Case(family, "torchscript-14"), exported, tmp_path), tmp_path / "pruned.onnx"
    _, pruned = prune_file(path, UNEVEN, out, normalize=True)
    assert pruned.normalized == norms
    assert pruned.twin is not None
    assert 0 < pruned.twin.worst < 1e-4
    written = ops(onnx.load(out))
    assert written.count("LayerNormalization") == norms
    assert "ReduceMean" not in written
    assert "Pow" not in written
    plain = tmp_path / "plain.onnx"
    prune_file(path, UNEVEN, plain)
    assert "LayerNormalization" not in ops(onnx.load(plain))
    feeds = zoo.inputs(path, 2)
    assert worst(run(out, feeds), run(plain, feeds)) < 1e-5


def test_an_older_opset_is_told_what_to_do(exported: Exported) -> None:
    with pytest.raises(ConfigError, match="has opset 14: export it with opset 17"):
        prune_file(exported(zoo.Case("timm-vit", "torchscript-14")), UNEVEN, normalize=True)


def test_command_says_and_records_it(exported: Exported, tmp_path: Path) -> None:
    path = raised(zoo.Case("timm-vit", "torchscript-14"), exported, tmp_path)
    ratios = tmp_path / "ratios.yaml"
    ratios.write_text("version: 1\nffn: {fc2: 0.5, score: l2}\ncompensation: {kind: none}\n")
    result = CliRunner().invoke(main, ["prune", str(path), "--ratios", str(ratios), "--normalize"])
    assert result.exit_code == 0, result.output
    assert "5 spelled-out norms became LayerNormalization" in result.output
    document = json.loads((tmp_path / "model.pruned.json").read_text())
    assert document["options"]["normalize"] is True
