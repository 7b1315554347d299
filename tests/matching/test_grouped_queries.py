"""Grouped queries: fewer heads of keys and values than of queries, repeated by nodes or inside a fused node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from torch import nn

from tests.matching.small_exports import EXPORTERS, export, feeds, randomised
from tests.pruning import UNEVEN, look, prune_file, run, worst
from toast_onnx.choosing.groups import apart, members, stacked
from toast_onnx.importance.moments import Moments
from toast_onnx.matching.blocks import Attention
from toast_onnx.matching.study import Study
from toast_onnx.model import save_model
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx.solving.vo import solve_vo_subspace
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics

CASE = Path(__file__).parents[1] / "cases" / "graphs" / "gqa.onnx"
WIDTH, HEADS, SHARED, DIM, TOKENS = 16, 4, 2, 8, 5
FORMS = {"subspace": {"select": "subspace"}, "index": {"select": "index", "score": "second-order"}}


class Grouped(nn.Module):
    """A residual attention whose heads of keys and values are repeated in one of the ways that people write."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.o = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, SHARED * DIM), nn.Linear(WIDTH, SHARED * DIM)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("angle", torch.randn(TOKENS, DIM // 2, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).view(b, n, -1, DIM).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.kind == "rotary":
            q, k = (self.turned(t) for t in (q, k))
        k, v = (self.repeated(t) for t in (k, v))
        weights = ((q * DIM**-0.25) @ (k.transpose(-2, -1) * DIM**-0.25)).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).reshape(b, n, HEADS * DIM))

    def turned(self, t: torch.Tensor) -> torch.Tensor:
        cos, sin = (torch.cat([f(self.angle)] * 2, -1) for f in (torch.cos, torch.sin))
        return t * cos + torch.cat([-t[..., DIM // 2 :], t[..., : DIM // 2]], -1) * sin

    def repeated(self, t: torch.Tensor) -> torch.Tensor:
        b, heads, n, d = t.shape
        if self.kind == "gather":  # every second head of the queries, not neighbours
            return t[:, [0, 1] * (HEADS // SHARED)]
        if self.kind == "interleave":
            return t.repeat_interleave(HEADS // SHARED, dim=1)
        return t[:, :, None].expand(b, heads, HEADS // SHARED, n, d).reshape(b, HEADS, n, d)


def by_head(tensor: torch.Tensor) -> torch.Tensor:
    """A view (heads, dim, ...) of a layer's rows."""
    return tensor.view(-1, DIM, *tensor.shape[1:])


def fused(path: Path, rank: int) -> Path:
    """An opset-23 Attention node that holds the repetition."""
    rng = np.random.default_rng(0)
    nodes, weights = [onnx.helper.make_node("LayerNormalization", ["x", "gain", "zero"], ["y"])], {}
    weights |= {"gain": np.ones(WIDTH), "zero": np.zeros(WIDTH)}
    for name, heads in (("q", HEADS), ("k", SHARED), ("v", SHARED)):
        weights |= {f"w{name}": rng.standard_normal((WIDTH, heads * DIM)), f"b{name}": rng.standard_normal(heads * DIM)}
        nodes.append(onnx.helper.make_node("MatMul", ["y", f"w{name}"], [f"{name}0"]))
        nodes.append(onnx.helper.make_node("Add", [f"{name}0", f"b{name}"], [f"{name}1"]))
        if rank == 4:
            weights[f"s{name}"] = np.asarray([0, 0, heads, DIM])
            nodes.append(onnx.helper.make_node("Reshape", [f"{name}1", f"s{name}"], [f"{name}2"]))
            nodes.append(onnx.helper.make_node("Transpose", [f"{name}2"], [f"{name}3"], perm=[0, 2, 1, 3]))
    counts = {} if rank == 4 else {"q_num_heads": HEADS, "kv_num_heads": SHARED}
    operands = [f"{name}{3 if rank == 4 else 1}" for name in "qkv"]
    nodes.append(onnx.helper.make_node("Attention", operands, ["c"], name="attention", **counts))
    merged = "c"
    if rank == 4:
        weights["merge"] = np.asarray([0, 0, HEADS * DIM])
        nodes.append(onnx.helper.make_node("Transpose", ["c"], ["c1"], perm=[0, 2, 1, 3]))
        nodes.append(onnx.helper.make_node("Reshape", ["c1", "merge"], ["c2"]))
        merged = "c2"
    weights["wo"] = rng.standard_normal((HEADS * DIM, WIDTH))
    nodes += [onnx.helper.make_node("MatMul", [merged, "wo"], ["o"]), onnx.helper.make_node("Add", ["x", "o"], ["z"])]
    info = [onnx.helper.make_tensor_value_info(n, 1, ["batch", TOKENS, WIDTH]) for n in "xz"]
    initializers = [
        onnx.numpy_helper.from_array(v.astype(np.int64 if v.dtype.kind == "i" else np.float32), k)
        for k, v in weights.items()
    ]
    graph = onnx.helper.make_graph(nodes, "grouped", info[:1], info[1:], initializers)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def contrib(path: Path, dim: int) -> Path:
    """A GroupQueryAttention node, causal, for a batch of two."""
    rng = np.random.default_rng(0)
    nodes, weights = [onnx.helper.make_node("LayerNormalization", ["x", "gain", "zero"], ["y"])], {}
    weights |= {"gain": np.ones(WIDTH), "zero": np.zeros(WIDTH)}
    for name, heads in (("q", HEADS), ("k", SHARED), ("v", SHARED)):
        weights[f"w{name}"] = rng.standard_normal((WIDTH, heads * dim))
        nodes.append(onnx.helper.make_node("MatMul", ["y", f"w{name}"], [name]))
    counts = {"num_heads": HEADS, "kv_num_heads": SHARED}
    operands, made = ["q", "k", "v", "", "", "lengths", "total"], ["c", "present_key", "present_value"]
    nodes.append(onnx.helper.make_node("GroupQueryAttention", operands, made, domain="com.microsoft", **counts))
    weights["wo"] = rng.standard_normal((HEADS * dim, WIDTH))
    nodes += [onnx.helper.make_node("MatMul", ["c", "wo"], ["o"]), onnx.helper.make_node("Add", ["x", "o"], ["z"])]
    info = [onnx.helper.make_tensor_value_info(n, 1, [2, TOKENS, WIDTH]) for n in "xz"]
    initializers = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    initializers += [
        onnx.numpy_helper.from_array(np.full(2, TOKENS - 1, np.int32), "lengths"),
        onnx.numpy_helper.from_array(np.asarray([TOKENS], np.int32), "total"),
    ]
    graph = onnx.helper.make_graph(nodes, "grouped", info[:1], info[1:], initializers)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def attention_of(study: Study) -> Attention:
    (found,) = (block.attention for block in study.match.blocks)
    assert found is not None
    return found


def measured(study: Study, folder: Path) -> CalibratedStatistics:
    np.savez(folder / "x.npz", **feeds(128, TOKENS, WIDTH))
    calibrate(study, folder / "x.npz", folder / "s.npz", everything(study), CalibrationOptions(threads=1))
    return CalibratedStatistics(study, folder / "s.npz")


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", ["expand", "gather", pytest.param("interleave", marks=pytest.mark.slow), "rotary"])
def test_dead_dimensions_of_a_group_go(kind: str, exporter: str, tmp_path: Path) -> None:
    """Which dimensions are dead differs from group to group; with rotary embedding pairs of all heads are."""
    module = randomised(Grouped(kind))
    assert isinstance(module, Grouped)
    owner = [0, 1, 0, 1] if kind == "gather" else [0, 0, 1, 1]
    dead = [[1, 2, 5, 6], [1, 2, 5, 6] if kind == "rotary" else [0, 3, 4, 5]]
    with torch.no_grad():
        for layer in (module.k, module.v):
            for tensor in (layer.weight, layer.bias):
                for group, dims in enumerate(dead):
                    by_head(tensor)[group, dims] = 0
        for head, group in enumerate(owner):
            for tensor in (module.q.weight, module.q.bias):
                by_head(tensor)[head, dead[group]] = 0
            module.o.weight.view(WIDTH, HEADS, DIM)[:, head, dead[group]] = 0
    path = export(module, torch.randn(1, TOKENS, WIDTH), tmp_path / "dense.onnx", exporter)
    half = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "l2"}, "align": 1}
    dense, pruned = prune_file(path, half | {"compensation": {"kind": "none"}}, tmp_path / "pruned.onnx")
    found = attention_of(dense)
    assert (found.num_heads, found.qk_reason, found.vo_reason) == (HEADS, None, None)
    assert found.qk_groups is not None
    assert found.qk_groups.tolist() == owner
    assert pruned.twin is not None
    given = feeds(3, TOKENS, WIDTH)
    assert worst(run(tmp_path / "pruned.onnx", given), run(path, given)) < 1e-5
    after = attention_of(look(tmp_path / "pruned.onnx"))
    assert (after.qk_dim, after.vo_dim, after.qk_reason) == (DIM // 2, DIM // 2, None)
    assert after.k is not None
    assert after.k.layout.channels.shape == (SHARED, DIM // 2)


@pytest.mark.parametrize("select", FORMS)
def test_a_group_of_low_rank_loses_nothing(select: str, tmp_path: Path) -> None:
    """Keys of a head span half of their dimensions, and so do the values: their queries need nothing of the rest."""
    module = randomised(Grouped("expand"))
    assert isinstance(module, Grouped)
    with torch.no_grad():
        for layer in (module.q, module.k, module.v)[0 if select == "index" else 1 :]:
            heads = by_head(layer.weight).shape[0]
            mixes = torch.randn(SHARED, DIM // 2, DIM // 2, generator=torch.Generator().manual_seed(1)) * 0.5
            for head in range(heads):
                mix = mixes[head * SHARED // heads]  # the same relation for all queries of a group
                for tensor in (layer.weight, layer.bias):
                    rows = by_head(tensor)[head]
                    rows[DIM // 2 :] = (mix @ rows[: DIM // 2].reshape(DIM // 2, -1)).view_as(rows[DIM // 2 :])
    path = export(module, torch.randn(1, TOKENS, WIDTH), tmp_path / "dense.onnx")
    dense = look(path)
    ratios = parse_ratios({"version": 1, "attention": {"qk": 0.5, "vo": 0.5} | FORMS[select], "align": 1})
    pruned = prune(dense, ratios, measured(dense, tmp_path))
    save_model(pruned.model, tmp_path / "pruned.onnx")
    given = feeds(3, TOKENS, WIDTH)
    assert worst(run(tmp_path / "pruned.onnx", given), run(path, given)) < 1e-4
    assert pruned.errors[0]["qk"] < 1e-3


@pytest.mark.parametrize("form", [*FORMS.values(), {"select": "index", "score": "gm"}], ids=[*FORMS, "gm"])
@pytest.mark.parametrize("rank", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_fused_nodes_stay_fused(rank: int, form: dict[str, str], tmp_path: Path) -> None:
    path = fused(tmp_path / "dense.onnx", rank)
    dense = look(path)
    ratios = parse_ratios({"version": 1, "attention": {"qk": 0.5, "vo": 0.25} | form, "align": 1})
    pruned = prune(dense, ratios, measured(dense, tmp_path))
    save_model(pruned.model, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    small = look(tmp_path / "pruned.onnx")
    assert "Attention" in {node.op_type for node in small.source.proto.graph.node}
    after = attention_of(small)
    assert (after.num_heads, after.qk_dim, after.vo_dim) == (HEADS, DIM // 2, DIM * 3 // 4)


def test_a_contrib_node_keeps_one_width_for_queries_and_values(tmp_path: Path) -> None:
    """ONNX Runtime's GroupQueryAttention takes equal widths in multiples of 8 alone: the wider wish decides."""
    path = contrib(tmp_path / "dense.onnx", 32)
    ratios = {"version": 1, "attention": {"qk": 0.75, "vo": 0.4}, "align": 1}
    dense, pruned = prune_file(path, ratios, tmp_path / "pruned.onnx")
    found = attention_of(dense)
    assert (found.num_heads, found.qk_dim, found.vo_dim, found.qk_reason) == (HEADS, 32, 32, None)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    small = look(tmp_path / "pruned.onnx")
    after = attention_of(small)
    assert (after.core.kind, after.num_heads, after.qk_dim, after.vo_dim) == ("gqa", HEADS, 24, 24)
    projections, products = TOKENS * WIDTH * 12 * 24, TOKENS**2 * HEADS * 2 * 24
    assert graph_macs(small.view, small.counted) == 2 * (projections + products)


def test_a_width_that_is_held_by_the_other_one_is_said(tmp_path: Path) -> None:
    path = contrib(tmp_path / "dense.onnx", 32)
    for given in ({"qk": 0.5}, {"vo": 0.5}):
        _, pruned = prune_file(path, {"version": 1, "attention": given, "align": 1})
        (note,) = [note for note in pruned.notes if "keep one width" in note]
        assert note.startswith("Q/K and V/Proj of block 0 keep one width (their fused node takes no other)")
    _, both = prune_file(path, {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "align": 1})
    assert not [note for note in both.notes if "keep one width" in note]


@pytest.mark.parametrize("rank", [3, 4])
def test_what_a_fused_node_repeats_is_measured_as_separate_nodes_are(rank: int, tmp_path: Path) -> None:
    dense = look(fused(tmp_path / "dense.onnx", rank))
    found = measured(dense, tmp_path).attention(0)
    x = feeds(128, TOKENS, WIDTH)["x"].astype(np.float64)
    arrays = {i.name: onnx.numpy_helper.to_array(i).astype(np.float64) for i in dense.source.proto.graph.initializer}
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    k = (y @ arrays["wk"] + arrays["bk"]).reshape(*y.shape[:2], SHARED, DIM)
    k = k - k.mean(axis=1, keepdims=True)
    wanted = np.einsum("bnhd,bnhe->hde", k, k) / (y.shape[0] * y.shape[1])
    np.testing.assert_allclose(found.s_kk, wanted[[0, 0, 1, 1]], rtol=1e-3, atol=1e-4)


def test_the_exported_encoder_is_pruned_in_all_parts_but_heads(tmp_path: Path) -> None:
    dense, pruned = prune_file(CASE, UNEVEN, tmp_path / "pruned.onnx")
    for block in dense.match.blocks:
        assert block.attention is not None
        assert (block.attention.qk_reason, block.attention.vo_reason) == (None, None)
        assert "share" in str(block.attention.heads_reason)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    assert (tmp_path / "pruned.onnx").stat().st_size < CASE.stat().st_size


def test_stacked_heads_come_apart_again() -> None:
    w, groups = np.random.default_rng(0).standard_normal((3, 6, 4)), np.asarray([0, 1, 2, 2, 1, 0])
    assert members(groups).tolist() == [[0, 5], [1, 4], [2, 3]]
    np.testing.assert_array_equal(stacked(w, groups)[:3], w[:, [0, 1, 2]])
    np.testing.assert_array_equal(apart(stacked(w, groups), groups), w)


def test_shared_values_have_one_basis() -> None:
    rng = np.random.default_rng(0)
    wv, wo = rng.standard_normal((5, 2, 4)), rng.standard_normal((4, 4, 5))
    mix = rng.standard_normal((16, 16))
    groups = np.asarray([0, 0, 1, 1])
    context = Moments.known(np.zeros(16), mix @ mix.T)
    found = solve_vo_subspace(wv[:, groups], np.zeros((4, 4)), wo, np.zeros(5), context, 2, groups=groups)
    np.testing.assert_array_equal(found.wv[:, 0], found.wv[:, 1])
    np.testing.assert_array_equal(found.wv[:, 2], found.wv[:, 3])
