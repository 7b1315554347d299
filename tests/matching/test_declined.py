"""Graphs that look like a block but must not be taken for one, or not in every part: each says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.matching.tiny import DIM, HEADS, HIDDEN, TOKENS, WIDTH, Graph, block
from tests.pruning import look, prune_file, run, worst
from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Match
from toast_onnx.reasons import Kind, Reason

INDEX = {"select": "index", "score": "l2"}


def ratios(part: str) -> dict[str, Any]:
    """Asks for one part alone."""
    room = "attention" if part in ("qk", "vo") else "ffn"
    settings = {part: 0.5, **(INDEX if room == "attention" else {"score": "l2"})}
    return {"version": 1, room: settings, "align": 1, "compensation": {"kind": "none"}}


def reasons(path: Path) -> dict[str, Reason | None]:
    """Why each part of the only block cannot be pruned."""
    (found,) = look(path).match.blocks
    assert found.attention is not None
    assert found.ffn is not None
    return {
        "qk": found.attention.qk_reason,
        "vo": found.attention.vo_reason,
        "fc1": found.ffn.fc1_reason,
        "fc2": found.ffn.fc2_reason,
    }


def said(match: Match) -> dict[str, str]:
    """Texts of what was declined."""
    return {node: str(reason) for node, reason in match.declined.items()}


def test_the_straight_block_is_prunable_in_every_part(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    graph, y = block()
    path = graph.save(tmp_path / "model.onnx", y)
    assert reasons(path) == {"qk": None, "vo": None, "fc1": None, "fc2": None}
    for part in ("qk", "vo", "fc1", "fc2"):
        _, pruned = prune_file(path, ratios(part), tmp_path / f"{part}.onnx")
        assert pruned.twin is not None
        assert pruned.twin.batches == (1, 3)


def _read_elsewhere(graph: Graph, name: str) -> str:
    graph.also_output(graph.add("ReduceSum", name, graph.constant([3]), name="elsewhere"), "batch", 2, TOKENS, 1)
    return name


def _also_an_output(graph: Graph, name: str) -> str:
    return graph.also_output(name, "batch", 2, TOKENS, DIM)


def _norm_of_a_head(graph: Graph, name: str) -> str:
    return graph.norm(name, DIM)


def _two_layers(graph: Graph, name: str) -> str:
    other = graph.heads(graph.linear("x", WIDTH, WIDTH, f"second_{len(graph.nodes)}"))
    return graph.add("Concat", name, other, axis=2)


def _sum_of_two_layers(graph: Graph, name: str) -> str:
    return graph.add("Add", name, graph.heads(graph.linear("x", WIDTH, WIDTH, "second")), name="sum_of_two")


def _activation(graph: Graph, name: str) -> str:
    return graph.add("Relu", name, name="bent")


def _norm_of_the_context(graph: Graph, name: str) -> str:
    return graph.norm(name)


def _norm_of_the_hidden_units(graph: Graph, name: str) -> str:
    return graph.norm(name, HIDDEN)


def _hidden_read_elsewhere(graph: Graph, name: str) -> str:
    graph.also_output(graph.add("ReduceSum", name, graph.constant([2]), name="elsewhere"), "batch", TOKENS, 1)
    return name


def _hidden_output(graph: Graph, name: str) -> str:
    return graph.also_output(name, "batch", TOKENS, HIDDEN)


BENT = {
    # what bends, how, the part that suffers, what the reason must say, its kind
    "Q read elsewhere": ("q", _read_elsewhere, "qk", "Q is also read by 'elsewhere' (ReduceSum)", Kind.READ),
    "Q also an output": ("q", _also_an_output, "qk", "Q is also an output of the graph", Kind.OUTPUT),
    "K read elsewhere": ("k", _read_elsewhere, "qk", "K is also read by 'elsewhere' (ReduceSum)", Kind.READ),
    "V read twice": ("v", _read_elsewhere, "vo", "V is also read by 'elsewhere' (ReduceSum)", Kind.READ),
    "q norm": ("q", _norm_of_a_head, "qk", "across the channels of a head (q/k norm)", Kind.COMPUTED),
    "k norm": ("k", _norm_of_a_head, "qk", "across the channels of a head (q/k norm)", Kind.COMPUTED),
    "an activation on V": (
        "v",
        _activation,
        "vo",
        "V passes through 'bent' (Relu), which computes on it",
        Kind.COMPUTED,
    ),
    "two layers for K": ("k", _sum_of_two_layers, "qk", "K comes from 2 linear layers", Kind.NO_LAYER),
    "a norm in front of the projection": (
        "context",
        _norm_of_the_context,
        "vo",
        "before the output projection",
        Kind.COMPUTED,
    ),
    "hidden units read elsewhere": (
        "activated",
        _hidden_read_elsewhere,
        "fc2",
        "the hidden activation is also read by 'elsewhere'",
        Kind.READ,
    ),
    "hidden units an output": (
        "hidden",
        _hidden_output,
        "fc2",
        "the hidden activation is also an output of the graph",
        Kind.OUTPUT,
    ),
}


@pytest.mark.parametrize("case", BENT)
def test_a_bent_part_says_why_and_is_refused(case: str, tmp_path: Path) -> None:
    place, bend, part, needle, kind = BENT[case]
    graph, y = block(**{place: bend})  # type: ignore[arg-type]
    path = graph.save(tmp_path / "model.onnx", y)
    found = reasons(path)
    reason = found[part]
    assert reason is not None
    assert needle in str(reason)
    assert (reason.first or reason).kind == kind
    assert [p for p, reason in found.items() if reason is not None] == [part]  # the other parts do not suffer
    with pytest.raises(MatchError, match="cannot be pruned") as refusal:
        prune_file(path, ratios(part))
    assert needle in str(refusal.value)
    _, pruned = prune_file(path, ratios(part), skip_unprunable=True)
    assert pruned.weights == {}
    for other in {"qk", "vo", "fc2"} - {part}:  # and can still be pruned, proven by the twin
        prune_file(path, ratios(other))


def test_small_learned_queries_that_are_repeated_for_the_batch_are_tokens(tmp_path: Path) -> None:
    """Their values are known at every batch size, and still they go through a layer."""

    def queries(graph: Graph, _: str) -> str:
        batch = graph.add("Slice", graph.add("Shape", "x"), graph.constant([0]), graph.constant([1]))
        repeats = graph.add("Concat", batch, graph.constant([1, 1]), axis=0)
        repeated = graph.add("Tile", graph.random(1, TOKENS, WIDTH), repeats)
        scaled = graph.add("Mul", graph.linear(repeated, WIDTH, WIDTH, "learned"), graph.constant(0.5, np.float32))
        return graph.heads(scaled)

    graph, y = block(q=queries)
    path = graph.save(tmp_path / "model.onnx", y)
    assert reasons(path)["qk"] is None
    _, pruned = prune_file(path, ratios("qk"), tmp_path / "pruned.onnx")
    assert pruned.twin is not None


def test_two_layers_side_by_side_for_one_operand(tmp_path: Path) -> None:
    """Keys and values of more tokens than queries, from two layers each, as in cross-attention with registers."""
    graph, y = block(k=_two_layers, v=_two_layers)
    found = reasons(graph.save(tmp_path / "model.onnx", y))
    assert "K comes from 2 linear layers" in str(found["qk"])
    assert "V comes from 2 linear layers" in str(found["vo"])
    assert found["fc2"] is None


def test_a_scale_that_is_computed_from_the_shape_is_frozen(tmp_path: Path) -> None:
    """1/sqrt of the queries' last extent: 0.5 with 4 dimensions, and still 0.5 with the 2 that are kept."""

    def scaled(graph: Graph, name: str) -> str:
        extent = graph.add("Slice", graph.add("Shape", name), graph.constant([3]), graph.constant([4]))
        root = graph.add("Sqrt", graph.add("Cast", extent, to=1))
        return graph.add("Div", name, root)

    graph, y = block(q=scaled)
    path = graph.save(tmp_path / "model.onnx", y)
    assert set(reasons(path).values()) == {None}
    _, pruned = prune_file(path, ratios("qk"))
    assert pruned.twin is not None
    (found,) = look(path).match.blocks
    assert found.attention is not None
    assert found.attention.q is not None
    assert found.attention.q.walk.scale == pytest.approx(0.5)


