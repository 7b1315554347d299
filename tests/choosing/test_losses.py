"""Loss curves of blocks against the error that the solvers' own solutions leave, under the same statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.pace import mostly_slow
from tests.pruning import look
from toast_onnx.choosing.blocks import Widths, solve_block
from toast_onnx.choosing.losses import loss_curves
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.matching.linear import weights
from toast_onnx.planning.ratios import parse_ratios, resolve
from toast_onnx.planning.width_costs import Part, prunable_widths
from toast_onnx.rewriting.attention import head_weights

Exported = Callable[[zoo.Case], Path]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"attention": {"select": "index", "score": "energy"}, "ffn": {"score": "variance"}},
    {"attention": {"select": "index", "score": "second-order"}},
    {"attention": {"select": "index", "score": "gm"}, "ffn": {"score": "l2"}, "compensation": {"kind": "none"}},
    {"attention": {"select": "index", "score": "l1"}, "ffn": {"score": "l1"}, "compensation": {"kind": "bias"}},
]


def curves_of(path: Path, document: dict[str, Any], block: int = 0) -> dict[Part, np.ndarray]:
    dense = look(path)
    ratios = parse_ratios({"version": 1} | document)
    settings = resolve(ratios, [b.name for b in dense.match.blocks], [b.node_names for b in dense.match.blocks])
    found = dense.match.blocks[block]
    parts = list(prunable_widths(found))
    statistics = SyntheticStatistics(dense)
    return dict(loss_curves(dense, found, parts, settings[block], ratios.compensation.kind, statistics))


@pytest.mark.parametrize(
    ("name", "document"),
    mostly_slow(
        itertools.product(("timm-vit", "timm-eva02-unfused", "timm-swinv2"), SETTINGS),
        lambda v: v[0] == "timm-vit" and v[1] in (SETTINGS[0], SETTINGS[3]),
    ),
)
def test_curves_fall_to_nothing(name: str, document: dict[str, Any], exported: Exported) -> None:
    path = exported(zoo.Case(name))
    found = curves_of(path, document)
    widths = prunable_widths(look(path).match.blocks[0])
    assert set(found) == set(widths)
    for part, curve in found.items():
        assert curve.shape == (widths[part] + 1,)
        assert np.isfinite(curve).all()
        assert curve[-1] == 0
        assert curve[0] > 0
        if document.get("compensation", {}).get("kind", "ridge") == "ridge":
            assert (np.diff(curve) <= 1e-9 * curve[0]).all()


@pytest.mark.parametrize("document", mostly_slow(SETTINGS, [SETTINGS[1], SETTINGS[3]].__contains__))
def test_hidden_units_lose_what_the_solution_loses(document: dict[str, Any], exported: Exported) -> None:
    dense = look(exported(zoo.Case("timm-vit")))
    ratios = parse_ratios({"version": 1} | document)
    settings = resolve(ratios, [b.name for b in dense.match.blocks], [b.node_names for b in dense.match.blocks])
    block, statistics = dense.match.blocks[1], SyntheticStatistics(dense)
    curve = loss_curves(dense, block, ["fc2"], settings[1], ratios.compensation.kind, statistics)["fc2"]
    assert block.ffn is not None
    w, moments = weights(dense.view, dense.facts, block.ffn.fc2).astype(np.float64), statistics.hidden(1)
    s = moments.second if ratios.compensation.kind == "none" else moments.covariance
    for kept in (96, 384, 672):
        new = solve_block(dense, block, Widths(fc2=kept), settings[1], ratios, statistics)
        assert new is not None
        assert new.ffn is not None
        assert new.ffn.fc2 is not None
        left = w.copy()
        left[new.ffn.units] -= new.ffn.fc2[0]
        # second-order order is taken at stops, and removals are batched
        assert curve[kept] == pytest.approx(np.trace(left.T @ s @ left), rel=0.05, abs=1e-6 * curve[0])


@pytest.mark.parametrize("document", SETTINGS)
def test_heads_lose_what_the_solution_loses(document: dict[str, Any], exported: Exported) -> None:
    dense = look(exported(zoo.Case("timm-vit")))
    ratios = parse_ratios({"version": 1} | document)
    settings = resolve(ratios, [b.name for b in dense.match.blocks], [b.node_names for b in dense.match.blocks])
    block, statistics = dense.match.blocks[1], SyntheticStatistics(dense)
    kind = ratios.compensation.kind
    curve = loss_curves(dense, block, ["heads"], settings[1], kind, statistics)["heads"]
    a = block.attention
    assert a is not None
    assert a.proj is not None
    w = weights(dense.view, dense.facts, a.proj.linear)[a.proj.layout.channels].astype(np.float64)  # (H, d, C)
    moments = statistics.attention(1).context
    s = moments.second if kind == "none" else moments.covariance
    assert curve.shape == (a.num_heads + 1,)
    for kept in range(1, a.num_heads):
        new = solve_block(dense, block, Widths(heads=kept), settings[1], ratios, statistics)
        assert new is not None
        assert new.attention is not None
        assert new.attention.v is not None
        assert new.attention.proj is not None
        left = w.copy()
        left[new.attention.v.heads] -= new.attention.proj.weight
        rows = left.reshape(-1, w.shape[2])
        assert curve[kept] == pytest.approx(np.trace(rows.T @ s @ rows), rel=1e-3, abs=1e-6 * curve[0])


def test_scores_lose_what_the_subspace_loses(exported: Exported) -> None:
    """E over independent queries and keys of (q k^T - q' k'^T)^2, from samples with the statistics' moments."""
    dense = look(exported(zoo.Case("timm-vit")))
    ratios = parse_ratios({"version": 1})
    settings = resolve(ratios, [b.name for b in dense.match.blocks], [b.node_names for b in dense.match.blocks])
    block, statistics = dense.match.blocks[0], SyntheticStatistics(dense)
    curve = loss_curves(dense, block, ["qk"], settings[0], "ridge", statistics)["qk"]
    a, found = block.attention, statistics.attention(0)
    assert a is not None
    assert a.q is not None
    assert a.k is not None
    q, k = (head_weights(dense.view, dense.facts, b) for b in (a.q, a.k))
    for kept in (16, 48):
        new = solve_block(dense, block, Widths(qk=kept), settings[0], ratios, statistics)
        assert new is not None
        assert new.attention is not None
        assert new.attention.q is not None
        assert new.attention.k is not None
        loss = 0.0
        for h in range(a.num_heads):
            # new = old @ basis: read the bases back from the weights
            basis_q, basis_k = (
                np.linalg.lstsq(old.weight[:, h].astype(np.float64), part.weight[:, h], rcond=None)[0]
                for old, part in ((q, new.attention.q), (k, new.attention.k))
            )
            gap = np.eye(a.qk_dim) - basis_q @ basis_k.T
            loss += float(np.trace(gap.T @ found.s_qq[h] @ gap @ found.s_kk[h]))
        assert curve[kept] == pytest.approx(loss, rel=1e-2)
