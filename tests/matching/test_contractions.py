"""Einsum taken as a contraction: any letters, any order, kernels with heads on an axis of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from tests.matching.tiny import DIM, HEADS, TOKENS, WIDTH
from tests.pruning import UNEVEN, look, prune_file, run, worst
from toast_onnx.matching.contractions import Equation, equation, spell_contractions
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.input_shapes import input_shapes
from toast_onnx.model import load_model, save_model
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.comparing import compare
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.statistics import CalibratedStatistics

CASES = Path(__file__).parents[1] / "cases" / "graphs"
DEAD = (1, 2)  # dimensions of every head that carry nothing

#: Equations of the projections, the scores, the weighted sum and the output layer, and how kernels and biases lie.
SPELLINGS = {
    "keras": ("abc,cde->abde", "aecd,abcd->acbe", "acbe,aecd->abcd", "abcd,cde->abe", "whd", "hd"),
    "heads first": ("bnc,hdc->bhnd", "bhid,bhjd->bhij", "bhij,bhjd->bihd", "bihd,chd->bic", "hdw", "h1d"),
    "keys first": ("abc, cde -> eabd", "zbja,zbia->zbij", "zbja,zbij->biza", "bnzd,dzx->bnx", "wdh", ""),
    "kernel first": ("cde,abc->abde", "abcd,aecd->acbe", "aecd,acbe->abcd", "cde,abcd->abe", "whd", "hd"),
    "ellipsis": ("...c,cde->...de", "...qhd,...khd->...hqk", "...hqk,...khd->...qhd", "...hd,hde->...e", "whd", "hd"),
}


def attention(path: Path, spelling: str, *, dead: tuple[int, ...] = ()) -> Path:
    """A residual attention in Einsums alone; `dead` dimensions of every head are zero in Q, K and V's kernels."""
    layer, scores, weigh, output, order, bias_axes = SPELLINGS[spelling]
    rng = np.random.default_rng(0)
    size = {"w": WIDTH, "h": HEADS, "d": DIM, "1": 1}
    nodes, weights = [onnx.helper.make_node("LayerNormalization", ["x", "gain", "zero"], ["y"])], {}
    weights |= {"gain": np.ones(WIDTH), "zero": np.zeros(WIDTH), "half": np.asarray(0.5)}
    kernel_first = spelling == "kernel first"
    for n in "qkv":
        w = rng.standard_normal([size[c] for c in order])
        b = rng.standard_normal([size[c] for c in bias_axes])
        np.moveaxis(w, order.index("d"), 0)[list(dead)] = 0
        if bias_axes:
            b[..., list(dead)] = 0
        weights |= {f"w{n}": w, f"b{n}": b}
        operands = [f"w{n}", "y"] if kernel_first else ["y", f"w{n}"]
        nodes.append(onnx.helper.make_node("Einsum", operands, [f"p{n}"], name=f"p{n}", equation=layer))
        nodes.append(onnx.helper.make_node("Add", [f"p{n}", f"b{n}"], [n]))
    queries = {"keras": ["k", "q"], "keys first": ["k", "q"]}.get(spelling, ["q", "k"])
    values = {"keys first": ["v", "p"], "kernel first": ["v", "p"]}.get(spelling, ["p", "v"])
    output_axes = {"keras": "hdw", "heads first": "whd", "keys first": "dhw"}.get(spelling, "hdw")
    weights["wo"] = rng.standard_normal([size[c] for c in output_axes])
    final = ["wo", "o"] if kernel_first else ["o", "wo"]
    nodes += [
        onnx.helper.make_node("Einsum", queries, ["s"], name="scores", equation=scores),
        onnx.helper.make_node("Mul", ["s", "half"], ["scaled"]),
        onnx.helper.make_node("Softmax", ["scaled"], ["p"], axis=-1),
        onnx.helper.make_node("Einsum", values, ["o"], name="sum", equation=weigh),
        onnx.helper.make_node("Einsum", final, ["out"], name="out", equation=output),
        onnx.helper.make_node("Add", ["x", "out"], ["z"]),
    ]
    info = [onnx.helper.make_tensor_value_info(n, 1, ["batch", TOKENS, WIDTH]) for n in "xz"]
    initializers = [onnx.numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()]
    graph = onnx.helper.make_graph(nodes, "einsum", info[:1], info[1:], initializers)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


