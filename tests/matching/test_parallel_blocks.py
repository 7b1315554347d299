"""Parallel blocks: attention and network from one layer, and one layer over both, as in ViT-22B; norms of q and k."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.matching.small_exports import EXPORTERS, export, feeds, randomised
from tests.pace import mostly_slow
from tests.pruning import UNEVEN, look, prune_file, run, worst
from tests.zoo.libraries import declare_torchvision_operators
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.graph import GraphView
from toast_onnx.model import load_model, save_model
from toast_onnx.planning.macs import graph_macs, graph_params

WIDTH, HEADS, DIM, HIDDEN, TOKENS = 16, 2, 8, 24, 5


class Rms(nn.Module):
    """RMSNorm with gain, of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.gain


class Length(Rms):
    """Division by the length, with gain."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1) * self.gain


class Parallel(nn.Module):
    """A block with one layer in front of both branches, taken apart by a split or slices, and one or two behind."""

    def __init__(self, taken: str = "split", behind: str = "one", norm: str = "") -> None:
        super().__init__()
        self.taken, self.behind = taken, behind
        self.norm, self.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN + 3 * WIDTH)
        self.both = nn.Linear(WIDTH + HIDDEN, WIDTH)
        self.proj, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(HIDDEN, WIDTH)
        norms = {"": nn.Identity, "layer": lambda: nn.LayerNorm(DIM), "rms": Rms, "length": Length}
        self.q_norm, self.k_norm = norms[norm](), norms[norm]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.norm(x))
        if self.taken == "split":
            hidden, q, k, v = y.split([HIDDEN, WIDTH, WIDTH, WIDTH], dim=-1)
        elif self.taken == "slices":
            bounds = (0, HIDDEN, HIDDEN + WIDTH, HIDDEN + 2 * WIDTH, HIDDEN + 3 * WIDTH)
            hidden, q, k, v = (y[..., a:b] for a, b in pairwise(bounds))
        else:  # the network between queries and keys
            q, hidden, k, v = y.split([WIDTH, HIDDEN, WIDTH, WIDTH], dim=-1)
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (q, k, v))
        weights = (self.q_norm(q) @ self.k_norm(k).transpose(-2, -1) * DIM**-0.5).softmax(-1)
        a, hidden = (weights @ v).transpose(1, 2).flatten(2), F.gelu(hidden)
        if self.behind == "one":
            return x + self.both(torch.cat([a, hidden], -1))
        if self.behind == "turned":
            return x + self.both(torch.cat([hidden, a], -1))
        return x + self.proj(a) + self.fc2(hidden)

    def columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns (WIDTH, heads, dim) that read the attention, and (WIDTH, HIDDEN) that read the network."""
        w = self.both.weight
        if self.behind == "two":
            a, hidden = self.proj.weight, self.fc2.weight
        elif self.behind == "one":
            a, hidden = w[:, :WIDTH], w[:, WIDTH:]
        else:
            a, hidden = w[:, HIDDEN:], w[:, :HIDDEN]
        return a.unflatten(-1, (HEADS, DIM)), hidden


def only_block(path: Path) -> Block:
    (block,) = look(path).match.blocks
    assert block.attention is not None
    assert block.ffn is not None
    return block


@pytest.mark.parametrize(
    ("taken", "behind"),
    mostly_slow(
        list(product(["split", "slices", "between"], ["one", "turned", "two"])),
        lambda v: v in (("split", "one"), ("slices", "turned"), ("between", "two")),
    ),
)
def test_parted_layers_compute_the_same_and_cost_the_same(taken: str, behind: str, tmp_path: Path) -> None:
    module = randomised(Parallel(taken, behind))
    path = export(module, torch.randn(1, TOKENS, WIDTH), tmp_path / "dense.onnx")
    study = look(path)
    save_model(study.view.model, tmp_path / "parted.onnx")
    given = feeds(3, TOKENS, WIDTH)
    assert worst(run(tmp_path / "parted.onnx", given), run(path, given)) < 1e-6
    parted = look(tmp_path / "parted.onnx")
    assert parted.view.model.proto == parted.source.proto  # nothing is left to part
    assert graph_macs(study.view, study.counted) == TOKENS * WIDTH * 2 * (HIDDEN + 2 * WIDTH) + 2 * TOKENS**2 * WIDTH
    assert graph_params(study.view) == graph_params(GraphView(load_model(path)))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(("taken", "behind"), [("split", "one"), ("slices", "two"), ("between", "turned")])
