"""A softmax that is written by hand is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.matching.small_exports import EXPORTERS, export, feeds, randomised
from tests.pruning import look, prune_file, run, worst

WIDTH, HEADS, DIM, TOKENS = 24, 3, 8, 5
HALF = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "l2"}, "align": 1}


class Written(nn.Module):
    """A residual attention whose softmax is spelled out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        if self.kind == "log":
            return scores.log_softmax(-1).exp()
        if self.kind != "plain":
            scores = scores - scores.amax(-1, keepdim=True)
        e = scores.exp()
        total = e.sum(-2 if self.kind == "queries" else -1, keepdim=True)
        return e / total + e.mean() if self.kind == "read" else e / total

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        context = self.weights(q @ k.transpose(-2, -1) * DIM**-0.5) @ v
        result: torch.Tensor = x + self.proj(context.transpose(1, 2).flatten(2))
        return result


def model(kind: str, path: Path, exporter: str = "torchscript-17") -> Path:
    module = randomised(Written(kind))
    assert isinstance(module, Written)
    with torch.no_grad():
        for rows in (module.qkv.weight, module.qkv.bias, module.proj.weight.T):
            rows.unflatten(0, (-1, DIM))[:, 1::2] = 0
    return export(module, torch.randn(1, TOKENS, WIDTH), path, exporter)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", ["plain", "shifted", "log"])
def test_its_dimensions_go_without_a_trace(kind: str, exporter: str, tmp_path: Path) -> None:
    path, out = model(kind, tmp_path / "model.onnx", exporter), tmp_path / "pruned.onnx"
    assert "Softmax" not in [n.op_type for n in onnx.load(path).graph.node]
    dense, pruned = prune_file(path, HALF, out)
    assert dense.match.declined == {}
    (block,) = dense.match.blocks
    assert block.attention is not None
    assert (block.attention.qk_reason, block.attention.vo_reason, block.attention.heads_reason) == (None, None, None)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    for batch in (1, 3):
        given = feeds(batch, TOKENS, WIDTH)
        assert worst(run(out, given), run(path, given)) < 1e-5


@pytest.mark.parametrize("kind", ["queries", "read"])
def test_what_is_no_softmax_is_named_and_left(kind: str, tmp_path: Path) -> None:
    """Shares along another axis than the keys', and exponentials that something else reads, too."""
    found = look(model(kind, tmp_path / "model.onnx"))
    assert found.match.blocks == ()
    assert len(found.match.declined) == 1


def test_the_probabilities_of_a_classifier_stay_as_they_are(tmp_path: Path) -> None:
    class Classifier(Written):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weights(super().forward(x).mean(1))

    path = export(randomised(Classifier("shifted")), torch.randn(1, TOKENS, WIDTH), tmp_path / "model.onnx")
    _, pruned = prune_file(path, HALF, tmp_path / "pruned.onnx")
    assert [n.op_type for n in pruned.model.proto.graph.node].count("Softmax") == 1
    total = run(tmp_path / "pruned.onnx", feeds(2, TOKENS, WIDTH))[0].sum(-1)
    assert np.abs(total - 1).max() < 1e-6
