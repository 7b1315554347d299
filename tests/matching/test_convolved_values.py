"""Values that are also convolved channel by channel and added to the weighted sum: YOLO11, YOLO12, CSWin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.matching.small_exports import EXPORTERS, export, feeds, randomised
from tests.pruning import UNEVEN, look, prune_file, run, worst
from toast_onnx.planning.macs import graph_macs, graph_params
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.planning.width_costs import width_cost
from toast_onnx.pruning import prune
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics

CASE = Path(__file__).parents[1] / "cases" / "graphs" / "yolo_psa.onnx"
WIDTH, HEADS, DIM = 16, 2, 8
DEAD = slice(1, None, 2)  # of every head's dimensions


class Convolved(nn.Module):
    """A residual attention over an image, in the layout of one of the networks that convolve their values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        layer = nn.Linear if kind == "cswin" else lambda a, b: nn.Conv2d(a, b, 1)
        self.qkv, self.proj = layer(WIDTH, 3 * WIDTH), layer(WIDTH, WIDTH)
        self.pe = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + getattr(self, self.kind)(x)

    def yolo11(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, HEADS, 3 * DIM, h * w).split([DIM, DIM, DIM], dim=2)
        weights = (q.transpose(-2, -1) @ k * DIM**-0.5).softmax(-1)
        y = (v @ weights.transpose(-2, -1)).view(b, c, h, w)
        return self.proj(y + self.norm(self.pe(v.reshape(b, c, h, w))))

    def yolo12(self, x: torch.Tensor, areas: int = 2) -> torch.Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(x).flatten(2).transpose(1, 2).reshape(b * areas, h * w // areas, 3 * c)
        q, k, v = qkv.view(b * areas, -1, HEADS, 3 * DIM).permute(0, 2, 3, 1).split([DIM, DIM, DIM], dim=2)
        y = v @ (q.transpose(-2, -1) @ k * DIM**-0.5).softmax(-1).transpose(-2, -1)
        y, v = (t.permute(0, 3, 1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2) for t in (y, v))
        return self.proj(y + self.pe(v))

    def cswin(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens; what is convolved is added head by head, in front of the output's movement."""
        b, c, h, w = x.shape
        tokens = F.layer_norm(x.flatten(2).transpose(1, 2), (WIDTH,))
        q, k, v = self.qkv(tokens).reshape(b, h * w, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        beside = self.pe(v.transpose(-2, -1).reshape(b, c, h, w)).reshape(b, HEADS, DIM, h * w).transpose(-2, -1)
        y = (q @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1) @ v + beside
        return self.proj(y.transpose(1, 2).reshape(b, h * w, c)).transpose(1, 2).reshape(b, c, h, w)

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        """What is convolved is turned head for head: it meets other dimensions than it is made of."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, HEADS, 3 * DIM, h * w).split([DIM, DIM, DIM], dim=2)
        y = v @ (q.transpose(-2, -1) @ k * DIM**-0.5).softmax(-1).transpose(-2, -1)
        return self.proj(y.view(b, c, h, w) + self.pe(v.flip(1).reshape(b, c, h, w)))

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        """A convolution that is not depthwise mixes the channels."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, HEADS, 3 * DIM, h * w).split([DIM, DIM, DIM], dim=2)
        y = v @ (q.transpose(-2, -1) @ k * DIM**-0.5).softmax(-1).transpose(-2, -1)
        mix = F.conv2d(v.reshape(b, c, h, w), self.pe.weight.repeat(1, WIDTH, 1, 1), padding=1)
        return self.proj(y.view(b, c, h, w) + mix)

    def by_part(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view (heads, parts, dim, ...) of the packed layer's weight or bias."""
        rest = tensor.shape[1:]
        if self.kind == "cswin":
            return tensor.view(3, HEADS, DIM, *rest).transpose(0, 1)
        return tensor.view(HEADS, 3, DIM, *rest)


def model(kind: str, path: Path, exporter: str = "torchscript-17", *, dead: bool = False) -> Path:
    module = randomised(Convolved(kind))
    assert isinstance(module, Convolved)
    if dead:
        with torch.no_grad():
            for tensor in (module.qkv.weight, module.qkv.bias):
                module.by_part(tensor)[:, :, DEAD] = 0
            module.proj.weight.view(WIDTH, HEADS, DIM)[:, :, DEAD] = 0
    return export(module, torch.randn(1, WIDTH, 4, 4), path, exporter)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", ["yolo11", "yolo12", "cswin"])
def test_dead_dimensions_go_through_the_convolution(kind: str, exporter: str, tmp_path: Path) -> None:
    path = model(kind, tmp_path / "dense.onnx", exporter, dead=True)
    half = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "l2"}, "align": 1}
    ratios = half | {"compensation": {"kind": "none"}}
    dense, pruned = prune_file(path, ratios, tmp_path / "pruned.onnx")
    (found,) = (b.attention for b in dense.match.blocks)
    assert found is not None
    assert (found.qk_reason, found.vo_reason) == (None, None)
    assert pruned.twin is not None
    given = feeds(2, WIDTH, 4, 4)
    assert worst(run(tmp_path / "pruned.onnx", given), run(path, given)) < 1e-5
    small = look(tmp_path / "pruned.onnx")
    (after,) = (b.attention for b in small.match.blocks)
    assert after is not None
    assert (after.qk_dim, after.vo_dim, after.vo_reason) == (DIM // 2, DIM // 2, None)
    convolutions = [node for node in small.source.proto.graph.node if node.op_type == "Conv"]
    groups = {a.i for node in convolutions for a in node.attribute if a.name == "group"}
    assert WIDTH // 2 in groups
    assert WIDTH not in groups


@pytest.mark.parametrize("part", ["qk", "vo"])
@pytest.mark.parametrize("kind", ["yolo11", "yolo12", "cswin"])
def test_each_part_alone_is_proven_and_costs_what_is_predicted(kind: str, part: str, tmp_path: Path) -> None:
    path = model(kind, tmp_path / "dense.onnx")
    ratios = {"version": 1, "attention": {part: 0.25, "select": "index", "score": "l2"}, "align": 1}
    dense, pruned = prune_file(path, ratios | {"compensation": {"kind": "none"}}, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    small = look(tmp_path / "pruned.onnx")
    for resource, count in (("macs", graph_macs), ("params", lambda view, _: graph_params(view))):
        cost = width_cost(dense.view, dense.counted, dense.match.blocks[0], resource)
        saved = count(dense.view, dense.counted) - count(small.view, small.counted)
        assert saved == pytest.approx(2 * getattr(cost, part))


def test_what_the_convolution_tells_is_part_of_the_refit(tmp_path: Path) -> None:
    """Half of the sums follow from the other half: with measured moments nothing is lost."""
    module = randomised(Convolved("yolo11"))
    assert isinstance(module, Convolved)
    with torch.no_grad():
        for tensor in (module.qkv.weight, module.qkv.bias):
            values = module.by_part(tensor)[:, 2]
            values[:, 1::2] = 2 * values[:, ::2]
        for tensor in (module.pe.weight, module.norm.weight, module.norm.bias):
            tensor.view(HEADS, DIM, -1)[:, 1::2] = tensor.view(HEADS, DIM, -1)[:, ::2]
        module.pe.bias.view(HEADS, DIM)[:, 1::2] = 2 * module.pe.bias.view(HEADS, DIM)[:, ::2]
    path = export(module, torch.randn(1, WIDTH, 4, 4), tmp_path / "dense.onnx")
    dense = look(path)
    np.savez(tmp_path / "x.npz", **feeds(64, WIDTH, 4, 4))
    calibrate(dense, tmp_path / "x.npz", tmp_path / "s.npz", everything(dense), CalibrationOptions(threads=1))
    ratios = parse_ratios({"version": 1, "attention": {"vo": 0.5, "score": "second-order"}, "align": 1})
    pruned = prune(dense, ratios, CalibratedStatistics(dense, tmp_path / "s.npz"))
    assert pruned.errors[0]["vo"] < 1e-3
    after = pruned.weights[0].attention
    assert after is not None
    assert after.v is not None
    assert not after.v.is_basis


def test_without_data_values_are_left_alone(tmp_path: Path) -> None:
    path = model("cswin", tmp_path / "dense.onnx")
    ratios = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "align": 1}
    _, pruned = prune_file(path, ratios, force_synthetic=False)
    assert pruned.unfounded == (0,)
    new = pruned.weights[0].attention
    assert new is not None
    assert new.q is not None
    assert new.v is None


@pytest.mark.parametrize(("kind", "reason"), [("twice", "order"), ("mixed", "V is also read by")])
def test_what_mixes_or_turns_the_values_keeps_them_and_lets_queries_go(kind: str, reason: str, tmp_path: Path) -> None:
    path = model(kind, tmp_path / "dense.onnx")
    dense, pruned = prune_file(path, UNEVEN, skip_unprunable=True)
    (found,) = (b.attention for b in dense.match.blocks)
    assert found is not None
    assert found.qk_reason is None
    assert reason in str(found.vo_reason)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5


def test_the_exported_detector_is_pruned_in_all_parts(tmp_path: Path) -> None:
    dense, pruned = prune_file(CASE, UNEVEN, tmp_path / "pruned.onnx", skip_unprunable=True)
    for block in dense.match.blocks:
        assert block.attention is not None
        assert (block.attention.qk_reason, block.attention.vo_reason) == (None, None)
        assert "convolved" in str(block.attention.heads_reason)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    assert (tmp_path / "pruned.onnx").stat().st_size < CASE.stat().st_size
