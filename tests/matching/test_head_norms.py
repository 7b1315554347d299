"""Norms of queries and keys by head: found in any spelling, and exact where the removed dimensions hold nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.matching.small_exports import EXPORTERS, export, feeds, randomised
from tests.pruning import look, prune_file, run, worst
from toast_onnx.choosing.head_norms import behind_norm
from toast_onnx.choosing.shared import find_sharing
from toast_onnx.matching.blocks import Attention
from toast_onnx.matching.head_norms import HeadNorm
from toast_onnx.model import save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx.report.pruning import pruning_report
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics

WIDTH, HEADS, DIM, TOKENS = 16, 2, 8, 5
DEAD = [1, 2, 5, 6]
KEPT = [0, 3, 4, 7]


class Normed(nn.Module):
    """A residual attention with a norm of queries and of keys, and maybe rotary embedding behind it."""

    def __init__(self, kind: str, *, rotary: bool = False) -> None:
        super().__init__()
        self.kind, self.rotary = kind, rotary
        self.norm, self.qkv, self.o = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gains = nn.Parameter(torch.ones(2, DIM))
        self.biases = nn.Parameter(torch.zeros(2, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        q, k = (self.normed(t, i) for i, t in enumerate((q, k)))
        if self.rotary:
            angles = torch.arange(n)[:, None] * torch.arange(1, DIM // 2 + 1) * 0.3
            cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
            q, k = (t * cos + torch.cat([-t[..., DIM // 2 :], t[..., : DIM // 2]], -1) * sin for t in (q, k))
        y = (q @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1) @ v
        return x + self.o(y.transpose(1, 2).reshape(b, n, WIDTH))

    def normed(self, t: torch.Tensor, i: int) -> torch.Tensor:
        if self.kind == "layer":
            return F.layer_norm(t, (DIM,), self.gains[i], self.biases[i], 1e-5)
        if self.kind == "spelled":
            c = t - t.mean(-1, keepdim=True)
            return c / torch.sqrt((c * c).mean(-1, keepdim=True) + 1e-3) * self.gains[i] + self.biases[i]
        if self.kind == "rms":
            return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-2) * self.gains[i]
        return F.normalize(t, dim=-1) * self.gains[i] * 3


def model(kind: str, path: Path, exporter: str = "torchscript-17", *, dead: bool = False, rotary: bool = False) -> Path:
    module = randomised(Normed(kind, rotary=rotary))
    assert isinstance(module, Normed)
    with torch.no_grad():
        module.gains.copy_(1 + 0.3 * module.gains.tanh())
        module.biases.mul_(0.3)
        for tensor in (module.qkv.weight, module.qkv.bias) if dead else ():
            rows = tensor.view(3, HEADS, DIM, -1)[:2]
            mean = rows[:, :, KEPT].mean(dim=2, keepdim=True)  # what a centred norm takes off anyway
            rows[:, :, DEAD] = mean if kind in ("layer", "spelled") else 0 * mean
        if dead:  # with a bias behind the norm the rotary embedding would bring dead dimensions to life
            module.biases[:, DEAD] = 0
    return export(module, torch.randn(1, TOKENS, WIDTH), path, exporter)


def attention_of(path: Path) -> Attention:
    (found,) = (block.attention for block in look(path).match.blocks)
    assert found is not None
    return found


#: Whether the mean is taken off, eps, and what the gain is multiplied by.
RIGHT = {
    "layer": (True, 1e-5, 1),
    "spelled": (True, 1e-3, 1),
    "rms": (False, 1e-2, 1),
    "length": (False, 0, 3 * DIM**-0.5),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", RIGHT)
def test_a_norm_is_known_by_what_it_does(kind: str, exporter: str, tmp_path: Path) -> None:
    found = attention_of(model(kind, tmp_path / "model.onnx", exporter))
    module = randomised(Normed(kind))
    assert isinstance(module, Normed)
    centred, eps, factor = RIGHT[kind]
    assert (found.qk_reason, len(found.norms)) == (None, 2)
    for norm, gain, bias in zip(found.norms, module.gains.detach(), module.biases.detach(), strict=True):
        assert norm.centred == centred
        assert norm.eps == pytest.approx(eps, rel=1e-2, abs=1e-9)
        np.testing.assert_allclose(norm.gain, factor * (1 + 0.3 * gain.tanh()), rtol=1e-4)
        np.testing.assert_allclose(norm.bias, (0.3 * bias if centred else 0 * bias), atol=1e-4)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(("kind", "rotary"), [(kind, False) for kind in RIGHT] + [("rms", True), ("layer", True)])
def test_dimensions_that_hold_nothing_go_and_nothing_changes(
    kind: str, rotary: bool, exporter: str, tmp_path: Path
) -> None:
    path = model(kind, tmp_path / "dense.onnx", exporter, dead=True, rotary=rotary)
    ratios = {"version": 1, "attention": {"qk": 0.5}, "align": 1}
    _, pruned = prune_file(path, ratios, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    new = pruned.weights[0].attention
    assert new is not None
    assert new.q is not None
    assert new.q.slots.tolist() == [KEPT] * HEADS
    assert new.q.energy == pytest.approx(1, abs=1e-5)
    given = feeds(3, TOKENS, WIDTH)
    assert worst(run(tmp_path / "pruned.onnx", given), run(path, given)) < 1e-5
    after = attention_of(tmp_path / "pruned.onnx")
    assert (after.qk_dim, after.qk_reason, len(after.norms)) == (DIM // 2, None, 2)


@pytest.mark.parametrize("kind", RIGHT)
def test_lengths_that_are_made_up_for_lose_less(kind: str, tmp_path: Path) -> None:
    """The mean of squares over the kept, scaled by the share that they hold, against the same without the scale."""
    path = model(kind, tmp_path / "dense.onnx")
    dense = look(path)
    np.savez(tmp_path / "x.npz", **feeds(128, TOKENS, WIDTH))
    calibrate(dense, tmp_path / "x.npz", tmp_path / "s.npz", everything(dense), CalibrationOptions(threads=1))
    statistics = CalibratedStatistics(dense, tmp_path / "s.npz")
    ratios = parse_ratios({"version": 1, "attention": {"qk": 0.5}, "align": 1})
    pruned = prune(dense, ratios, statistics)
    save_model(pruned.model, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    (block,) = pruning_report(pruned, dense, tmp_path / "pruned.onnx", {})["blocks"]
    assert "length" in block["notes"][0]
    given = feeds(64, TOKENS, WIDTH)
    scaled = worst(run(tmp_path / "pruned.onnx", given), run(path, given))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:
        m.setattr("toast_onnx.choosing.blocks.energy_kept", lambda *_, **__: 1.0)
        save_model(prune(dense, ratios, statistics).model, tmp_path / "plain.onnx")
    plain = worst(run(tmp_path / "plain.onnx", given), run(path, given))
    assert scaled < 0.95 * plain


class Shared(nn.Module):
    """One attention applied twice, the norms of each use its own, or shared, too."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.first, self.second = randomised(Normed("rms")), Normed("rms")
        self.second.norm, self.second.qkv, self.second.o = self.first.norm, self.first.qkv, self.first.o
        if not own:
            self.second.gains = self.first.gains

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_shared_layers_behind_different_norms_have_no_common_choice(tmp_path: Path) -> None:
    found = find_sharing(look(export(Shared(own=True), torch.randn(1, TOKENS, WIDTH), tmp_path / "own.onnx")))
    assert "norms differ" in str(found.reasons[0, "attention"])
    found = find_sharing(look(export(Shared(own=False), torch.randn(1, TOKENS, WIDTH), tmp_path / "same.onnx")))
    assert found.attention == {0: (0, 1), 1: (0, 1)}


def test_moments_behind_a_norm() -> None:
    rng = np.random.default_rng(0)
    mix, gain, bias = rng.standard_normal((4, 4)), rng.standard_normal(4), rng.standard_normal(4)
    norm = HeadNorm("x", (), "y", False, gain, bias, 0.0)
    x = rng.standard_normal((200_000, 4)) @ mix
    x *= np.sqrt(np.square(x).mean() / np.square(x).mean(axis=1, keepdims=True))  # all of one length: exact
    y = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True)) * gain + bias
    wanted = y.T @ y / len(y)
    found = behind_norm((x.T @ x / len(x))[None], norm, offset=True)[0]
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())
