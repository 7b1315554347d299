"""The twin must fail where the rewriting is wrong, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest

from tests import zoo
from tests.matching.tiny import Graph, block
from tests.pruning import UNEVEN, look, prune_file
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ModelError, TwinError
from toast_onnx.matching.study import Study
from toast_onnx.model import Model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.proof import twin as room
from toast_onnx.proof.inputs import twin_inputs
from toast_onnx.proof.precision import to_float32
from toast_onnx.proof.twin import TwinResult, compare_with_twin, padded_twin
from toast_onnx.pruning import Pruned, prune

Exported = Callable[[zoo.Case], Path]


def pruned_tiny(folder: Path, **bends: Any) -> tuple[Study, Pruned]:
    """The tiny block pruned by weights alone, not yet compared."""
    graph, y = block(**bends)
    dense = look(graph.save(folder / "tiny.onnx", y))
    return dense, prune(dense, parse_ratios(UNEVEN), SyntheticStatistics(dense), check=False)


def compare(dense: Study, pruned: Pruned) -> TwinResult:
    """Run the comparison as `prune` does."""
    twin = padded_twin(dense.view, dense.facts, dense.match.blocks, pruned.weights)
    return compare_with_twin(dense.view, twin, pruned.model, dense.match.blocks, pruned.weights, twin_inputs(dense))


def test_the_twin_of_a_right_rewriting_agrees(tmp_path: Path) -> None:
    result = compare(*pruned_tiny(tmp_path))
    assert result.worst < 1e-5
    assert [d.block for d in result.differences] == [0, 0, None]


def test_the_twin_has_the_shapes_of_the_original(tmp_path: Path) -> None:
    dense, pruned = pruned_tiny(tmp_path)
    twin = padded_twin(dense.view, dense.facts, dense.match.blocks, pruned.weights)
    sizes = sorted(tuple(t.dims) for t in twin.proto.graph.initializer if len(t.dims) == 2)
    assert sizes == sorted(tuple(t.dims) for t in dense.view.initializers.values() if len(t.dims) == 2)


@pytest.mark.parametrize("number", range(4))
def test_any_single_wrong_column_is_seen(number: int, tmp_path: Path) -> None:
    """Two columns of one weight change places, as a wrong slice would have it."""
    dense, pruned = pruned_tiny(tmp_path)
    names = [n for n, a in pruned.model.arrays.items() if a.ndim == 2 and a.dtype == np.float32]
    assert len(names) == 4  # qkv, proj, fc1, fc2
    array = pruned.model.arrays[names[number]].copy()
    array[:, [0, 1]] = array[:, [1, 0]]
    pruned.model.arrays[names[number]] = array
    with pytest.raises(TwinError, match=r"first at block 0 .*nothing was written"):
        compare(dense, pruned)


def test_a_wrong_scale_is_seen(tmp_path: Path) -> None:
    dense, pruned = pruned_tiny(tmp_path)
    node = next(n for n in pruned.model.proto.graph.node if n.op_type == "Softmax")
    node.attribute.remove(node.attribute[0])
    node.attribute.append(onnx.helper.make_attribute("axis", 2))
    with pytest.raises(TwinError, match="block 0"):
        compare(dense, pruned)


def test_a_branch_that_layer_scale_hides_is_still_seen(tmp_path: Path) -> None:
    """At 1e-6 of the stream no output would show it: branches are compared before the scale."""

    def scale(graph: Graph, name: str) -> str:
        return graph.add("Mul", name, graph.constant(np.full(8, 1e-6), np.float32))

    dense, pruned = pruned_tiny(tmp_path, branch=scale, ffn=scale)
    compare(dense, pruned)
    name = next(n for n, a in pruned.model.arrays.items() if a.shape == (8, 8))  # fc2: half of 16 units
    pruned.model.arrays[name] = pruned.model.arrays[name][::-1].copy()
    with pytest.raises(TwinError, match="block 0"):
        compare(dense, pruned)


@pytest.mark.parametrize(
    ("want", "got", "relative"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0),
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([np.inf, 2.0], [np.inf, 2.0], 0),
        ([np.nan, 2.0], [np.nan, 2.0], 0),
        ([np.inf, 2.0], [-np.inf, 2.0], np.inf),
        ([1.0, 2.0], [np.nan, 2.0], np.inf),
        ([1.0, 2.0], [1.0], np.inf),
    ],
)
def test_how_far_two_tensors_are_apart(want: list[float], got: list[float], relative: float) -> None:
    assert room.relative_difference(np.asarray(want, np.float32), np.asarray(got, np.float32)) == relative


def test_a_comparison_of_no_numbers_proves_nothing(tmp_path: Path) -> None:
    """A poisoned norm behind the pruned layers makes both graphs all NaN: they agree, and nothing was compared."""
    dense, pruned = pruned_tiny(tmp_path)
    twin = padded_twin(dense.view, dense.facts, dense.match.blocks, pruned.weights)
    for model in (twin, pruned.model):
        gain = next(n for n in model.proto.graph.node if n.op_type == "LayerNormalization").input[1]
        tensor = next(t for t in model.proto.graph.initializer if t.name == gain)
        model.arrays[gain] = np.full(tuple(tensor.dims), np.nan, np.float32)
    with pytest.raises(TwinError, match="holds no finite number"):
        compare_with_twin(dense.view, twin, pruned.model, dense.match.blocks, pruned.weights, twin_inputs(dense))


def test_a_scale_that_a_half_precision_graph_computes_is_rounded_alike(exported: Exported) -> None:
    """The attention is left alone, so its scale still comes from a shape: the pruned copy would compute it exactly."""
    path = exported(zoo.Case("timm-deit", after="fp16"))
    _, pruned = prune_file(path, {"version": 1, "ffn": {"fc2": 0.5, "score": "l2"}, "compensation": {"kind": "none"}})
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5


def test_half_precision_is_compared_in_float32(tmp_path: Path) -> None:
    """Every kind of place that names a type: weights, interface, Cast, Constant."""
    info, half = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT16
    tensor = onnx.numpy_helper.from_array(np.float16([2.0]), "c")
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Constant", [], ["c"], value=tensor),
            onnx.helper.make_node("Cast", ["i"], ["x"], to=half),
            onnx.helper.make_node("MatMul", ["x", "w"], ["p"]),
            onnx.helper.make_node("Mul", ["p", "c"], ["y"]),
        ],
        "half",
        [info("i", onnx.TensorProto.INT64, [1, 3])],
        [info("y", half, [1, 2])],
        [onnx.numpy_helper.from_array(np.full((3, 2), 1 / 3, np.float16), "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = Model(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "half.onnx")
    single = to_float32(model)
    for t in single.proto.graph.initializer:
        t.CopyFrom(onnx.numpy_helper.from_array(single.arrays[t.name], t.name))
    onnx.checker.check_model(single.proto, full_check=True)
    session = ort.InferenceSession(single.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"i": np.ones((1, 3), np.int64)})
    assert y.dtype == np.float32
    assert np.allclose(y, 2 * 3 * float(np.float16(1 / 3)), rtol=1e-6)
    assert model.proto.graph.output[0].type.tensor_type.elem_type == half  # the original stays
    assert to_float32(single) is not model


def test_norms_that_are_no_numbers_are_refused_before_they_are_used(tmp_path: Path) -> None:
    graph, y = block()
    gain = next(n for n in graph.nodes if n.op_type == "LayerNormalization").input[1]
    graph.weights[gain][3] = np.nan
    dense = look(graph.save(tmp_path / "tiny.onnx", y))
    with pytest.raises(ModelError, match=r"block 0 .*NaN or infinite"):
        SyntheticStatistics(dense).attention(0)
