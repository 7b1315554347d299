"""Attention nodes with d_qk != d_v, written out for TensorRT, against ONNX Runtime on the fused ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from tests import zoo
from tests.pruning import UNEVEN, prune_file, run, worst
from toast_onnx.engines.uneven_attention import spell_out_uneven
from toast_onnx.model import load_model, save_model

Exported = Callable[[zoo.Case], Path]


@pytest.mark.parametrize("family", ["hf-vit", pytest.param("timm-beit", marks=pytest.mark.slow)])
def test_a_pruned_export_computes_the_same_without_fused_nodes(family: str, exported: Exported, tmp_path: Path) -> None:
    source = exported(zoo.Case(family, "dynamo-23"))
    prune_file(source, UNEVEN, tmp_path / "uneven.onnx", check=False)
    fused = load_model(tmp_path / "uneven.onnx")
    spelled, count = spell_out_uneven(fused)
    nodes = [node.op_type for node in spelled.proto.graph.node]
    assert count == sum(node.op_type == "Attention" for node in fused.proto.graph.node) > 0
    assert "Attention" not in nodes
    assert nodes.count("Softmax") == count
    save_model(spelled, tmp_path / "spelled.onnx")
    feeds = zoo.inputs(source, 3)
    assert worst(run(tmp_path / "spelled.onnx", feeds), run(tmp_path / "uneven.onnx", feeds)) < 1e-5


@pytest.mark.parametrize("kind", [None, np.bool_, np.float32, np.float16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_masks_and_scales(kind: type | None, scale: float | None, tmp_path: Path) -> None:
    path = save(tmp_path, d_v=6, mask=kind, **({} if scale is None else {"scale": scale}))
    spelled, count = spell_out_uneven(load_model(path))
    assert count == 1
    save_model(spelled, tmp_path / "spelled.onnx")
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    feeds["v"] = feeds["v"][..., :6]
    if kind is np.bool_:
        feeds["mask"] = rng.random((5, 7)) < 0.7
        feeds["mask"][3] = False  # a query that sees nothing
    elif kind is not None:
        feeds["mask"] = rng.standard_normal((5, 7)).astype(kind)
    assert worst(run(tmp_path / "spelled.onnx", feeds), run(path, feeds)) < 1e-5


@pytest.mark.parametrize(
    "what", [{"d_v": 8}, {"d_v": 6, "is_causal": 1}, {"d_v": 6, "softcap": 2.0}, {"d_v": 6, "scale": -0.3}]
)
def test_what_is_even_or_of_another_form_stays(what: dict[str, float], tmp_path: Path) -> None:
    model = load_model(save(tmp_path, **what))
    assert spell_out_uneven(model) == (model, 0)


SHAPES = {"q": (2, 3, 5, 8), "k": (2, 3, 7, 8), "v": (2, 3, 7, 8)}


def save(folder: Path, d_v: int, mask: type | None = None, **attributes: float) -> Path:
    """One Attention node on (batch, heads, tokens, d) operands."""
    info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    inputs = [info(n, kind, (*s[:3], d_v if n == "v" else s[3])) for n, s in SHAPES.items()]
    if mask is not None:
        inputs.append(info("mask", onnx.helper.np_dtype_to_tensor_dtype(np.dtype(mask)), (5, 7)))
    node = onnx.helper.make_node("Attention", [i.name for i in inputs], ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "g", inputs, [info("y", kind, (2, 3, 5, d_v))])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(proto, folder / "fused.onnx")
    return folder / "fused.onnx"