def test_softmax_over_another_axis_is_no_attention(tmp_path: Path) -> None:
    graph, y = block(axis=2)
    match = look(graph.save(tmp_path / "model.onnx", y)).match
    assert [b.attention for b in match.blocks] == [None]
    assert said(match) == {"'softmax' (Softmax)": "this Softmax runs over axis 2, not over the one of the keys"}


def test_scores_that_are_transposed_are_no_attention(tmp_path: Path) -> None:
    """As many queries as keys, so that the shapes alone would not tell."""
    graph, y = block(scores=lambda g, name: g.add("Transpose", name, perm=[0, 1, 3, 2]))
    match = look(graph.save(tmp_path / "model.onnx", y)).match
    assert [b.attention for b in match.blocks] == [None]
    assert said(match) == {"'softmax' (Softmax)": "this Softmax runs over axis -1, not over the one of the keys"}


def test_behind_an_inner_norm_units_are_selected_in_front_of_fc2(tmp_path: Path) -> None:
    """The norm needs every unit, so fc1 keeps its width and fc2 alone shrinks; never a wrong answer."""
    graph, y = block(activated=_norm_of_the_hidden_units)
    path, out = graph.save(tmp_path / "model.onnx", y), tmp_path / "new.onnx"
    assert reasons(path)["fc2"] is None
    _, pruned = prune_file(path, ratios("fc2"), out)
    assert pruned.twin is not None
    sizes = {tuple(t.dims) for t in onnx.load(out).graph.initializer}
    assert {(WIDTH, HIDDEN), (HIDDEN // 2, WIDTH)} <= sizes


def test_a_softmax_over_the_output_is_not_worth_a_word(tmp_path: Path) -> None:
    """Classifiers end in one; only what looks like attention is reported."""
    graph, y = block(end=lambda g, name: g.add("Softmax", name, axis=-1))
    match = look(graph.save(tmp_path / "model.onnx", y)).match
    assert match.declined == {}
    assert len(match.blocks) == 1


def test_a_softmax_that_weighs_activations_says_that_it_has_no_scores(tmp_path: Path) -> None:
    def pool(graph: Graph, name: str) -> str:
        weights = graph.add("Softmax", graph.add("Sin", name), axis=-1, name="pool")
        return graph.add("MatMul", weights, graph.add("MatMul", graph.add("Transpose", name, perm=[0, 2, 1]), name))

    graph, y = block(end=pool)
    match = look(graph.save(tmp_path / "model.onnx", y)).match
    assert said(match) == {"'pool' (Softmax)": "the scores before this Softmax are no product of two activations"}


def _mixed_tokens(graph: Graph, probabilities: str, values: str) -> str:
    """A learned matrix over keys; only heads may be mixed."""
    mixed = graph.add("MatMul", probabilities, graph.random(TOKENS, TOKENS), name="over_keys")
    return graph.add("MatMul", mixed, values)


def _weighted_by_something(graph: Graph, probabilities: str, values: str) -> str:
    """Heads added up with weights that come from elsewhere."""
    last = graph.add("Transpose", probabilities, perm=[0, 2, 3, 1], name="heads_last")
    gates = graph.add("Sigmoid", graph.add("ReduceMean", "x", axes=[1, 2], keepdims=1))
    mixed = graph.add("MatMul", graph.add("Mul", last, gates), graph.random(HEADS, HEADS))
    return graph.add("MatMul", graph.add("Transpose", mixed, perm=[0, 3, 1, 2]), values)


@pytest.mark.parametrize(
    ("weigh", "by"),
    [(_mixed_tokens, "over_keys' (MatMul)"), (_weighted_by_something, "heads_last' (Transpose)")],
)
def test_probabilities_that_do_not_weigh_values_as_they_are(weigh: Any, by: str, tmp_path: Path) -> None:
    graph, y = block(weigh=weigh)
    match = look(graph.save(tmp_path / "model.onnx", y)).match
    assert [b.attention for b in match.blocks] == [None]
    (reason,) = match.declined.values()
    assert reason.kind == Kind.NO_ATTENTION
    assert (reason.node or "").startswith(f"'{by}")
    assert str(reason) == f"{reason.node} takes the probabilities of this Softmax before they meet another activation"


def test_values_before_probabilities(tmp_path: Path) -> None:
    """Attention over images with channels first: V P^T is (P V^T)^T."""

    def channels_first(graph: Graph, probabilities: str, values: str) -> str:
        turned = [graph.add("Transpose", t, perm=[0, 1, 3, 2]) for t in (values, probabilities)]
        return graph.add("Transpose", graph.add("MatMul", *turned, name="sum"), perm=[0, 1, 3, 2])

    graph, y = block(weigh=channels_first)
    path = graph.save(tmp_path / "model.onnx", y)
    assert reasons(path) == {"qk": None, "vo": None, "fc1": None, "fc2": None}
    for part in ("qk", "vo"):
        _, pruned = prune_file(path, ratios(part), tmp_path / f"{part}.onnx")
        assert pruned.twin is not None
        assert pruned.twin.worst < 1e-5
    feeds = {"x": np.random.default_rng(0).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)}
    prune_file(path, ratios("fc1") | {"ffn": {"fc1": 0}}, tmp_path / "same.onnx")
    assert worst(run(tmp_path / "same.onnx", feeds), run(path, feeds)) < 1e-5


@pytest.mark.parametrize("way", ["added", "stacked"])
def test_parallel_networks_join_the_stream_together(way: str, tmp_path: Path) -> None:
    """x + f(x) + g(x), whether added one by one or stacked and summed."""

    def beside(graph: Graph, name: str) -> str:
        read = next(node for node in graph.nodes if node.name == "fc1/MatMul").input[0]
        inner = graph.add("Relu", graph.linear(read, WIDTH, HIDDEN, "other/fc1"))
        other = graph.linear(inner, HIDDEN, WIDTH, "other/fc2")
        if way == "added":
            return graph.add("Add", other, name)
        stacked = graph.add("Concat", *(graph.add("Unsqueeze", t, graph.constant([0])) for t in (name, other)), axis=0)
        return graph.add("ReduceSum", stacked, graph.constant([0]), keepdims=0)

    graph, y = block(ffn=beside)
    path = graph.save(tmp_path / "model.onnx", y)
    match = look(path).match
    assert sum(b.ffn is not None for b in match.blocks) == 2
    _, pruned = prune_file(path, ratios("fc2"), tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5


def test_layers_that_join_no_residual_stream_are_no_feed_forward_network(tmp_path: Path) -> None:
    """Heads and necks are two layers with an activation between, too."""
    graph, y = block(residual=False)
    match = look(graph.save(tmp_path / "model.onnx", y)).match
    assert [b.ffn for b in match.blocks] == [None]
    (reason,) = match.declined.values()
    assert "joined by relu, but their output joins no residual stream" in str(reason)


def test_hidden_units_times_an_input_are_no_matter_of_the_layers_alone(tmp_path: Path) -> None:
    """A gate that is an input of the graph, as wide as the hidden layer: declined aloud, never passed over."""
    graph, y = block(activated=lambda g, name: g.add("Mul", name, "gate"))
    path = graph.save(tmp_path / "model.onnx", y)
    model = onnx.load(path)
    model.graph.input.append(onnx.helper.make_tensor_value_info("gate", onnx.TensorProto.FLOAT, [TOKENS, HIDDEN]))
    onnx.save(model, path)
    match = look(path).match
    assert [b.ffn for b in match.blocks] == [None]
    assert said(match) == {
        "'fc2/MatMul' (MatMul)": "the hidden channels before 'fc2/MatMul' (MatMul) are joined with 'gate'"
    }


def test_layers_of_different_tensors_that_are_joined_say_so(tmp_path: Path) -> None:
    def gated(graph: Graph, name: str) -> str:
        return graph.add("Mul", name, graph.linear("x", WIDTH, HIDDEN, "gate"))

    graph, y = block(activated=gated)
    match = look(graph.save(tmp_path / "model.onnx", y)).match
    assert [b.ffn for b in match.blocks] == [None]
    (reason,) = match.declined.values()
    assert "read different tensors" in str(reason)


def test_quantized_weights_say_prune_first(tmp_path: Path) -> None:
    def quantized(graph: Graph, name: str) -> str:
        values = graph.constant(np.ones((WIDTH, WIDTH)), np.int8)
        scale, zero = graph.constant(0.1, np.float32), graph.constant(0, np.int8)
        weight = graph.add("DequantizeLinear", values, scale, zero)
        return graph.heads(graph.add("MatMul", "x", weight, name="int8"))

    graph, y = block(v=quantized)
    found = reasons(graph.save(tmp_path / "model.onnx", y))
    assert str(found["vo"]) == "the weights of V are quantized; prune first, then quantize"
