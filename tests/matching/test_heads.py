"""Whole heads of a block that is bent where all heads pass: dropped and proven by the twin, or declined and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.matching.tiny import DIM, HEADS, TOKENS, WIDTH, Bend, Graph, block
from tests.pruning import look, prune_file
from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Attention

ONE: dict[str, Any] = {
    "version": 1,
    "attention": {"heads": 0.5, "select": "index", "score": "l2"},
    "compensation": {"kind": "none"},
}


def attention(path: Path) -> Attention:
    (found,) = look(path).match.blocks
    assert found.attention is not None
    return found.attention


def _position_bias(graph: Graph, name: str) -> str:
    return graph.add("Add", name, graph.random(1, HEADS, TOKENS, TOKENS), name="bias")


def _position_bias_of_a_table(graph: Graph, name: str) -> str:
    """Swin's: one row a distance, one column a head, read by index; here through a sigmoid, as its second version."""
    index = graph.constant([[abs(a - b) for b in range(TOKENS)] for a in range(TOKENS)])
    table = graph.add("Sigmoid", graph.random(TOKENS, HEADS))
    by_head = graph.add("Transpose", graph.add("Gather", table, index, axis=0), perm=[2, 0, 1])
    return graph.add("Add", name, by_head, name="bias")


def _mask(graph: Graph, name: str) -> str:
    """The same for all heads."""
    return graph.add("Add", name, graph.random(1, 1, TOKENS, TOKENS))


def _scale_of_a_head(graph: Graph, name: str) -> str:
    return graph.add("Mul", graph.random(HEADS, 1, 1), name)


def _scale_of_each_item(graph: Graph, name: str) -> str:
    pooled = graph.add("ReduceMean", "x", axes=[1], keepdims=1)  # (batch, 1, width)
    gate = graph.linear(pooled, WIDTH, HEADS, "gate")
    return graph.add(
        "Mul", name, graph.add("Transpose", graph.add("Unsqueeze", gate, graph.constant([3])), perm=[0, 2, 1, 3])
    )


def _windows(graph: Graph, name: str) -> str:
    """A mask of windows, which are counted with the batch, puts another axis in front of the heads for a moment."""
    parted = graph.add("Reshape", name, graph.constant([-1, 1, HEADS, TOKENS, TOKENS]))
    masked = graph.add("Add", parted, graph.random(1, 1, 1, TOKENS, TOKENS))
    return graph.add("Reshape", masked, graph.constant([-1, HEADS, TOKENS, TOKENS]))


def _counted_with_the_batch(graph: Graph, name: str) -> str:
    folded = graph.add("Reshape", name, graph.constant([-1, TOKENS, TOKENS]))
    clipped = graph.add("Tanh", folded)
    return graph.add("Reshape", clipped, graph.constant([-1, HEADS, TOKENS, TOKENS]))


def _shape_of_the_scores(graph: Graph, name: str) -> str:
    """A target made of the scores' own shape, and a scale made of their number of heads."""
    shape = graph.add("Shape", name)
    heads = graph.add("Cast", graph.add("Gather", shape, graph.constant([1])), to=onnx.TensorProto.FLOAT)
    return graph.add("Div", graph.add("Reshape", graph.add("Tanh", name), shape), heads)


def _scale_of_a_channel(graph: Graph, name: str) -> str:
    """Where heads and their dimensions lie on one axis."""
    flat = graph.add("Reshape", graph.add("Transpose", name, perm=[0, 2, 1, 3]), graph.constant([0, 0, WIDTH]))
    return graph.heads(graph.add("Mul", flat, graph.random(WIDTH)))


def _expanded(graph: Graph, name: str) -> str:
    largest = graph.add("ReduceMax", name, axes=[3], keepdims=1)
    return graph.add("Sub", name, graph.add("Expand", largest, graph.constant([1, HEADS, TOKENS, TOKENS])))


def _norm_of_a_head(graph: Graph, name: str) -> str:
    return graph.norm(name, DIM)


CUT: dict[str, tuple[str, Bend]] = {
    "position bias": ("scores", _position_bias),
    "position bias read from a table": ("scores", _position_bias_of_a_table),
    "mask": ("scores", _mask),
    "scale of a head": ("scores", _scale_of_a_head),
    "scale of each item and head": ("scores", _scale_of_each_item),
    "windows": ("scores", _windows),
    "heads counted with the batch": ("scores", _counted_with_the_batch),
    "shape of the scores": ("scores", _shape_of_the_scores),
    "expanded": ("scores", _expanded),
    "scale of a channel": ("q", _scale_of_a_channel),
    "q norm": ("q", _norm_of_a_head),
    "k norm": ("k", _norm_of_a_head),
}


@pytest.mark.parametrize("case", CUT)
def test_everything_between_the_layers_follows_the_heads(case: str, tmp_path: Path) -> None:
    place, bend = CUT[case]
    graph, y = block(**{place: bend})  # type: ignore[arg-type]
    path = graph.save(tmp_path / "model.onnx", y)
    assert attention(path).heads_reason is None
    _, pruned = prune_file(path, ONE, tmp_path / "pruned.onnx")
    assert pruned.twin is not None
    assert pruned.twin.batches == (1, 3)
    small = attention(tmp_path / "pruned.onnx")
    assert (small.num_heads, small.qk_dim, small.vo_dim) == (1, DIM, DIM)
    assert str(small.heads_reason) == "there is a single head"


