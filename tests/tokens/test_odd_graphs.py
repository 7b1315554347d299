"""Graphs that merging must decline, and proofs that must prove something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.tokens.odd_graphs import Encoder
from toast_onnx.engines.precision import convert_precision
from toast_onnx.errors import ModelError, TwinError
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, save_model
from toast_onnx.proof.inputs import twin_inputs
from toast_onnx.reasons import Reason
from toast_onnx.tokens import nodes, rewrite
from toast_onnx.tokens.points import study_tokens
from toast_onnx.tokens.rewrite import WrittenMerge, write_merging
from toast_onnx.tokens.twin import prove_merging


def merged(dense: Study, metric: str = "auto") -> tuple[Model, tuple[WrittenMerge, ...]]:
    tokens = study_tokens(dense)
    return write_merging(dense, tokens, dict.fromkeys(tokens.mergeable, 2), metric)


def proven(dense: Study, metric: str = "auto") -> float:
    model, merges = merged(dense, metric)
    return prove_merging(dense, model, merges, twin_inputs(dense)).worst


def reasons(dense: Study) -> list[Reason | None]:
    return [point.reason for point in study_tokens(dense).points]


def test_numbers_that_are_none_prove_nothing(tmp_path: Path) -> None:
    """The root of a negative input is NaN in both graphs, whatever they compute."""
    graph = Encoder()
    x = graph.block(graph.block(graph.sequence(graph.add("Sqrt", "x"))))
    dense = graph.study(graph.mean(x), tmp_path)
    model, merges = merged(dense)
    feeds = {"x": np.full(dense.counted_shapes["x"], -1, np.float32)}
    with pytest.raises(TwinError, match="no finite number"):
        prove_merging(dense, model, merges, [feeds])
    with pytest.raises(ModelError, match="no finite number on made-up inputs"):
        twin_inputs(dense)


def test_tokens_read_inside_a_body_are_declined(tmp_path: Path) -> None:
    """A branch that small batches never take: no proof would see it."""
    graph = Encoder()
    x = graph.block(graph.block(graph.sequence()))
    batch = graph.add("Gather", graph.add("Shape", "x"), graph.constant(0), axis=0)
    mean = helper.make_node("ReduceMean", [x], ["mean"], axes=[1], keepdims=0)
    token = graph.add("Gather", x, graph.constant(0), axis=1)
    same = helper.make_node("Identity", [token], ["same"])
    bodies = [
        helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])
        for node, name in ((mean, "mean"), (same, "same"))
    ]
    y = graph.add("If", graph.add("Greater", batch, graph.constant(100)), then_branch=bodies[0], else_branch=bodies[1])
    found = reasons(graph.study(y, tmp_path))
    assert len(found) == 2
    assert all("reads tokens inside its body" in str(reason) for reason in found)


@pytest.mark.parametrize("bias", [0.0, 100.0])
def test_choices_among_nearly_equal_keys_are_checked(
    bias: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph = Encoder()
    x = graph.sequence()
    for _ in range(3):
        x = graph.block(x, bias)
    dense = graph.study(graph.mean(x), tmp_path)
    assert proven(dense, "keys-by-head") < 1e-4
    original = nodes.write_match

    def blind(w: Any, metric: str, merge: Any, weights: str | None) -> Any:
        seen = w.edit.constant(f"{w.name}/seen", np.float32([1] * 4 + [0] * 12))
        return original(w, w.one("Mul", [metric, seen]), merge, weights)

    monkeypatch.setattr(rewrite, "write_match", blind)
    with pytest.raises(TwinError, match="not the most alike"):
        proven(dense, "keys-by-head")


def test_a_long_skip_is_declined_where_it_joins(tmp_path: Path) -> None:
    graph = Encoder()
    early = graph.block(graph.sequence())
    x = graph.block(early)
    x = graph.block(graph.add("Add", x, graph.linear(early, 16, 16)))
    dense = graph.study(graph.mean(graph.block(x)), tmp_path)
    assert any("different places" in str(reason) for reason in reasons(dense))
    assert proven(dense) < 1e-4  # what is left merges


def test_a_class_token_below_positions_repeated_for_the_batch_is_found(tmp_path: Path) -> None:
    graph = Encoder()
    dense = graph.study(graph.mean(graph.block(graph.sequence(expanded=True))), tmp_path)
    (sequence,) = study_tokens(dense).sequences
    assert (sequence.count, sequence.front, sequence.back) == (17, 1, 0)


def test_places_stay_whole_numbers_in_half_precision(tmp_path: Path) -> None:
    """In bfloat16 257 is 256: tokens would be given back at their neighbours' places."""
    graph = Encoder()
    dense = graph.study(graph.block(graph.block(graph.sequence())), tmp_path)
    model, merges = merged(dense)
    assert merges
    save_model(model, tmp_path / "merged.onnx")
    proto, _ = convert_precision(onnx.load(tmp_path / "merged.onnx"), "bf16")
    kinds = {t.name: t.data_type for t in proto.graph.initializer if t.name.endswith(("/ranks", "/fixed"))}
    assert kinds
    assert set(kinds.values()) == {onnx.TensorProto.INT64}


def test_probabilities_as_an_output_are_declined(tmp_path: Path) -> None:
    graph = Encoder()
    graph.block(graph.block(graph.sequence()))
    softmax = [node.output[0] for node in graph.nodes if node.op_type == "Softmax"][-1]
    found = reasons(graph.study(softmax, tmp_path))
    assert all(reason is not None for reason in found)
