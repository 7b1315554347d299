"""Queries that no input reaches: learned ones, as pooling heads, decoders and class tokens have them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional

from tests.matching.small_exports import EXPORTERS, export, feeds, randomised
from tests.pruning import look, prune_file, run, worst
from tests.zoo.aftermaths import AFTERMATHS
from tests.zoo.described import Case, Subject
from tests.zoo.exporting import _export
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_cli.main import main

WIDTH, HEADS, DIM, TOKENS, QUERIES = 32, 4, 8, 7, 3
HALF = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "l2"}, "align": 1}
KINDS = ("linear", "raw", "mixed", "einsum", "fused")


class Pool(nn.Module):
    """A few learned queries attend to all tokens; dead dimensions where asked for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.learned = nn.LayerNorm(WIDTH), nn.Parameter(torch.empty(1, QUERIES, WIDTH))
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Linear(HEADS, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.learned if self.kind == "raw" else self.q(self.learned)
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (made, *self.kv(self.norm(x)).chunk(2, -1)))
        if self.kind == "fused":
            context = functional.scaled_dot_product_attention(q.expand(x.shape[0], -1, -1, -1), k, v)
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k) if self.kind == "einsum" else q @ k.transpose(-2, -1)
            scores = scores * DIM**-0.5
            if self.kind == "mixed":
                scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            context = scores.softmax(-1) @ v
        return self.proj(context.transpose(1, 2).flatten(2))


def pool(kind: str, dead: bool) -> Pool:
    module = randomised(Pool(kind))
    assert isinstance(module, Pool)
    if dead:
        with torch.no_grad():
            queries = module.learned[0].T if kind == "raw" else module.q.weight
            for rows in (queries, module.q.bias, module.kv.weight, module.kv.bias, module.proj.weight.T):
                rows.unflatten(0, (-1, DIM))[:, 1::2] = 0
    return module


def saved(kind: str, path: Path, exporter: str = "torchscript-17", dead: bool = True, batch: str = "static") -> Path:
    subject = Subject(pool(kind, dead).eval(), {"x": torch.randn(1, TOKENS, WIDTH)})
    _export(Case("", exporter, batch), subject, subject.module, path)
    return path