def test_dead_dimensions_and_units_of_both_branches_go(taken: str, behind: str, exporter: str, tmp_path: Path) -> None:
    module = randomised(Parallel(taken, behind))
    assert isinstance(module, Parallel)
    with torch.no_grad():
        order = {"q": HIDDEN, "k": HIDDEN + WIDTH, "v": HIDDEN + 2 * WIDTH, "hidden": 0}
        if taken == "between":
            order |= {"q": 0, "hidden": WIDTH}
        for tensor in (module.first.weight, module.first.bias):
            for name in "qkv":
                tensor[order[name] : order[name] + WIDTH].unflatten(0, (HEADS, DIM))[:, 1::2] = 0
            tensor[order["hidden"] : order["hidden"] + HIDDEN][::2] = 0
        attention, network = module.columns()
        attention[..., 1::2] = 0
        network[:, ::2] = 0
    path = export(module, torch.randn(1, TOKENS, WIDTH), tmp_path / "dense.onnx", exporter)
    half = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "l2"}, "align": 1}
    ratios = half | {"ffn": {"fc2": 0.5, "score": "l2"}, "compensation": {"kind": "none"}}
    _, pruned = prune_file(path, ratios, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    given = feeds(2, TOKENS, WIDTH)
    assert worst(run(tmp_path / "pruned.onnx", given), run(path, given)) < 1e-5
    block = only_block(tmp_path / "pruned.onnx")
    assert block.attention is not None
    assert block.ffn is not None
    assert (block.attention.qk_dim, block.attention.vo_dim, block.ffn.width) == (DIM // 2, DIM // 2, HIDDEN // 2)


@pytest.mark.parametrize("norm", ["layer", "rms", "length"])
def test_all_parts_of_blocks_with_normed_queries_are_pruned(norm: str, tmp_path: Path) -> None:
    path = export(randomised(Parallel("split", "two", norm)), torch.randn(1, TOKENS, WIDTH), tmp_path / "dense.onnx")
    block = only_block(path)
    assert block.attention is not None
    assert block.ffn is not None
    assert (block.attention.qk_reason, block.attention.vo_reason, block.ffn.fc2_reason) == (None, None, None)
    _, pruned = prune_file(path, UNEVEN, tmp_path / "pruned.onnx", skip_unprunable=True)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    after = only_block(tmp_path / "pruned.onnx")
    assert after.attention is not None
    assert after.ffn is not None
    widths = (after.attention.qk_dim, after.attention.vo_dim, after.ffn.width)
    assert widths == (DIM // 2, DIM * 3 // 4, HIDDEN // 2)


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_block_of_timm(qk_norm: bool, tmp_path: Path) -> None:
    declare_torchvision_operators()
    from timm.models.vision_transformer import ParallelScalingBlock

    module = randomised(ParallelScalingBlock(WIDTH, HEADS, mlp_ratio=1.5, qkv_bias=True, qk_norm=qk_norm))
    module.fused_attn = False
    path = export(module, torch.randn(1, TOKENS, WIDTH), tmp_path / "dense.onnx")
    _, pruned = prune_file(path, UNEVEN, tmp_path / "pruned.onnx", skip_unprunable=True)
    block = only_block(path)
    assert block.attention is not None
    assert block.ffn is not None
    assert (block.attention.qk_reason, block.attention.vo_reason) == (None, None)
    assert block.ffn.fc2_reason is None
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    assert (tmp_path / "pruned.onnx").stat().st_size < path.stat().st_size + 4096  # tiny weights, a few nodes more