FEEDS = {"x": np.random.default_rng(1).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_letters_in_any_order(spelling: str, tmp_path: Path) -> None:
    path = attention(tmp_path / "model.onnx", spelling)
    study = look(path)
    (found,) = study.match.blocks
    assert found.attention is not None
    assert (found.attention.qk_reason, found.attention.vo_reason) == (None, None)
    assert (found.attention.num_heads, found.attention.qk_dim, found.attention.vo_dim) == (HEADS, DIM, DIM)
    assert study.match.declined == {}
    save_model(study.view.model, tmp_path / "spelled.onnx")
    assert "Einsum" not in {node.op_type for node in study.view.nodes}
    assert worst(run(tmp_path / "spelled.onnx", FEEDS), run(path, FEEDS)) < 1e-5


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_dead_dimensions_go_and_nothing_changes(spelling: str, tmp_path: Path) -> None:
    path = attention(tmp_path / "model.onnx", spelling, dead=DEAD)
    half = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "align": 1}
    _, pruned = prune_file(path, half, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert worst(run(tmp_path / "pruned.onnx", FEEDS), run(path, FEEDS)) < 1e-4
    (after,) = look(tmp_path / "pruned.onnx").match.blocks
    assert after.attention is not None
    assert (after.attention.qk_dim, after.attention.vo_dim) == (DIM // 2, DIM // 2)
    assert (tmp_path / "pruned.onnx").stat().st_size < path.stat().st_size + 4096  # tiny weights, a few nodes more


@pytest.mark.parametrize("name", ["keras_einsum.onnx", "einops_attn.onnx"])
def test_exported_einsums_are_pruned_in_all_parts(name: str, tmp_path: Path) -> None:
    dense, pruned = prune_file(CASES / name, UNEVEN, tmp_path / "pruned.onnx")
    assert len(dense.match.blocks) == 2
    assert dense.match.declined == {}
    for block in dense.match.blocks:
        assert block.attention is not None
        assert block.ffn is not None
        found = (block.attention.qk_reason, block.attention.vo_reason, block.ffn.fc1_reason, block.ffn.fc2_reason)
        assert found == (None, None, None, None)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    assert (tmp_path / "pruned.onnx").stat().st_size < (CASES / name).stat().st_size


@pytest.mark.parametrize("name", ["keras_einsum.onnx", "einops_attn.onnx"])
def test_spelled_graphs_compute_the_same(name: str, tmp_path: Path) -> None:
    save_model(look(CASES / name).view.model, tmp_path / "spelled.onnx")
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 17, 64)).astype(np.float32)}
    assert worst(run(tmp_path / "spelled.onnx", feeds), run(CASES / name, feeds)) < 1e-5


def test_spelled_graphs_are_measured(tmp_path: Path) -> None:
    """What is spelled anew lies in memory alone: sessions that measure and compare need it, too."""
    path = attention(tmp_path / "model.onnx", "keras")
    dense = look(path)
    np.savez(tmp_path / "x.npz", **FEEDS)
    calibrate(dense, tmp_path / "x.npz", tmp_path / "s.npz", everything(dense), CalibrationOptions(threads=1))
    assert CalibratedStatistics(dense, tmp_path / "s.npz").attention(0).s_qq.shape == (HEADS, DIM, DIM)
    found = compare(path, path, tmp_path / "x.npz", threads=1, rounds=0)
    assert found.outputs == {"z": {"cosine": 1.0, "relative_error": 0.0}}


@pytest.mark.parametrize(
    ("text", "ranks", "right"),
    [
        ("bhid, bhjd -> bhij", (4, 4), Equation(("bhid", "bhjd"), "bhij")),
        ("ij,jk", (2, 2), Equation(("ij", "jk"), "ik")),
        ("...i,ij->...j", (3, 2), Equation(("ZYi", "ij"), "ZYj")),
        ("...ij,...jk->...ik", (4, 3), Equation(("ZYij", "Yjk"), "ZYik")),
        ("ii,ij->j", (2, 2), None),
        ("ij,jk->k", (2, 2), None),
        ("ij,jk,kl->il", (2, 2, 2), None),
    ],
)
def test_equations(text: str, ranks: tuple[int, ...], right: Equation | None) -> None:
    names = [f"i{k}" for k in range(len(ranks))]
    assert equation(onnx.helper.make_node("Einsum", names, ["o"], equation=text), ranks) == right


def test_a_graph_without_einsum_stays_the_same_object(tmp_path: Path) -> None:
    path = attention(tmp_path / "model.onnx", "keras")
    view = GraphView(load_model(path))
    spelled = GraphView(spell_contractions(view, Facts(view, input_shapes(view, {}, 1))))
    assert spell_contractions(spelled, Facts(spelled, input_shapes(spelled, {}, 1))) is spelled.model
