"""Dropped heads against PyTorch modules with the same heads switched off, and heads whose loss changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests import zoo
from tests.pruning import look, prune_file, run, worst
from tests.rewriting.test_lossless import plant_redundancy
from tests.zoo.modules import attentions
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.model import save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import Pruned, prune
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything, needed
from toast_onnx_calibration.statistics import CalibratedStatistics

Exported = Callable[[zoo.Case], Path]
#: Half of the heads by magnitude, nothing else.
HALF: dict[str, Any] = {
    "version": 1,
    "attention": {"heads": 0.5, "select": "index", "score": "l2"},
    "compensation": {"kind": "none"},
}
SWITCHED_OFF = [
    zoo.Case("timm-vit"),
    zoo.Case("timm-vit", "dynamo-23"),
    zoo.Case("timm-swinv2"),
    zoo.Case("hf-swin", "dynamo-20"),
    zoo.Case("timm-eva02", "dynamo-20"),
    zoo.Case("torchvision-vit"),
    zoo.Case("hf-vitdet"),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.id, marks=() if c.family == "timm-vit" else pytest.mark.slow) for c in SWITCHED_OFF],
)
def test_dropped_heads_are_those_that_a_module_switches_off(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    path = exported(case)
    _, pruned = prune_file(path, HALF, tmp_path / "pruned.onnx", check=False)
    subject = zoo.build(case.family)
    with torch.no_grad():
        for index, attention in enumerate(attentions(subject.module)):
            gone = np.setdiff1d(np.arange(attention.heads), kept_heads(pruned, index))
            assert gone.size == attention.heads // 2
            attention.proj.view(-1, attention.heads, attention.head_dim)[:, gone] = 0
    for batch in (1, 3):
        feeds = zoo.inputs(path, batch)
        assert worst(run(tmp_path / "pruned.onnx", feeds), zoo.reference(subject, feeds)) < 1e-4


def kept_heads(pruned: Pruned, block: int) -> np.ndarray:
    """Heads that stay in a block."""
    attention = pruned.weights[block].attention
    assert attention is not None
    assert attention.v is not None
    assert attention.v.heads is not None
    for part in (attention.q, attention.k):
        assert part is not None
        np.testing.assert_array_equal(part.heads, attention.v.heads)
    return attention.v.heads


FORMS: dict[str, dict[str, Any]] = {
    "heads": {},
    "heads and dimensions": {"qk": 0.5, "vo": 0.5},
    "heads and chosen dimensions": {"qk": 0.5, "vo": 0.5, "select": "index", "score": "second-order"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("family", "plant", "samples"),
    [
        ("timm-vit", "dead", 96),
        ("timm-vit", "alike", 96),
        pytest.param("hf-swin", "dead", 24, marks=pytest.mark.slow),
        pytest.param("timm-dinov2", "alike", 96, marks=pytest.mark.slow),
    ],
)
def test_heads_that_add_nothing_go_without_a_trace(
    family: str, plant: str, samples: int, form: str, exported: Exported, tmp_path: Path
) -> None:
    case = zoo.Case(family)
    exported(case)  # skips where the library is absent
    module = zoo.build(family).module
    if "dimensions" in form:
        plant_redundancy(module, same_dims="chosen" in form)
    with torch.no_grad():
        spare = [PLANTS[plant](a) for a in attentions(module)]
    path = zoo.export(case, tmp_path / "dense.onnx", module=module)

    dense = look(path)
    np.savez(tmp_path / "x.npz", **zoo.inputs(path, samples))
    ratios = parse_ratios({"version": 1, "attention": {"heads": 0.33} | FORMS[form], "align": 1})
    calibrate(dense, tmp_path / "x.npz", tmp_path / "s.npz", needed(dense, ratios), CalibrationOptions(threads=1))
    pruned = prune(dense, ratios, CalibratedStatistics(dense, tmp_path / "s.npz"))
    save_model(pruned.model, tmp_path / "pruned.onnx")
    for index, heads in enumerate(spare):
        assert len(set(heads) & set(kept_heads(pruned, index).tolist())) == (len(heads) // 2 if plant == "alike" else 0)
    feeds = zoo.inputs(path, 3, seed=1)
    assert worst(run(tmp_path / "pruned.onnx", feeds), run(path, feeds)) < 1e-4


def _dead(attention: zoo.Attention) -> list[int]:
    """A third of the heads have no values."""
    d, spare = attention.head_dim, list(range(1, attention.heads, 3))
    for h in spare:
        for rows in attention.v:
            rows[h * d : (h + 1) * d] = 0
    return spare


def _alike(attention: zoo.Attention) -> list[int]:
    """The last third of the heads see and say what the first third do; the output projection reads both differently."""
    d, third = attention.head_dim, attention.heads // 3
    for layer in (attention.q, attention.k, attention.v):
        for rows in layer:
            rows[-third * d :] = rows[: third * d].clone()
    return [*range(third), *range(attention.heads - third, attention.heads)]


PLANTS = {"dead": _dead, "alike": _alike}


@pytest.mark.parametrize("kind", ["none", "bias", "ridge"])
def test_statistics_without_data_will_do(kind: str, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    dense = look(path)
    ratios = parse_ratios(
        {"version": 1, "attention": {"heads": 0.5, "qk": 0.5}, "align": 8, "compensation": {"kind": kind}}
    )
    pruned = prune(dense, ratios, SyntheticStatistics(dense))
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    assert all(w.heads == 2 for w in pruned.widths)


def test_compensation_takes_over_what_heads_leave_behind(exported: Exported, tmp_path: Path) -> None:
    """On the samples of the statistics: a refit is never worse than a restored mean, nor that than nothing."""
    path = exported(zoo.Case("timm-vit"))
    dense = look(path)
    feeds = zoo.inputs(path, 64)
    np.savez(tmp_path / "x.npz", **feeds)
    calibrate(dense, tmp_path / "x.npz", tmp_path / "s.npz", everything(dense), CalibrationOptions(threads=1))
    statistics = CalibratedStatistics(dense, tmp_path / "s.npz")
    block = dense.match.blocks[0]
    assert block.attention is not None
    assert block.attention.proj is not None
    branch = block.attention.proj.linear.output
    errors = []
    for kind in ("none", "bias", "ridge"):
        ratios = parse_ratios(
            {"version": 1, "blocks": {0: {"attention": {"heads": 0.4}}}, "compensation": {"kind": kind}}
        )
        pruned = prune(dense, ratios, statistics, check=False)
        small, whole = (_exposed(m, branch, tmp_path / f"{k}.onnx") for k, m in enumerate((pruned.model, dense.source)))
        errors.append(float(np.square(run(small, feeds)[-1] - run(whole, feeds)[-1]).mean()))
    assert errors[0] > errors[1] > errors[2] > 0


def _exposed(model: Any, tensor: str, path: Path) -> Path:
    save_model(model, path, check=False)
    proto = onnx.load(path)
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
    onnx.save(proto, path)
    return path


def test_a_refit_of_one_module_is_that_of_least_squares(exported: Exported, tmp_path: Path) -> None:
    """The new output projection against numpy's least squares on contexts computed by hand."""
    path = exported(zoo.Case("timm-vit"))
    dense = look(path)
    np.savez(tmp_path / "x.npz", **zoo.inputs(path, 16))
    calibrate(
        dense, tmp_path / "x.npz", tmp_path / "s.npz", everything(dense), CalibrationOptions(threads=1, class_weight=1)
    )
    ratios = parse_ratios({"version": 1, "blocks": {0: {"attention": {"heads": 0.4}}}, "compensation": {"ridge": 1e-9}})
    pruned = prune(dense, ratios, CalibratedStatistics(dense, tmp_path / "s.npz"), check=False)
    attention = pruned.weights[0].attention
    assert attention is not None
    assert attention.proj is not None
    linear = dense.match.blocks[0].attention.proj.linear  # type: ignore[union-attr]
    whole = _exposed(dense.source, linear.input, tmp_path / "whole.onnx")
    contexts = run(whole, zoo.inputs(path, 16))[-1].reshape(-1, linear.in_features).astype(np.float64)
    module = zoo.build("timm-vit").module
    first = next(attentions(module))
    w = first.proj.numpy().T.astype(np.float64)  # (H * d, C)
    kept = kept_heads(pruned, 0)
    columns = (kept[:, None] * first.head_dim + np.arange(first.head_dim)).reshape(-1)
    x = np.column_stack([contexts[:, columns], np.ones(len(contexts))])
    solution = np.linalg.lstsq(x, contexts @ w, rcond=None)[0]
    fitted = contexts[:, columns] @ attention.proj.weight.reshape(columns.size, -1)
    wanted = contexts[:, columns] @ solution[:-1]
    assert np.abs((fitted - fitted.mean(0)) - (wanted - wanted.mean(0))).max() < 1e-3 * np.abs(wanted).max()


def test_nothing_is_dropped_of_a_model_that_keeps_its_heads(exported: Exported) -> None:
    path = exported(zoo.Case("timm-vit"))
    _, pruned = prune_file(path, HALF | {"attention": {"heads": 0, "qk": 0.5, "select": "index", "score": "l2"}})
    assert {w.heads for w in pruned.widths} == {None}
    assert all(w.attention is not None and not w.attention.drops_heads for w in pruned.weights.values())
