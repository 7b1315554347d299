"""Rotary embedding and relative-position tables in the spellings that exporters write, and what is declined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.matching.tiny import HEADS, TOKENS, WIDTH, Graph
from tests.pruning import look, prune_file, run, worst
from toast_onnx.matching.blocks import Attention
from toast_onnx.report.pruning import pruning_report

DIM = 8
HALF_QK = {
    "version": 1,
    "attention": {"qk": 0.5, "select": "index", "score": "l2"},
    "align": 1,
    "compensation": {"kind": "none"},
}
#: Takes the graph and queries or keys (batch, heads, tokens, DIM), returns what goes on to the scores.
Turn = Callable[[Any, str], str]


class Turning(Graph):
    """A graph that collects what is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[str] = []


def cut(graph: Graph, name: str, axis: int, start: int, end: int, step: int = 1) -> str:
    bounds = (graph.constant([v]) for v in (start, end, axis, step))
    return graph.add("Slice", name, *bounds)


def turned(graph: Graph, name: str, other: str, tokens: int, dims: int = DIM) -> str:
    """name * cos + other * sin, with tables (tokens, dims)."""
    first = graph.add("Mul", name, graph.random(tokens, dims))
    return graph.add("Add", first, graph.add("Mul", other, graph.random(tokens, dims)))


def interleaved(graph: Graph, name: str, tokens: int = TOKENS) -> str:
    """Dimensions 2p and 2p + 1 are a pair: negated odd ones and even ones stacked."""
    odd = graph.add("Neg", cut(graph, name, 3, 1, 2**62, 2))
    even = cut(graph, name, 3, 0, 2**62, 2)
    parts = [graph.add("Unsqueeze", part, graph.constant([-1])) for part in (odd, even)]
    stacked = graph.add("Concat", *parts, axis=-1)
    flat = graph.add("Reshape", stacked, graph.constant([0, 0, tokens, DIM]))
    return turned(graph, name, flat, tokens)


