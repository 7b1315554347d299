"""com.microsoft attention nodes that hold the projection, its bias or packed operands: pruned, and still fused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest

from tests import zoo
from tests.matching.tiny import HEADS, HIDDEN, TOKENS, WIDTH, Graph
from tests.pruning import UNEVEN, look, prune_file, run, worst
from tests.rewriting.test_zoo_twin import TRUE_RANK
from toast_onnx.matching.blocks import Attention

DIM = 4
SPELLINGS = ("attention", "attention without bias", "attention with sizes", "bias", "packed", "packed keys", "plain")
#: Q and K to 2 dimensions, V to 3.
UNEVEN_HEADS = {
    "version": 1,
    "attention": {"qk": 0.5, "vo": 0.25, "select": "index", "score": "l2"},
    "align": 1,
    "compensation": {"kind": "none"},
}
FFN_ONLY = {"version": 1, "ffn": {"fc2": 0.5, "score": "l2"}, "align": 1, "compensation": {"kind": "none"}}


def fused(path: Path, spelling: str, **attributes: Any) -> Path:
    """The same block in every spelling: x + proj(attention(norm(x))), then a feed-forward network.

    Dimension 1 and 3 of every query and key and dimension 2 of every value are dead.
    """
    g = Graph()
    random = np.random.default_rng(1)
    y, width = g.norm("x"), HEADS * DIM
    weights = [random.standard_normal((WIDTH, HEADS, DIM)) for _ in "qkv"]
    biases = [random.standard_normal((HEADS, DIM)) * (spelling != "attention without bias") for _ in "qkv"]
    for arrays in (weights, biases):
        for array, dead in zip(arrays, ([1, 3], [1, 3], [2]), strict=True):
            array[..., dead] = 0
    attributes = {"num_heads": HEADS, "domain": "com.microsoft", "name": "fused", **attributes}
    packed = g.constant(np.concatenate([w.reshape(WIDTH, -1) for w in weights], axis=1), np.float32)
    bias = g.constant(np.concatenate([b.reshape(-1) for b in biases]), np.float32)
    scores = g.constant(random.standard_normal((1, HEADS, TOKENS, TOKENS)), np.float32)
    single = [g.constant(w.reshape(WIDTH, -1), np.float32) for w in weights]
    if spelling.startswith("attention"):
        if spelling == "attention with sizes":
            attributes |= {"qkv_hidden_sizes": [width] * 3, "scale": 0.5}
        context = g.add("Attention", y, packed, "" if "without" in spelling else bias, "", "", scores, **attributes)
    elif spelling == "packed":
        qkv = _interleaved(g, y, weights, biases)
        context = g.add("MultiHeadAttention", qkv, "", "", "", "", scores, **attributes)
    elif spelling == "packed keys":
        vector = g.constant(biases[0].reshape(-1), np.float32)
        q = g.add("Add", g.add("MatMul", y, single[0]), vector)
        kv = _interleaved(g, y, weights[1:], biases[1:])
        context = g.add("MultiHeadAttention", q, kv, "", "", "", scores, **attributes)
    else:
        products = [g.add("MatMul", y, w) for w in single]
        own = bias
        if spelling != "bias":
            vectors = [g.constant(b.reshape(-1), np.float32) for b in biases]
            products = [g.add("Add", p, v) for p, v in zip(products, vectors, strict=True)]
            own = ""
        context = g.add("MultiHeadAttention", *products, own, "", scores, **attributes)
    stream = g.add("Add", "x", g.linear(context, width, WIDTH, "proj"))
    inner = g.add("Relu", g.linear(g.norm(stream), WIDTH, HIDDEN, "fc1"))
    g.save(path, g.add("Add", stream, g.linear(inner, HIDDEN, WIDTH, "fc2")))
    model = onnx.load(path)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    return path


def _interleaved(g: Graph, y: str, weights: list[np.ndarray], biases: list[np.ndarray]) -> str:
    """One layer for several operands: (batch, tokens, heads, operands, dim)."""
    order = np.stack(weights, axis=2).reshape(WIDTH, -1)  # (WIDTH, heads, operands, dim)
    vector = np.stack(biases, axis=1).reshape(-1)
    layer = g.add("Add", g.add("MatMul", y, g.constant(order, np.float32)), g.constant(vector, np.float32))
    return g.add("Reshape", layer, g.constant([0, 0, HEADS, len(weights), DIM]))


def attention_of(path: Path) -> Attention:
    (block,) = look(path).match.blocks
    assert block.attention is not None
    return block.attention


def core(path: Path) -> onnx.NodeProto:
    return next(n for n in onnx.load(path).graph.node if n.domain == "com.microsoft")


def tokens(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).standard_normal((batch, TOKENS, WIDTH)).astype(np.float32)}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_found_and_stays_fused(spelling: str, tmp_path: Path) -> None:
    path = fused(tmp_path / "model.onnx", spelling)
    found = attention_of(path)
    assert (found.qk_reason, found.vo_reason) == (None, None)
    assert (found.num_heads, found.qk_dim, found.vo_dim) == (HEADS, DIM, DIM)
    out = tmp_path / "pruned.onnx"
    _, pruned = prune_file(path, UNEVEN_HEADS, out)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    node = core(out)
    packs = spelling in ("attention", "attention with sizes")
    assert node.op_type == ("Attention" if packs else "MultiHeadAttention")
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert values["scale"] == pytest.approx(0.5)
    if node.op_type == "Attention":
        assert values["qkv_hidden_sizes"] == [HEADS * 2, HEADS * 2, HEADS * 3]
    again = attention_of(out)
    assert (again.qk_dim, again.vo_dim) == (2, 3)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s != "attention without bias"])
def test_dead_dimensions_go_without_a_trace(spelling: str, tmp_path: Path) -> None:
    """Packed operands are not for ONNX Runtime's CPU provider: against the plain spelling. Attention without a bias
    crashes it."""
    path, out = fused(tmp_path / "model.onnx", spelling), tmp_path / "pruned.onnx"
    reference = fused(tmp_path / "plain.onnx", "plain") if spelling.startswith("packed") else path
    prune_file(path, UNEVEN_HEADS, out, check=False)
    for batch in (1, 3):
        assert worst(run(out, tokens(batch)), run(reference, tokens(batch))) < 1e-5


@pytest.mark.parametrize("dims", [{}, {"qk": 0.5, "vo": 0.25}])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_head_goes_with_its_bias_on_the_scores(spelling: str, dims: dict[str, float], tmp_path: Path) -> None:
    path, out = fused(tmp_path / "model.onnx", spelling), tmp_path / "pruned.onnx"
    fewer = UNEVEN_HEADS | {"attention": {"heads": 0.5, "select": "index", "score": "l2"} | dims}
    _, pruned = prune_file(path, fewer, out)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    node, small = core(out), attention_of(out)
    kept = "Attention" if spelling in ("attention", "attention with sizes") else "MultiHeadAttention"
    assert node.op_type == kept
    assert next(a.i for a in node.attribute if a.name == "num_heads") == 1
    expected = (1, 2, 3) if dims else (1, DIM, DIM)
    assert (small.num_heads, small.qk_dim, small.vo_dim) == expected


@pytest.mark.parametrize("part", ["qk", "vo"])
def test_one_pair_alone(part: str, tmp_path: Path) -> None:
    path = fused(tmp_path / "model.onnx", "attention")
    ratios = {**UNEVEN_HEADS, "attention": {part: 0.25, "select": "index", "score": "l2"}}
    _, pruned = prune_file(path, ratios, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert core(tmp_path / "pruned.onnx").op_type == "Attention"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_not_pruned_is_the_very_same_node(spelling: str, tmp_path: Path) -> None:
    path, out = fused(tmp_path / "model.onnx", spelling), tmp_path / "pruned.onnx"
    prune_file(path, FFN_ONLY, out, check=False)
    before, after = (list(onnx.load(p).graph.node) for p in (path, out))
    behind = next(k for k, n in enumerate(before) if n.name == "fc1/MatMul")
    assert after[:behind] == before[:behind]
    assert len(after) == len(before)


def test_nothing_removed_is_nothing_changed(tmp_path: Path) -> None:
    path = fused(tmp_path / "model.onnx", "attention")
    dense, pruned = prune_file(path, {"version": 1})
    assert pruned.model is dense.source
    assert pruned.model.proto == onnx.load(path)


@pytest.mark.parametrize(("name", "value"), [("do_rotary", 1)])
def test_attention_that_does_more_is_declined(name: str, value: int, tmp_path: Path) -> None:
    path = fused(tmp_path / "model.onnx", "attention", **{name: value})
    match = look(path).match
    assert "rotary embedding" in str(match.declined["'fused' (Attention)"])


@pytest.mark.slow
@pytest.mark.parametrize(("after", "kind"), [("ort-fused", "Attention"), ("ort-fused-mha", "MultiHeadAttention")])
def test_what_the_optimizer_fused_stays_fused(
    after: str, kind: str, exported: Callable[[zoo.Case], Path], tmp_path: Path
) -> None:
    """BERT through `onnxruntime.transformers.optimizer`: layers, bias and mask in one node."""
    out = tmp_path / "pruned.onnx"
    case = zoo.Case("hf-bert-eager", after=after)
    _, pruned = prune_file(exported(case), UNEVEN, out)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    before, after_ = (onnx.load(p, load_external_data=False).graph.node for p in (exported(case), out))
    count = sum(n.op_type == kind for n in before)
    assert sum(n.op_type == kind for n in after_) == count == 2
    assert all((a.qk_dim, a.vo_dim) == (32, 48) for b in look(out).match.blocks if (a := b.attention))
    planted = exported(zoo.Case("hf-bert-eager", planted=True, after=after))
    prune_file(planted, TRUE_RANK, out, check=False)
    for batch in (1, 3):
        feeds = zoo.inputs(planted, batch)
        assert worst(run(out, feeds), run(planted, feeds)) < 1e-4
