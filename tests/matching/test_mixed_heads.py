"""Between the scores and the values: talking heads, re-attention, differential attention, sinks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.matching.small_exports import EXPORTERS, export, feeds, randomised
from tests.pruning import look, prune_file, run, worst
from tests.zoo.aftermaths import AFTERMATHS
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx.tokens.points import study_tokens
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics

WIDTH, HEADS, DIM, TOKENS = 24, 3, 8, 5
HALF = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "l2"}, "align": 1}
KINDS = ("before", "after", "both", "einsum", "normed", "differential", "sink")


class Mixed(nn.Module):
    """A residual attention whose heads meet in one of the ways that people write; dead dimensions where asked for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.times = kind, 2 if kind == "differential" else 1
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, (2 * self.times + 1) * WIDTH)
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS, bias=False)
        self.heads_norm, self.proj = nn.LayerNorm(HEADS), nn.Linear(WIDTH, WIDTH)
        self.sink = nn.Parameter(torch.empty(HEADS, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm(x)).split([WIDTH * self.times, WIDTH * self.times, WIDTH], -1)
        q, k, v = (t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in parts)
        scores = q @ k.transpose(-2, -1) * DIM**-0.5
        if self.kind in ("before", "both"):
            scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.kind == "sink":  # one more score for each query, whose probability weighs nothing
            scores = torch.cat([scores, self.sink + 0 * scores[..., :1]], -1)
        p = scores.softmax(-1)
        if self.kind == "sink":
            p = p[..., :-1]
        if self.kind in ("after", "both"):
            p = self.after(p.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.kind == "einsum":
            p = torch.einsum("bhij,hg->bgij", p, self.after.weight)
        elif self.kind == "normed":
            p = self.heads_norm(p.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.kind == "differential":
            first, second = p.unflatten(1, (HEADS, 2)).unbind(2)
            p = first - 0.8 * second
        return x + self.proj((p @ v).transpose(1, 2).flatten(2))


def model(kind: str, path: Path, exporter: str = "torchscript-17", *, dead: bool = False) -> Path:
    module = randomised(Mixed(kind))
    assert isinstance(module, Mixed)
    if dead:
        with torch.no_grad():
            for rows in (module.qkv.weight, module.qkv.bias, module.proj.weight.T):
                rows.unflatten(0, (-1, DIM))[:, 1::2] = 0
    return export(module, torch.randn(1, TOKENS, WIDTH), path, exporter)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_dimensions_of_mixed_heads_go_without_a_trace(kind: str, exporter: str, tmp_path: Path) -> None:
    path, out = model(kind, tmp_path / "model.onnx", exporter, dead=True), tmp_path / "pruned.onnx"
    dense, pruned = prune_file(path, HALF, out)
    (block,) = dense.match.blocks
    assert dense.match.declined == {}
    assert block.attention is not None
    assert block.attention.core.mixed
    assert (block.attention.qk_reason, block.attention.vo_reason) == (None, None)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    (after,) = look(out).match.blocks
    assert after.attention is not None
    assert (after.attention.qk_dim, after.attention.vo_dim) == (DIM // 2, DIM // 2)
    for batch in (1, 3):
        given = feeds(batch, TOKENS, WIDTH)
        assert worst(run(out, given), run(path, given)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_whole_heads_stay_and_tokens_merge_or_are_declined(kind: str, tmp_path: Path) -> None:
    """Linear mixing takes sizes along (a size is a factor of a row's entries); a norm or a difference does not."""
    found = look(model(kind, tmp_path / "model.onnx"))
    (block,) = found.match.blocks
    assert block.attention is not None
    assert bool(block.attention.heads_reason) == (kind != "sink")
    (point,) = study_tokens(found).points
    if kind in ("normed", "differential", "sink"):
        assert point.reason
        return
    assert point.reason is None
    merged = {"version": 1, "tokens": {"merge": 0.4}, "attention": {"qk": 0.5}}
    result = prune(found, parse_ratios(merged), SyntheticStatistics(found), seed=0)
    assert result.twin is not None
    assert result.twin.worst < 1e-4


def test_statistics_do_not_weigh_keys_by_rows_of_another_head(tmp_path: Path) -> None:
    """Plain second moments of the keys: those of the softmax's rows would be another head's."""
    path = model("both", tmp_path / "model.onnx")
    dense = look(path)
    given = feeds(8, TOKENS, WIDTH)
    np.savez(tmp_path / "x.npz", **given)
    file = tmp_path / "s.npz"
    calibrate(dense, tmp_path / "x.npz", file, everything(dense), CalibrationOptions(threads=1))
    module = randomised(Mixed("both"))
    assert isinstance(module, Mixed)
    with torch.no_grad():
        k = module.qkv(module.norm(torch.from_numpy(given["x"])))[..., WIDTH : 2 * WIDTH].double()
        k = (k - k.mean(1, keepdim=True)).unflatten(-1, (HEADS, DIM))
        expected = torch.einsum("bnhd,bnhe->hde", k, k).numpy()
    gram = np.load(file)["0.kk.gram"]
    assert abs(gram - expected).max() < 1e-5 * abs(expected).max()
    result = prune(dense, parse_ratios(HALF), CalibratedStatistics(dense, file), seed=0)
    assert result.twin is not None
    assert result.twin.worst < 1e-4


@pytest.mark.parametrize("kind", ["both", "after"])
def test_a_softmax_that_the_optimizer_moved_behind_a_transpose(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime's basic optimizer lets a Softmax run over axis 2 of (batch, queries, keys, heads)."""
    model(kind, tmp_path / "as_exported.onnx", dead=True)
    path, out = tmp_path / "model.onnx", tmp_path / "pruned.onnx"
    AFTERMATHS["ort-basic"](tmp_path / "as_exported.onnx", path)
    softmaxes = [n for n in onnx.load(path).graph.node if n.op_type == "Softmax"]
    assert [a.i for n in softmaxes for a in n.attribute if a.name == "axis"] == [2 if kind == "both" else -1]
    dense, pruned = prune_file(path, HALF, out)
    assert dense.match.declined == {}
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    for batch in (1, 3):
        given = feeds(batch, TOKENS, WIDTH)
        assert worst(run(out, given), run(path, given)) < 1e-5


class Slots(Mixed):
    """As slot attention does: queries compete for keys, so the softmax runs over the queries."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        p = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(1)
        return x + self.proj((p.permute(0, 3, 1, 2) @ v).transpose(1, 2).flatten(2))


def test_a_softmax_over_the_queries_is_named_and_left(tmp_path: Path) -> None:
    found = look(export(randomised(Slots("both")), torch.randn(1, TOKENS, WIDTH), tmp_path / "model.onnx"))
    assert found.match.blocks == ()
    (reason,) = found.match.declined.values()
    assert "not over the one of the keys" in str(reason)


class Mixer(nn.Module):
    """A softmax over what a layer makes of whole rows of scores: the layer is no mixing of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.rows, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(TOKENS, TOKENS), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = functional.layer_norm(self.qkv(x), (3 * WIDTH,)).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return x + self.proj((self.rows(q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_what_mixes_tokens_is_named_and_left(tmp_path: Path) -> None:
    found = look(export(randomised(Mixer()), torch.randn(1, TOKENS, WIDTH), tmp_path / "model.onnx"))
    assert found.match.blocks == ()
    assert len(found.match.declined) == 1
