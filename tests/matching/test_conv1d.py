"""Layers that are 1x1 convolutions over a sequence, as audio and time-series models have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.matching.small_exports import EXPORTERS, export, feeds, randomised
from tests.pruning import prune_file, run, worst

WIDTH, HEADS, DIM, HIDDEN, TOKENS = 24, 3, 8, 32, 7
HALF = {
    "version": 1,
    "attention": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "l2"},
    "ffn": {"fc2": 0.5, "score": "l2"},
    "align": 1,
    "compensation": {"kind": "none"},
}


class Sequence(nn.Module):
    """Attention and network with channels first, (batch, channels, tokens); every second channel inside is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv1d(WIDTH, 3 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.fc1, self.fc2 = nn.Conv1d(WIDTH, HIDDEN, 1), nn.Conv1d(HIDDEN, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, HEADS, DIM)).unbind(1)
        weights = (q.transpose(-2, -1) @ k * DIM**-0.5).softmax(-1)
        x = x + self.proj((v @ weights.transpose(-2, -1)).flatten(1, 2))
        result: torch.Tensor = x + self.fc2(functional.gelu(self.fc1(x)))
        return result


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_planted_channels_go_without_a_trace(exporter: str, tmp_path: Path) -> None:
    module = randomised(Sequence())
    assert isinstance(module, Sequence)
    with torch.no_grad():
        for dead in (module.qkv.weight, module.qkv.bias, module.fc1.weight, module.fc1.bias):
            dead[1::2] = 0
        for read in (module.proj.weight, module.fc2.weight):
            read[:, 1::2] = 0
    path = export(module, torch.randn(1, WIDTH, TOKENS), tmp_path / "model.onnx", exporter)
    dense, pruned = prune_file(path, HALF, tmp_path / "pruned.onnx")
    (block,) = dense.match.blocks
    assert block.attention is not None
    assert block.ffn is not None
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    for batch in (1, 3):
        given = feeds(batch, WIDTH, TOKENS)
        assert worst(run(tmp_path / "pruned.onnx", given), run(path, given)) < 1e-5
