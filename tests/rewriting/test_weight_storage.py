"""How a graph stores its weights is no matter: in Constant nodes, transposed by a node, or once for several blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from tests import zoo
from tests.pruning import UNEVEN, look, prune_file, run, worst

Exported = Callable[[zoo.Case], Path]
#: One packed QKV layer, three separate layers, and layers spelled Gemm.
FAMILIES = ["timm-vit", "hf-vit", pytest.param("torchvision-vit", marks=pytest.mark.slow)]


def as_constants(graph: onnx.GraphProto) -> None:
    """Every weight becomes the value of a Constant node."""
    nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in graph.initializer]
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.node.extend(nodes)


def as_transposes(graph: onnx.GraphProto) -> None:
    """Every matrix is stored transposed and turned back by a node."""
    turned = []
    for tensor in graph.initializer:
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT:
            name, matrix = tensor.name, onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(matrix.T), f"{name}.stored"))
            turned.append(onnx.helper.make_node("Transpose", [tensor.name], [name], name=f"{name}/turned", perm=[1, 0]))
    nodes = [*turned, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def share(graph: onnx.GraphProto) -> list[str]:
    """Let nodes of the same size and of names that differ in numbers alone read one weight; returns the names."""
    weights = {t.name: t for t in graph.initializer}
    first: dict[tuple[str, int, tuple[int, ...]], str] = {}
    shared = []
    for node in graph.node:
        for k, name in enumerate(node.input):
            if name in weights and weights[name].dims:
                common = first.setdefault((re.sub(r"\d+", "#", node.name), k, tuple(weights[name].dims)), name)
                if common != name:
                    node.input[k] = common
                    shared.append(common)
    return shared


def own_copies(graph: onnx.GraphProto) -> None:
    """Give every reader of a weight its own copy."""
    weights = {t.name: t for t in graph.initializer}
    seen: set[str] = set()
    for i, node in enumerate(graph.node):
        for k, name in enumerate(node.input):
            if name in weights and name in seen:
                copy = graph.initializer.add()
                copy.CopyFrom(weights[name])
                copy.name = node.input[k] = f"{name}.{i}.{k}"
            seen.add(name)


def stored(source: Path, target: Path, change: Callable[[onnx.GraphProto], Any]) -> Path:
    """A copy of a model file with its graph changed."""
    proto = onnx.load(source)
    change(proto.graph)
    onnx.save(proto, target)
    return target


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [as_constants, as_transposes])
def test_pruned_alike_however_stored(
    change: Callable[[onnx.GraphProto], None], family: str, exported: Exported, tmp_path: Path
) -> None:
    plain = exported(zoo.Case(family))
    path = stored(plain, tmp_path / "stored.onnx", change)
    feeds = zoo.inputs(plain, 2)
    assert worst(run(path, feeds), run(plain, feeds)) < 1e-5
    _, pruned = prune_file(path, UNEVEN, tmp_path / "a.onnx")
    prune_file(plain, UNEVEN, tmp_path / "b.onnx", check=False)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    assert worst(run(tmp_path / "a.onnx", feeds), run(tmp_path / "b.onnx", feeds)) < 1e-5
    blocks = look(tmp_path / "a.onnx").match.blocks
    assert [(b.attention.qk_dim, b.attention.vo_dim, b.ffn.width) for b in blocks] == [(32, 48, 384)] * 2
    # no weight of the old size stays behind
    assert (tmp_path / "a.onnx").stat().st_size < 1.05 * (tmp_path / "b.onnx").stat().st_size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["first", "both"])
def test_blocks_that_share_weights_get_their_own(which: str, family: str, exported: Exported, tmp_path: Path) -> None:
    """Against the same model in which every layer had its own copy to begin with."""
    names: list[str] = []
    shared = stored(exported(zoo.Case(family)), tmp_path / "shared.onnx", lambda g: names.extend(share(g)))
    apart = stored(shared, tmp_path / "apart.onnx", own_copies)
    sizes = {t.name: tuple(t.dims) for t in onnx.load(shared).graph.initializer}
    assert sum(len(sizes[name]) == 2 for name in names) >= 4  # all of a block's layers
    feeds = zoo.inputs(shared, 2)
    assert worst(run(shared, feeds), run(apart, feeds)) < 1e-6
    other = {"attention": {"qk": 0.25, "vo": 0.75}, "ffn": {"fc1": 0, "fc2": 0.25}}
    if which == "first":
        other = {"attention": {"qk": 0, "vo": 0}, "ffn": {"fc1": 0, "fc2": 0}}
    ratios = UNEVEN | {"blocks": {1: other}}
    _, pruned = prune_file(shared, ratios, tmp_path / "a.onnx", split_shared=True)
    prune_file(apart, ratios, tmp_path / "b.onnx", check=False)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    assert worst(run(tmp_path / "a.onnx", feeds), run(tmp_path / "b.onnx", feeds)) < 1e-5
    first, second = look(tmp_path / "a.onnx").match.blocks
    assert (first.attention.qk_dim, first.ffn.width) == (32, 384)
    assert (second.attention.qk_dim, second.ffn.width) == ((64, 768) if which == "first" else (48, 576))
    if which == "first":  # block 1 goes on reading what both had read
        old, new = (
            {t.name: t.SerializeToString() for t in onnx.load(p).graph.initializer}
            for p in (shared, tmp_path / "a.onnx")
        )
        kept = [n for n in dict.fromkeys(names) if len(sizes[n]) == 2]
        assert [n for n in kept if new.get(n) != old[n]] == []