def _scores_are_an_output(graph: Graph, name: str) -> str:
    return graph.also_output(name, "batch", HEADS, TOKENS, TOKENS)


def _heads_see_each_other(graph: Graph, name: str) -> str:
    """Every head's queries become a mixture of all heads'."""
    tokens = graph.add("Transpose", name, perm=[0, 2, 1, 3])
    alike = graph.add("MatMul", tokens, graph.add("Transpose", tokens, perm=[0, 1, 3, 2]), name="see")
    return graph.add("Transpose", graph.add("MatMul", alike, tokens), perm=[0, 2, 1, 3])


def _mean_over_heads(graph: Graph, name: str) -> str:
    return graph.add("Sub", name, graph.add("ReduceMean", name, axes=[1], keepdims=1, name="mean"))


def _other_way_round(graph: Graph, name: str) -> str:
    index = graph.constant([1, 0])
    return graph.add("Add", name, graph.add("Gather", name, index, axis=1, name="swap"))


def _norm_over_all_heads(graph: Graph, name: str) -> str:
    flat = graph.add("Reshape", graph.add("Transpose", name, perm=[0, 2, 1, 3]), graph.constant([0, 0, WIDTH]))
    return graph.heads(graph.norm(flat))


def _bias_of_every_item_and_head(graph: Graph, name: str) -> str:
    pooled = graph.linear(graph.add("ReduceMean", "x", axes=[1], keepdims=1), WIDTH, HEADS, "gate")
    item = graph.add("Reshape", pooled, graph.constant([-1, 1, 1]))  # (batch x heads, 1, 1)
    folded = graph.add("Reshape", name, graph.constant([-1, TOKENS, TOKENS]))
    return graph.add("Reshape", graph.add("Add", folded, item), graph.constant([-1, HEADS, TOKENS, TOKENS]))


def _extent_of_batch_and_heads(graph: Graph, name: str) -> str:
    folded = graph.add("Reshape", name, graph.constant([-1, TOKENS, TOKENS]), name="folded")
    shape = graph.add("Shape", folded, name="folded_shape")
    return graph.add("Reshape", graph.add("Reshape", folded, shape), graph.constant([-1, HEADS, TOKENS, TOKENS]))


def _sorted(graph: Graph, name: str) -> str:
    return graph.add("TopK", name, graph.constant([DIM]), outputs=2, name="sort")


def _read_elsewhere(graph: Graph, name: str) -> str:
    graph.also_output(graph.add("ReduceSum", name, graph.constant([3]), name="elsewhere"), "batch", HEADS, TOKENS, 1)
    return name


def _activation(graph: Graph, name: str) -> str:
    return graph.add("Relu", name, name="bent")


KEPT: dict[str, tuple[str, Bend, str]] = {
    "scores are an output": ("scores", _scores_are_an_output, "which holds all heads, is also an output of the graph"),
    "heads see each other": ("q", _heads_see_each_other, "'see' (MatMul) sums over heads"),
    "a mean over heads": ("scores", _mean_over_heads, "'mean' (ReduceMean) runs over all heads"),
    "heads swapped": ("scores", _other_way_round, "'swap' (Gather) runs over all heads"),
    "a norm over all heads": ("q", _norm_over_all_heads, "(LayerNormalization) runs over all heads"),
    "a bias of every item and head": (
        "scores",
        _bias_of_every_item_and_head,
        "for each head of each item of a dynamic",
    ),
    "an extent of batch and heads": ("scores", _extent_of_batch_and_heads, "'folded_shape' (Shape) reads an extent"),
    "an operator not known": ("q", _sorted, "'sort' (TopK) is not known to keep heads apart"),
    "Q read elsewhere": (
        "q",
        _read_elsewhere,
        "'elsewhere.out', which holds all heads, is also an output of the graph",
    ),
    "V read elsewhere": ("v", _read_elsewhere, "V is also read by 'elsewhere' (ReduceSum)"),
    "an activation on V": ("v", _activation, "V passes through 'bent' (Relu), which computes on it"),
}


@pytest.mark.parametrize("case", KEPT)
def test_heads_that_meet_are_declined_and_refused(case: str, tmp_path: Path) -> None:
    place, bend, needle = KEPT[case]
    graph, y = block(**{place: bend})  # type: ignore[arg-type]
    path = graph.save(tmp_path / "model.onnx", y)
    found = attention(path)
    assert needle in str(found.heads_reason)
    assert found.head_region is None
    with pytest.raises(MatchError, match="heads cannot be pruned") as refusal:
        prune_file(path, ONE)
    assert needle in str(refusal.value)
    _, pruned = prune_file(path, ONE, skip_unprunable=True)
    assert pruned.weights == {}
