"""Small modules written here, exported by the real exporters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.zoo.described import Case, Subject
from tests.zoo.exporting import _export

#: Every run goes through the first; the others take seconds each.
EXPORTERS = [
    "torchscript-17",
    pytest.param("dynamo-20", marks=pytest.mark.slow),
    pytest.param("dynamo-23", marks=pytest.mark.slow),
]


def export(module: nn.Module, example: torch.Tensor, path: Path, exporter: str = "torchscript-17") -> Path:
    """A file of the module in eval mode, with a dynamic batch."""
    _export(Case("", exporter), Subject(module.eval(), {"x": example}), module, path)
    return path


def feeds(*shape: int) -> dict[str, np.ndarray]:
    """Random inputs for an exported module."""
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


def randomised(module: nn.Module) -> nn.Module:
    """The module with seeded weights and biases that no two layers share."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            scale = 1.0 if p.dim() == 1 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return module
