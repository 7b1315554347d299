"""Redundancy planted in real exports: pruned to the true rank, with compensation, they compute what they did before.

The twin cannot see a wrong solution, since both sides share it; here the original outputs are the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests import zoo
from tests.pace import mostly_slow
from tests.pruning import look, run, worst
from tests.zoo.modules import attentions, ffns
from toast_onnx.model import save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics

#: Of every 8 hidden units 5 are independent, of every 8 dimensions of a head 4.
REMOVED = {"qk": 0.5, "vo": 0.5}
FORMS = {"subspace": {"select": "subspace"}, "index": {"select": "index", "score": "second-order"}}


@pytest.mark.parametrize("select", FORMS)
@pytest.mark.parametrize(
    ("family", "samples"),
    mostly_slow(
        [("timm-vit", 96), ("hf-swin", 24), ("timm-swin", 24), ("hf-dinov2", 96), ("timm-dinov2", 96)],
        lambda v: v[0] == "timm-vit",
    ),
)
def test_pruning_to_the_true_rank_changes_no_output(
    family: str, samples: int, select: str, tmp_path: Path, exported: Callable[[zoo.Case], Path]
) -> None:
    case = zoo.Case(family)
    exported(case)  # skips where the library is absent
    module = zoo.build(family).module
    plant_redundancy(module, same_dims=select == "index")
    path = zoo.export(case, tmp_path / "dense.onnx", module=module)

    dense = look(path)
    np.savez(tmp_path / "x.npz", **zoo.inputs(path, samples))
    calibrate(dense, tmp_path / "x.npz", tmp_path / "s.npz", everything(dense), CalibrationOptions(threads=1))
    ratios = {"version": 1, "attention": REMOVED | FORMS[select], "ffn": {"fc2": 0.375}, "align": 1}
    pruned = prune(dense, parse_ratios(ratios), CalibratedStatistics(dense, tmp_path / "s.npz"))
    assert len(pruned.weights) == len(dense.match.blocks)
    save_model(pruned.model, tmp_path / "pruned.onnx")

    feeds = zoo.inputs(path, 3, seed=1)
    assert worst(run(tmp_path / "pruned.onnx", feeds), run(path, feeds)) < 1e-4


def plant_redundancy(module: nn.Module, *, same_dims: bool) -> None:
    """Give every head and feed-forward network a rank below its width, in place.

    Of each head's dimensions the second half becomes combinations of the first, in Q (in K too with `same_dims`, so
    that the same dimensions can go in both) and in V. Of every 8 hidden units the last three depend on the first five:
    gelu(z) - gelu(-z) = z makes a sum of pre-activations a sum of units; one is a copy, one is dead.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for attention in attentions(module):
            d = attention.head_dim
            for head in range(attention.heads):
                first, last = slice(head * d, head * d + d // 2), slice(head * d + d // 2, (head + 1) * d)
                for layer in (attention.q, attention.k, attention.v)[:: 1 if same_dims else 2]:
                    mix = torch.randn(d // 2, d // 2, generator=generator) / (d // 2) ** 0.5
                    for rows in layer:
                        rows[last] = (mix @ rows[first].reshape(d // 2, -1)).reshape(rows[last].shape)
        for ffn in ffns(module):
            for start in range(0, ffn.width, 8):
                for rows in ffn.entries:
                    one, two = rows[start].clone(), rows[start + 2].clone()
                    for k, value in enumerate((one, -one, two, -two, one + two, -one - two, one, 0 * one)):
                        rows[start + k] = value