def ranks(rows: np.ndarray) -> list[int]:
    return [int(np.linalg.matrix_rank(h)) for h in rows]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_learned_queries_lose_dimensions_with_their_keys(kind: str, exporter: str, tmp_path: Path) -> None:
    path, out = saved(kind, tmp_path / "model.onnx", exporter), tmp_path / "pruned.onnx"
    dense, pruned = prune_file(path, HALF, out)
    (block,) = dense.match.blocks
    assert dense.match.declined == {}
    assert block.attention is not None
    assert (block.attention.qk_reason, block.attention.vo_reason) == (None, None)
    assert "queries" not in block.name
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    (after,) = look(out).match.blocks
    assert after.attention is not None
    assert (after.attention.qk_dim, after.attention.vo_dim) == (DIM // 2, DIM // 2)
    given = feeds(1, TOKENS, WIDTH)
    assert worst(run(out, given), run(path, given)) < 1e-5
    assert out.stat().st_size < path.stat().st_size


@pytest.mark.parametrize("kind", ["linear", "raw"])
def test_one_constant_serves_any_batch(kind: str, tmp_path: Path) -> None:
    path, out = saved(kind, tmp_path / "model.onnx", batch="dynamic"), tmp_path / "pruned.onnx"
    prune_file(path, HALF, out)
    for batch in (1, 3):
        given = feeds(batch, TOKENS, WIDTH)
        assert worst(run(out, given), run(path, given)) < 1e-5


@pytest.mark.parametrize("after", ["ort-basic", "onnxsim"])
def test_queries_that_were_folded_into_one_constant(after: str, tmp_path: Path) -> None:
    saved("linear", tmp_path / "as_exported.onnx")
    path, out = tmp_path / "model.onnx", tmp_path / "pruned.onnx"
    AFTERMATHS[after](tmp_path / "as_exported.onnx", path)
    _, pruned = prune_file(path, HALF, out)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    given = feeds(1, TOKENS, WIDTH)
    assert worst(run(out, given), run(path, given)) < 1e-5
    assert [1, HEADS, QUERIES, DIM // 2] in [list(t.dims) for t in onnx.load(out).graph.initializer]


class Batched(nn.Module):
    """PyTorch's own attention with learned queries, repeated for a batch of two that the graph fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.empty(1, QUERIES, WIDTH))
        self.attn, self.norm = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x)
        result: torch.Tensor = self.attn(self.learned.repeat(2, 1, 1), tokens, tokens)[0]
        return result


def test_heads_that_lie_folded_in_a_fixed_batch(tmp_path: Path) -> None:
    module = randomised(Batched())
    assert isinstance(module, Batched)
    with torch.no_grad():
        packed = module.attn.in_proj_weight.unflatten(0, (3, HEADS, DIM))
        packed[:, :, 1::2] = 0
        module.attn.in_proj_bias.unflatten(0, (3, HEADS, DIM))[:, :, 1::2] = 0
        module.attn.out_proj.weight.T.unflatten(0, (HEADS, DIM))[:, 1::2] = 0
    path, out = tmp_path / "model.onnx", tmp_path / "pruned.onnx"
    subject = Subject(module.eval(), {"x": torch.randn(2, TOKENS, WIDTH)})
    _export(Case("", batch="static"), subject, module, path)
    dense, _ = prune_file(path, HALF, out)
    (block,) = dense.match.blocks
    assert block.attention is not None
    assert block.attention.num_heads == HEADS
    given = feeds(2, TOKENS, WIDTH)
    assert worst(run(out, given), run(path, given)) < 1e-5


def test_whole_heads_go_where_their_context_is_never_read(tmp_path: Path) -> None:
    module = pool("linear", dead=False)
    with torch.no_grad():
        module.proj.weight[:, DIM : 2 * DIM] = 0
    path, out = tmp_path / "model.onnx", tmp_path / "pruned.onnx"
    _export(Case("", batch="static"), Subject(module.eval(), {"x": torch.randn(1, TOKENS, WIDTH)}), module, path)
    ratios: dict[str, Any] = {"version": 1, "attention": {"heads": 0.3}, "compensation": {"kind": "none"}}
    _, pruned = prune_file(path, ratios, out)
    assert pruned.twin is not None
    given = feeds(1, TOKENS, WIDTH)
    assert worst(run(out, given), run(path, given)) < 1e-5
    constants = [list(t.dims) for t in onnx.load(out).graph.initializer if QUERIES in t.dims and len(t.dims) > 1]
    assert constants == [[1, HEADS - 1, QUERIES, DIM]]


def test_bases_follow_the_queries_themselves(tmp_path: Path) -> None:
    """The best rank of Q K^T by the moments of the constant: with as many dimensions as queries nothing is lost."""
    path, out = saved("linear", tmp_path / "model.onnx", dead=False), tmp_path / "pruned.onnx"
    dense = look(path)
    (block,) = dense.match.blocks
    assert block.attention is not None
    module = pool("linear", dead=False)
    with torch.no_grad():
        q = module.q(module.learned)[0].unflatten(-1, (HEADS, DIM)).double().numpy()  # (queries, heads, dim)
    moments = np.einsum("nhd,nhe->hde", q, q)
    found = SyntheticStatistics(dense).attention(0).s_qq
    assert np.abs(found - moments).max() < 1e-5 * np.abs(moments).max()
    np.savez(tmp_path / "x.npz", **feeds(8, TOKENS, WIDTH))
    file = tmp_path / "s.npz"
    calibrate(dense, tmp_path / "x.npz", file, everything(dense), CalibrationOptions(threads=1))
    measured = CalibratedStatistics(dense, file).attention(0).s_qq
    assert np.abs(measured - moments / QUERIES).max() < 1e-5 * np.abs(moments / QUERIES).max()
    prune_file(path, {"version": 1, "attention": {"qk": 0.5}, "align": 1}, out)
    given = feeds(1, TOKENS, WIDTH)
    assert worst(run(out, given), run(path, given)) < 1e-4


def test_what_is_not_pruned_stays_as_it_came(tmp_path: Path) -> None:
    path, out = saved("linear", tmp_path / "model.onnx", dead=False), tmp_path / "pruned.onnx"
    prune_file(path, {"version": 1, "attention": {"vo": 0.5}, "align": 1}, out)
    before, after = (onnx.load(p).graph for p in (path, out))
    weight = next(t for t in before.initializer if t.dims == [WIDTH, WIDTH])
    assert weight.raw_data in [t.raw_data for t in after.initializer]
    learned = next(t for t in before.initializer if list(t.dims) == [1, QUERIES, WIDTH])
    reader = next(n for n in before.node if learned.name in n.input)
    assert reader in after.node
    assert len(after.node) <= len(before.node)


def test_learned_keys_beside_those_of_a_layer_are_named(tmp_path: Path) -> None:
    class Beside(Pool):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.norm(x)
            k, v = (torch.cat([t, self.learned.expand(x.shape[0], -1, -1)], 1) for t in self.kv(tokens).chunk(2, -1))
            q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (self.q(tokens), k, v))
            result: torch.Tensor = self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))
            return result

    found = look(export(randomised(Beside("raw")), torch.randn(1, TOKENS, WIDTH), tmp_path / "model.onnx"))
    (block,) = found.match.blocks
    assert block.attention is not None
    reasons = [str(block.attention.qk_reason), str(block.attention.vo_reason)]
    assert reasons == [f"{part} holds constants besides what a linear layer makes" for part in "KV"]


def test_learned_keys_beside_those_of_a_packed_layer_are_named(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = x + self.attn(x, x, x)[0]
            return result

    found = look(export(randomised(Packed()), torch.randn(1, TOKENS, WIDTH), tmp_path / "model.onnx"))
    (block,) = found.match.blocks
    assert block.attention is not None
    reasons = [str(block.attention.qk_reason), str(block.attention.vo_reason)]
    assert reasons == [f"{part} holds constants besides what a linear layer makes" for part in "KV"]


def test_an_obstacle_of_the_keys_is_named_before_learned_queries(tmp_path: Path) -> None:
    class Normed(Pool):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                t.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
                for t in (self.learned, *self.kv(self.norm(x)).chunk(2, -1))
            )
            scores = q @ functional.layer_norm(k, (DIM,)).transpose(-2, -1)
            result: torch.Tensor = self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            return result

    found = look(export(randomised(Normed("raw")), torch.randn(1, TOKENS, WIDTH), tmp_path / "model.onnx"))
    (block,) = found.match.blocks
    assert block.attention is not None
    assert str(block.attention.qk_reason).startswith("K passes through")


def test_one_query_for_all_heads_is_named_and_left(tmp_path: Path) -> None:
    class Shared(Pool):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.kv(self.norm(x)).chunk(2, -1))
            scores = self.learned[:, None, :, :DIM] @ k.transpose(-2, -1)
            return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    found = look(export(randomised(Shared("raw")), torch.randn(1, TOKENS, WIDTH), tmp_path / "model.onnx"))
    (block,) = found.match.blocks
    assert block.attention is not None
    assert block.attention.vo_reason is None
    assert "learned queries" in str(block.attention.qk_reason)


def test_a_plan_counts_the_layer_that_made_the_queries(tmp_path: Path) -> None:
    """Its weights go with the first dimension, as the queries are a constant then."""
    path = saved("linear", tmp_path / "model.onnx", dead=False)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((8, TOKENS, WIDTH), np.float32))
    plan = ["plan", str(path), "--data", str(tmp_path / "x.npz"), "--params", "0.8", "--parts", "qk,vo", "--json"]
    planned = CliRunner().invoke(main, [*plan, "-o", str(tmp_path / "r.yaml")])
    assert planned.exit_code == 0, planned.output
    reached = json.loads(planned.stdout)["reached"]["params"]
    written = ["prune", str(path), "--ratios", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "small.onnx")]
    assert CliRunner().invoke(main, written).exit_code == 0
    counts = [
        sum(int(np.prod(t.dims)) for t in onnx.load(p).graph.initializer if t.data_type == 1 and prod(t.dims) > 1)
        for p in (path, tmp_path / "small.onnx")
    ]
    assert reached["share"] == pytest.approx(counts[1] / counts[0], abs=1e-3)
