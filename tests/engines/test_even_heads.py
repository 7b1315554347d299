"""Uneven attention padded with zeros: the same outputs, one width, and an engine where TensorRT refused the node."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from tests import zoo
from tests.engines.test_uneven_attention import SHAPES, save
from tests.pruning import UNEVEN, look, prune_file, run, worst
from toast_onnx.engines import even_heads as room
from toast_onnx.engines.even_heads import even_heads
from toast_onnx.errors import TwinError
from toast_onnx.model import load_model, save_model
from toast_onnx.pruning import even_out

Exported = Callable[[zoo.Case], Path]


@pytest.mark.parametrize(
    ("family", "exporter"),
    [
        ("hf-vit", "dynamo-23"),
        ("timm-vit", "torchscript-17"),
        pytest.param("timm-beit", "dynamo-23", marks=pytest.mark.slow),
        pytest.param("hf-swin", "torchscript-17", marks=pytest.mark.slow),
        pytest.param("hf-dinov2", "dynamo-20", marks=pytest.mark.slow),
    ],
)
def test_zeros_in_the_weights_change_nothing(family: str, exporter: str, exported: Exported, tmp_path: Path) -> None:
    source = exported(zoo.Case(family, exporter))
    _, pruned = prune_file(source, UNEVEN, tmp_path / "uneven.onnx", check=False)
    evened = even_heads(load_model(tmp_path / "uneven.onnx"))
    save_model(evened.model, tmp_path / "even.onnx")
    feeds = zoo.inputs(source, 3)
    assert worst(run(tmp_path / "even.onnx", feeds), run(tmp_path / "uneven.onnx", feeds)) < 1e-6
    attentions = [b.attention for b in look(tmp_path / "even.onnx").match.blocks if b.attention is not None]
    assert len(evened.padded) == len(attentions) > 0
    assert {a.qk_dim for a in attentions} == {a.vo_dim for a in attentions} == {u.size for u in evened.padded}
    assert not evened.left
    assert evened.macs[0] < evened.macs[1]
    kinds = [[n.op_type for n in m.proto.graph.node] for m in (pruned.model, evened.model)]
    assert kinds[0].count("Pad") == kinds[1].count("Pad")  # nothing is padded while the graph runs


@pytest.mark.parametrize("exporter", ["dynamo-18", "dynamo-23"])
def test_what_weights_cannot_carry_is_padded_in_the_graph(exporter: str, exported: Exported, tmp_path: Path) -> None:
    """A rotary embedding would turn the zeros into something else."""
    source = exported(zoo.Case("timm-eva02", exporter))
    prune_file(source, UNEVEN, tmp_path / "uneven.onnx", check=False, skip_unprunable=True)
    evened = even_heads(load_model(tmp_path / "uneven.onnx"))
    save_model(evened.model, tmp_path / "even.onnx")
    feeds = zoo.inputs(source, 3)
    assert worst(run(tmp_path / "even.onnx", feeds), run(tmp_path / "uneven.onnx", feeds)) < 1e-6
    assert len(evened.padded) == 2
    assert not evened.left


@pytest.mark.parametrize(
    ("d_v", "size"), [(6, 16), pytest.param(24, 24, id="wider values"), pytest.param(300, None, id="too wide")]
)
@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}, {"is_causal": 1}])
def test_one_attention_node(d_v: int, size: int | None, attributes: dict[str, float], tmp_path: Path) -> None:
    path = save(tmp_path, d_v, **attributes)
    evened = even_heads(load_model(path))
    save_model(evened.model, tmp_path / "even.onnx")
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal((*s[:3], d_v if n == "v" else s[3])).astype(np.float32) for n, s in SHAPES.items()}
    assert worst(run(tmp_path / "even.onnx", feeds), run(path, feeds)) < 1e-6
    written = onnx.load(tmp_path / "even.onnx")
    (node,) = (n for n in written.graph.node if n.op_type == "Attention")
    shapes = {v.name: v for v in (*onnx.shape_inference.infer_shapes(written).graph.value_info, *written.graph.input)}
    if size is None:
        assert not evened.padded
        assert len(evened.left) == 1
    else:
        assert {shapes[n].type.tensor_type.shape.dim[3].dim_value for n in node.input[:3]} == {size}


def test_pruning_for_tensorrt_is_proven(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = prune_file(exported(zoo.Case("timm-vit")), UNEVEN, check=False)
    after, evened = even_out(dense, pruned)
    assert after.model is evened.model
    assert len(evened.padded) == 2
    ones = partial(np.pad, constant_values=1)
    monkeypatch.setattr(room, "np", SimpleNamespace(**{**vars(np), "pad": ones}))
    with pytest.raises(TwinError):
        even_out(dense, pruned)
