"""Made-up tokens suppose a norm in front: where there is none, parts are left alone; what is lost is predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from tests import zoo
from tests.matching.small_exports import export, feeds, randomised
from tests.matching.tiny import TOKENS, WIDTH, Graph, block
from tests.pruning import look, prune_file, run, worst
from toast_onnx.choosing.losses import predicted_errors
from toast_onnx.choosing.synthetic import SyntheticStatistics, founded
from toast_onnx.importance.moments import Moments
from toast_onnx.matching.norms import norm_before
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx_cli.main import main

PARTS = ("heads", "qk", "vo", "fc1", "fc2")
HALF = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc2": 0.5}, "align": 1}


def _without(path: Path, norm: int) -> Path:
    """The tiny block without its norm in front of the attention (0) or the network (1)."""
    graph, y = block()
    model = onnx.load(graph.save(path, y))
    gone = [n for n in model.graph.node if n.op_type == "LayerNormalization"][norm]
    for node in model.graph.node:
        node.input[:] = [gone.input[0] if name == gone.output[0] else name for name in node.input]
    model.graph.node.remove(gone)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("norm", "without"), [(0, PARTS[:3]), (1, PARTS[3:])])
def test_a_missing_norm_is_seen(norm: int, without: tuple[str, ...], tmp_path: Path) -> None:
    dense = look(_without(tmp_path / "model.onnx", norm))
    assert tuple(p for p in PARTS if not founded(dense, dense.match.blocks[0], p)) == without


def _in_front(graph: Graph, kind: str) -> str:
    gain = graph.random(WIDTH)
    if kind == "spelled out":
        centred = graph.add("Sub", "x", graph.add("ReduceMean", "x", axes=[-1]))
        square = graph.add("ReduceMean", graph.add("Mul", centred, centred), axes=[-1])
        return graph.add("Mul", graph.add("Div", centred, graph.add("Sqrt", square)), gain)
    if kind == "root mean square":
        square = graph.add("ReduceMean", graph.add("Mul", "x", "x"), axes=[-1])
        return graph.add("Mul", graph.add("Mul", "x", graph.add("Reciprocal", graph.add("Sqrt", square))), gain)
    if kind == "positions added":
        return graph.add("Add", graph.norm("x"), graph.random(TOKENS, WIDTH))
    if kind == "norm behind a branch":
        return graph.add("Add", "x", graph.norm(graph.add("Relu", "x")))
    return graph.add("Add", "x", graph.add("Relu", "x"))


@pytest.mark.parametrize(
    ("kind", "right"),
    [
        ("spelled out", True),
        ("root mean square", True),
        ("positions added", True),
        ("norm behind a branch", True),
        ("none", False),
    ],
)
def test_norms_of_all_spellings_count(kind: str, right: bool, tmp_path: Path) -> None:
    graph = Graph()
    hidden = graph.add("Relu", graph.linear(_in_front(graph, kind), WIDTH, 16, "fc1"))
    y = graph.add("Add", "x", graph.linear(hidden, 16, WIDTH, "fc2"))
    dense = look(graph.save(tmp_path / "model.onnx", y))
    assert founded(dense, dense.match.blocks[0], "fc2") is right


def test_without_data_such_parts_are_left_alone_unless_forced(tmp_path: Path) -> None:
    dense = look(_without(tmp_path / "model.onnx", 1))
    ratios, statistics = parse_ratios(HALF), SyntheticStatistics(dense)
    careful = prune(dense, ratios, statistics, force_synthetic=False)
    assert careful.unfounded == (0,)
    assert careful.weights[0].attention is not None
    assert careful.weights[0].ffn is None
    assert prune(dense, ratios, statistics, force_synthetic=True).weights[0].ffn is not None
    plain = parse_ratios(HALF | {"ffn": {"fc2": 0.5, "score": "l2"}, "compensation": {"kind": "none"}})
    assert prune(dense, plain, statistics, force_synthetic=False).unfounded == (), "weights alone suppose nothing"


def test_the_summary_says_so(tmp_path: Path) -> None:
    path = _without(tmp_path / "model.onnx", 1)
    (tmp_path / "half.yaml").write_text(json.dumps(HALF))
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((32, TOKENS, WIDTH)).astype(np.float32))
    arguments = ["prune", str(path), "--ratios", str(tmp_path / "half.yaml"), "--overwrite"]
    for more, said in (([], True), (["--force-synthetic"], False), (["--data", str(tmp_path / "data.npy")], False)):
        shown = CliRunner().invoke(main, [*arguments, *more])
        assert shown.exit_code == 0, shown.output
        assert ("give --data: 1 blocks have no norm in front" in shown.output) is said
        assert "largest predicted error" in shown.output


@pytest.mark.parametrize(("removed", "warned"), [(0.0625, False), (0.9, True)])
def test_large_losses_are_warned_of(removed: float, warned: bool, tmp_path: Path) -> None:
    graph, y = block()
    path = graph.save(tmp_path / "model.onnx", y)
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "ffn": {"fc2": removed}, "align": 1}))
    shown = CliRunner().invoke(main, ["prune", str(path), "--ratios", str(tmp_path / "r.yaml")])
    assert shown.exit_code == 0, shown.output
    assert ("WARNING: 1 of 1 parts lose more" in shown.output) is warned


def test_the_predicted_error_is_the_error(tmp_path: Path) -> None:
    """Against the pruned layer's own output on tokens with just the moments that were measured."""
    graph, y = block()
    dense = look(graph.save(tmp_path / "model.onnx", y))
    the_block = dense.match.blocks[0]
    tokens = np.random.default_rng(0).standard_normal((500, 16)) @ np.random.default_rng(1).standard_normal((16, 16))

    class Measured(SyntheticStatistics):
        def hidden(self, block: int) -> Moments:
            return Moments(500.0, tokens.sum(axis=0), tokens.T @ tokens)

    ratios = parse_ratios({"version": 1, "ffn": {"fc2": 0.5}, "align": 1})
    statistics = Measured(dense)
    pruned = prune(dense, ratios, statistics)
    found = predicted_errors(
        dense, the_block, pruned.widths[0], pruned.ratios[0], "ridge", statistics, pruned.weights[0]
    )
    assert the_block.ffn is not None
    w = dense.facts.array(the_block.ffn.fc2.weight).astype(np.float64)
    new = pruned.weights[0].ffn
    assert new is not None
    assert new.units is not None
    assert new.fc2 is not None
    want, got = tokens @ w, tokens[:, new.units] @ new.fc2[0].astype(np.float64)
    lost = (want - want.mean(axis=0)) - (got - got.mean(axis=0))
    relative = np.sqrt(np.square(lost).sum() / np.square(want - want.mean(axis=0)).sum())
    assert found["fc2"] == pytest.approx(relative, rel=1e-4)
    assert found == pruned.errors[0]