def halves(graph: Graph, name: str) -> str:
    """Dimensions p and p + DIM / 2 are a pair."""
    low, high = cut(graph, name, 3, 0, DIM // 2), cut(graph, name, -1, DIM // 2, 2**62)
    other = graph.add("Concat", graph.add("Neg", high), low, axis=-1)
    return turned(graph, name, other, TOKENS)


def split_halves(graph: Graph, name: str) -> str:
    low = graph.add("Split", name, graph.constant([DIM // 2] * 2), outputs=2, axis=-1)
    other = graph.add("Concat", graph.add("Neg", f"{low}_1"), low, axis=3)
    return turned(graph, name, other, TOKENS)


def gathered(graph: Graph, name: str) -> str:
    """The turned dimensions picked by index; the signs are in the table."""
    other = graph.add("Gather", name, graph.constant(np.arange(DIM) ^ 1), axis=3)
    return turned(graph, name, other, TOKENS)


def without_class_token(graph: Graph, name: str) -> str:
    rest = interleaved(graph, cut(graph, name, 2, 1, 2**62), TOKENS - 1)
    return graph.add("Concat", cut(graph, name, 2, 0, 1), rest, axis=2)


def half_of_the_dimensions(graph: Graph, name: str) -> str:
    """Rotary embedding of the first four dimensions only."""
    first, rest = cut(graph, name, 3, 0, 4), cut(graph, name, 3, 4, 8)
    other = graph.add("Gather", first, graph.constant([1, 0, 3, 2]), axis=-1)
    return graph.add("Concat", turned(graph, first, other, TOKENS, 4), rest, axis=-1)


def scaled(graph: Graph, name: str) -> str:
    """A number for every dimension, and no pairs."""
    return graph.add("Mul", name, graph.random(DIM))


def with_table(graph: Turning, name: str, spelling: str) -> str:
    """The tensor is read twice: by the scores, and by a product with a table along its dimensions."""
    if spelling == "einsum":
        graph.tables.append(graph.add("Einsum", name, graph.random(TOKENS, DIM), equation="bhtc,kc->bhtk"))
    else:
        graph.tables.append(graph.add("MatMul", name, graph.random(DIM, TOKENS)))
    return name


def without_prefix_tokens(graph: Graph, name: str) -> str:
    """As exported from a model that would keep its prefix tokens as they are, if it had any."""
    return graph.add("Concat", cut(graph, name, 2, 0, 0), interleaved(graph, name), axis=2)


PAIRED: dict[str, Turn] = {
    "without prefix tokens": without_prefix_tokens,
    "interleaved": interleaved,
    "halves": halves,
    "split halves": split_halves,
    "gathered": gathered,
    "without class token": without_class_token,
    "half of the dimensions": half_of_the_dimensions,
}
PARTNER = {
    "without prefix tokens": lambda e: e ^ 1,
    "interleaved": lambda e: e ^ 1,
    "halves": lambda e: (e + DIM // 2) % DIM,
    "split halves": lambda e: (e + DIM // 2) % DIM,
    "gathered": lambda e: e ^ 1,
    "without class token": lambda e: e ^ 1,
    "half of the dimensions": lambda e: e ^ 1,
}


@dataclass
class Built:
    """A saved attention and the names of Q's and K's weights and biases."""

    path: Path
    weights: dict[str, tuple[str, str]]


def attention(path: Path, q: Turn, k: Turn | None = None, dead: tuple[int, ...] = ()) -> Built:
    """Norm, attention with bent queries and keys, residual sum; `dead` dimensions of every head are zero in Q and K."""
    g = Turning()
    y = g.norm("x")
    operands, names = {}, {}
    for name in "qkv":
        layer = g.linear(y, WIDTH, HEADS * DIM, name)
        product, addition = (next(n for n in g.nodes if n.name == f"{name}/{op}") for op in ("MatMul", "Add"))
        names[name] = product.input[1], addition.input[1]
        bend = {"q": q, "k": k or q}.get(name)
        heads = g.heads(layer, DIM)
        operands[name] = bend(g, heads) if bend else heads
    for name in "qk":
        for tensor in names[name]:
            array = g.weights[tensor].reshape(-1, HEADS, DIM)
            array[:, :, list(dead)] = 0
    scores = g.add("MatMul", operands["q"], g.add("Transpose", operands["k"], perm=[0, 1, 3, 2]), name="scores")
    for table in g.tables:
        scores = g.add("Add", scores, table)
    sums = g.add("MatMul", g.add("Softmax", scores, axis=-1), operands["v"])
    merged = g.add("Reshape", g.add("Transpose", sums, perm=[0, 2, 1, 3]), g.constant([0, 0, HEADS * DIM]))
    return Built(g.save(path, g.add("Add", "x", g.linear(merged, HEADS * DIM, WIDTH, "proj"))), names)


def found(path: Path) -> Attention:
    (block,) = look(path).match.blocks
    assert block.attention is not None
    return block.attention


def feeds(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).standard_normal((batch, TOKENS, WIDTH)).astype(np.float32)}


@pytest.mark.parametrize("spelling", PAIRED)
def test_pairs_are_found_and_the_twin_passes(spelling: str, tmp_path: Path) -> None:
    built = attention(tmp_path / "model.onnx", PAIRED[spelling])
    a = found(built.path)
    assert a.qk_reason is None
    assert a.pairs is not None
    assert {tuple(sorted(pair)) for pair in a.pairs.tolist()} == {
        tuple(sorted((e, PARTNER[spelling](e)))) for e in range(DIM)
    }
    _, pruned = prune_file(built.path, HALF_QK, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    q = pruned.weights[0].attention.q  # type: ignore[union-attr]
    assert q is not None
    assert all({PARTNER[spelling](e) for e in head} == set(head) for head in q.slots.tolist())
    assert found(tmp_path / "pruned.onnx").qk_dim == DIM // 2


@settings(max_examples=40)
@given(spelling=st.sampled_from(sorted(PAIRED)), first=st.integers(0, DIM - 1), second=st.integers(0, DIM - 1))
def test_dead_pairs_go_without_a_trace(
    spelling: str, first: int, second: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any two pairs; the reference is the dense graph itself."""
    partner = PARTNER[spelling]
    dead = {first, partner(first), second, partner(second)}
    if len(dead) < 4:
        dead |= next({e, partner(e)} for e in range(DIM) if e not in dead)
    folder = tmp_path_factory.mktemp("dims")
    built = attention(folder / "model.onnx", PAIRED[spelling], dead=tuple(dead))
    _, pruned = prune_file(built.path, HALF_QK, folder / "pruned.onnx", check=False)
    q = pruned.weights[0].attention.q  # type: ignore[union-attr]
    assert q is not None
    assert set(q.slots[0].tolist()) == set(range(DIM)) - dead
    assert worst(run(folder / "pruned.onnx", feeds(3)), run(built.path, feeds(3))) < 1e-5


@pytest.mark.parametrize("spelling", ["einsum", "matmul"])
def test_tables_lose_the_same_dimensions_of_every_head(spelling: str, tmp_path: Path) -> None:
    dead = (0, 3, 4, 6)
    built = attention(tmp_path / "model.onnx", lambda g, n: with_table(g, n, spelling), lambda _, n: n, dead)
    a = found(built.path)
    assert a.qk_reason is None
    assert a.pairs is None
    prune_file(built.path, HALF_QK, tmp_path / "pruned.onnx")
    assert worst(run(tmp_path / "pruned.onnx", feeds(2)), run(built.path, feeds(2))) < 1e-5
    shapes = {tuple(t.dims) for t in onnx.load(tmp_path / "pruned.onnx").graph.initializer}
    assert shapes & {(TOKENS, DIM // 2), (DIM // 2, TOKENS)}  # an Einsum may become a MatMul


def pooled(graph: Graph, name: str) -> str:
    """The largest of a group of tokens, for every dimension, as Hiera pools its queries; here each group has one."""
    grouped = graph.add("Reshape", name, graph.constant([0, 0, 1, TOKENS, DIM]))
    return graph.add("ReduceMax", grouped, axes=[2], keepdims=0)


def pooled_image(graph: Graph, name: str) -> str:
    """SAM 2's queries: heads and dimensions are channels of an image while it is pooled."""
    merged = graph.add("Reshape", graph.add("Transpose", name, perm=[0, 2, 1, 3]), graph.constant([0, 1, TOKENS, -1]))
    image = graph.add("Transpose", merged, perm=[0, 3, 1, 2])
    largest = graph.add("MaxPool", image, kernel_shape=[1, 3], pads=[0, 1, 0, 1])
    shape = graph.constant([0, TOKENS, HEADS, DIM])
    tokens = graph.add("Reshape", graph.add("Transpose", largest, perm=[0, 2, 3, 1]), shape)
    return graph.add("Transpose", tokens, perm=[0, 2, 1, 3])


@pytest.mark.parametrize("pool", [pooled, pooled_image])
def test_pooled_queries_lose_dead_dimensions_without_a_trace(pool: Turn, tmp_path: Path) -> None:
    dead = (0, 3, 4, 6)
    built = attention(tmp_path / "model.onnx", pool, lambda _, n: n, dead)
    a = found(built.path)
    assert (a.qk_reason, a.pairs, a.folds) == (None, None, False)
    _, pruned = prune_file(built.path, HALF_QK, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert worst(run(tmp_path / "pruned.onnx", feeds(3)), run(built.path, feeds(3))) < 1e-5
    assert found(tmp_path / "pruned.onnx").qk_dim == DIM // 2


def test_pooling_over_dimensions_is_declined(tmp_path: Path) -> None:
    def over_dimensions(graph: Graph, name: str) -> str:
        largest = graph.add("ReduceMax", name, axes=[3], keepdims=1, name="largest")
        return graph.add("Concat", *[largest] * DIM, axis=3)

    reason = found(attention(tmp_path / "model.onnx", over_dimensions, lambda _, n: n).path).qk_reason
    assert "'largest' (ReduceMax) pools different dimensions of a head" in str(reason)


def test_a_basis_falls_back_to_shared_dimensions(tmp_path: Path) -> None:
    """`select: subspace` is the default; Q and K that are turned keep pairs, V keeps its basis."""
    built = attention(tmp_path / "model.onnx", halves)
    out = tmp_path / "pruned.onnx"
    dense, pruned = prune_file(built.path, {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "align": 1}, out)
    weights = pruned.weights[0].attention
    assert weights is not None
    assert weights.q is not None
    assert weights.v is not None
    assert not weights.q.is_basis
    assert weights.v.is_basis
    assert (weights.q.slots == weights.q.slots[0]).all()
    (block,) = pruning_report(pruned, dense, out, {})["blocks"]
    assert block["kept"]["qk"] == weights.q.slots.tolist()
    assert block["kept"]["vo"] == "basis"
    assert "pairs of dimensions are kept in every head" in block["notes"][0]


def test_an_odd_count_becomes_even(tmp_path: Path) -> None:
    built = attention(tmp_path / "model.onnx", interleaved)
    _, pruned = prune_file(built.path, HALF_QK | {"attention": {"qk": 0.6, "select": "index", "score": "l2"}})
    assert pruned.widths[0].qk == 4  # 8 x 0.4 is about 3


def test_single_dimensions_may_be_scaled(tmp_path: Path) -> None:
    built = attention(tmp_path / "model.onnx", scaled)
    a = found(built.path)
    assert a.qk_reason is None
    assert a.pairs is None
    assert not a.folds
    prune_file(built.path, HALF_QK)


def test_dimensions_that_meet_in_the_scores_stay_together(tmp_path: Path) -> None:
    """Queries change places in twos and are scaled, keys are not: dimension 0 of Q meets dimension 1 of K."""

    def swapped(graph: Graph, name: str) -> str:
        return scaled(graph, graph.add("Gather", scaled(graph, name), graph.constant(np.arange(DIM) ^ 1), axis=3))

    built = attention(tmp_path / "model.onnx", swapped, lambda _, n: n, (0, 1, 4, 5))
    pairs = found(built.path).pairs
    assert pairs is not None
    assert pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    prune_file(built.path, HALF_QK, tmp_path / "pruned.onnx")
    assert worst(run(tmp_path / "pruned.onnx", feeds(2)), run(built.path, feeds(2))) < 1e-5


def _three_turned(graph: Graph, name: str) -> str:
    other = graph.add("Gather", name, graph.constant(np.roll(np.arange(DIM), 1)), axis=3)
    return turned(graph, name, other, TOKENS)


def _shifted(graph: Graph, name: str) -> str:
    return graph.add("Add", name, graph.random(DIM), name="shift")


def _read_elsewhere(graph: Graph, name: str) -> str:
    made = interleaved(graph, name)
    graph.also_output(graph.add("ReduceSum", made, graph.constant([3]), name="elsewhere"), "batch", HEADS, TOKENS, 1)
    return made


def _an_output(graph: Graph, name: str) -> str:
    return graph.also_output(halves(graph, name), "batch", HEADS, TOKENS, DIM)


def _squared(graph: Graph, name: str) -> str:
    return graph.add("Mul", name, name, name="square")


def _self_gated(graph: Graph, name: str) -> str:
    return graph.add("Mul", name, graph.add("Sigmoid", name), name="gate")


def _table_of_the_input(graph: Turning, name: str) -> str:
    flipped = graph.add("Transpose", graph.add("Sin", "x"), perm=[0, 2, 1])  # (batch, WIDTH = DIM, tokens)
    graph.tables.append(graph.add("Einsum", name, flipped, equation="bhtc,bck->bhtk"))
    return name


DECLINED: dict[str, tuple[Turn, str]] = {
    "a turn of all dimensions": (_three_turned, "mixed with each other"),
    "an offset": (_shifted, "adds something to single dimensions"),
    "turned queries read elsewhere": (_read_elsewhere, "read by 'elsewhere'"),
    "turned queries an output": (_an_output, "also an output of the graph"),
    "a square": (_squared, "not linear"),
    "a gate": (_self_gated, "read by"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_no_rotation_says_why(case: str, tmp_path: Path) -> None:
    bend, needle = DECLINED[case]
    built = attention(tmp_path / "model.onnx", bend, lambda _, n: n)
    assert needle in str(found(built.path).qk_reason)


def test_rotations_of_q_and_k_must_pair_alike(tmp_path: Path) -> None:
    """Interleaved queries against keys in halves: four dimensions hang together."""
    built = attention(tmp_path / "model.onnx", interleaved, halves)
    assert "up to 4 dimensions" in str(found(built.path).qk_reason)


def test_a_table_that_is_computed_is_gathered(tmp_path: Path) -> None:
    """From the input, not from Q, K or V: cut at run time."""
    built = attention(tmp_path / "model.onnx", _table_of_the_input, lambda _, n: n, (1, 2, 5, 7))
    assert found(built.path).qk_reason is None
    prune_file(built.path, HALF_QK, tmp_path / "pruned.onnx")
    assert worst(run(tmp_path / "pruned.onnx", feeds(2)), run(built.path, feeds(2))) < 1e-5