def test_the_norm_before_inputs_that_were_picked_is_found_again(
    exported: Callable[[zoo.Case], Path], tmp_path: Path
) -> None:
    """A network that was pruned once reads some of its inputs: the norm in front of it gives it those entries."""
    ratios = {"version": 1, "ffn": {"fc1": 0.25, "score": "l2"}, "align": 1, "compensation": {"kind": "none"}}
    dense, pruned = prune_file(exported(zoo.Case("timm-vit")), ratios, tmp_path / "small.onnx")
    small = look(tmp_path / "small.onnx")
    for before, after in zip(dense.match.blocks, small.match.blocks, strict=True):
        assert before.ffn is not None
        assert after.ffn is not None
        kept = pruned.weights[before.index].ffn.inputs  # type: ignore[union-attr]
        norm = f"blocks.{before.index}.norm2"
        found = norm_before(small.view, small.facts, after.ffn.entries[0].input, after.ffn.in_features)
        assert found.found
        np.testing.assert_array_equal(found.gain, dense.facts.array(f"{norm}.weight")[kept])
        np.testing.assert_array_equal(found.bias, dense.facts.array(f"{norm}.bias")[kept])
        assert founded(small, after, "fc1")
    again = prune(small, parse_ratios(HALF), SyntheticStatistics(small), force_synthetic=False)
    assert again.unfounded == ()
    assert again.twin is not None
    assert again.twin.worst < 1e-4


class Decoder(nn.Module):
    """Attention from 24 channels to keys and values of 10 and 12; every second dimension of a head is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.k, self.v = nn.LayerNorm(24), nn.Linear(24, 10), nn.Linear(24, 12)
        self.attn = nn.MultiheadAttention(24, 3, kdim=10, vdim=12, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        result: torch.Tensor = x + self.attn(y, self.k(y), self.v(y), need_weights=False)[0]
        return result


def test_keys_and_values_may_be_made_of_other_tokens_than_queries(tmp_path: Path) -> None:
    module = randomised(Decoder())
    assert isinstance(module, Decoder)
    attn = module.attn
    with torch.no_grad():
        for rows in (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight, attn.out_proj.weight.T):
            rows.unflatten(0, (3, 8))[:, 1::2] = 0
        attn.in_proj_bias.unflatten(0, (3, 3, 8))[:, :, 1::2] = 0
    path = export(module, torch.randn(1, TOKENS, 24), tmp_path / "model.onnx")
    found = SyntheticStatistics(look(path)).attention(0)
    keys = attn.k_proj_weight.detach().double().numpy().reshape(3, 8, 10)  # no norm in front: isotropic tokens
    np.testing.assert_allclose(found.s_kk, keys @ keys.swapaxes(1, 2), rtol=1e-5, atol=1e-6)
    ratios = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "align": 1}
    _, pruned = prune_file(path, ratios, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    given = feeds(2, TOKENS, 24)
    assert worst(run(tmp_path / "pruned.onnx", given), run(path, given)) < 1e-4
