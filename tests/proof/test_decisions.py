"""Where a graph chooses by score, rounding may not decide about the proof, and a wrong score may not hide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime as ort
import pytest

from tests.matching.tiny import TOKENS, WIDTH, Bend, Graph, block
from tests.pruning import UNEVEN, look
from toast_onnx import pruning as room
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import TwinError
from toast_onnx.matching.study import Study
from toast_onnx.model import Model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.proof.decisions import follow_decisions
from toast_onnx.pruning import Pruned, prune
from toast_onnx.rewriting.rewrite import rewritten


def _in_order(graph: Graph, name: str, score: str) -> str:
    """The tokens in the order of their scores, times their scores: a detector's queries."""
    top = graph.add(
        "TopK",
        score,
        graph.constant([TOKENS]),
        outputs=2,
        axis=1,
    )
    rows = graph.add("Expand", graph.add("Unsqueeze", f"{top}_1", graph.constant([2])), graph.constant([1, 1, WIDTH]))
    chosen = graph.add("GatherElements", name, rows, axis=1)
    return graph.add("Mul", chosen, graph.add("Unsqueeze", top, graph.constant([2])))


def _by_largest(graph: Graph, name: str) -> str:
    return _in_order(graph, name, graph.add("ReduceMax", name, axes=[2], keepdims=0))


def _by_last_digits(graph: Graph, name: str) -> str:
    """Scores of 1 and what rounding makes of the sine of a large number, times 1e-5."""
    large = graph.add("Mul", graph.add("ReduceMax", name, axes=[2], keepdims=0), graph.constant(1e7, np.float32))
    small = graph.add("Mul", graph.add("Sin", large), graph.constant(1e-5, np.float32))
    return _in_order(graph, name, graph.add("Add", small, graph.constant(1, np.float32)))


def detector(path: Path, end: Bend) -> Path:
    graph, y = block(end=end)
    return graph.save(path, y)


def pruned(path: Path, seed: int, **options: Any) -> tuple[Study, Pruned]:
    dense = look(path)
    return dense, prune(dense, parse_ratios(UNEVEN), SyntheticStatistics(dense), seed=seed, **options)


def _refused(path: Path, seed: int) -> bool:
    try:
        pruned(path, seed)
    except TwinError:
        return True
    return False


def _rewritten_with_other_rounding(study: Study, weights: Any) -> Model:
    """The tiny block's sums come out alike to the last digit, unlike a real model's."""
    model = rewritten(study, weights)
    name = next(n for n, array in model.arrays.items() if array.ndim == 2)
    model.arrays[name] = model.arrays[name] * np.float32(1 + 5e-7)
    return model


def test_close_scores_do_not_fail_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = detector(tmp_path / "model.onnx", _by_last_digits)
    monkeypatch.setattr(room, "rewritten", _rewritten_with_other_rounding)
    for seed in range(8):
        _, result = pruned(path, seed)
        assert result.twin is not None
        assert result.twin.worst < 1e-4
    monkeypatch.setattr(room, "follow_decisions", lambda twin, *_: (twin, ()))
    assert any(_refused(path, seed) for seed in range(8))


def test_scores_that_are_wrong_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin goes on with the pruned graph's choice, so that the scores alone can tell."""
    path = detector(tmp_path / "model.onnx", _by_largest)

    def with_wrong_scores(study: Study, weights: Any) -> Model:
        model = rewritten(study, weights)
        node = next(n for n in model.proto.graph.node if n.op_type == "ReduceMax")
        node.op_type = "ReduceMin"
        return model

    monkeypatch.setattr(room, "rewritten", with_wrong_scores)
    with pytest.raises(TwinError, match=r"first at the tensor 'ReduceMax_\d+\.out'"):
        pruned(path, 0)


def _run(model: Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(ort.InferenceSession(model.proto.SerializeToString()).run(None, feeds))


@pytest.mark.parametrize("opset", [13, 17])
def test_given_positions_replace_the_choice(opset: int, tmp_path: Path) -> None:
    """TopK's values are taken at the given positions; boxes and arguments are what was given."""
    info, make = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    nodes = [
        make("Relu", ["x"], ["scores"]),
        make(
            "TopK",
            ["scores", "two"],
            ["values", "where"],
            axis=1,
        ),
        make("ArgMax", ["scores"], ["best"], axis=1, name="best"),
    ]
    outputs = [
        info("values", onnx.TensorProto.FLOAT, [1, 2]),
        info("where", onnx.TensorProto.INT64, [1, 2]),
        info("best", onnx.TensorProto.INT64, [1, 1]),
    ]
    two = onnx.numpy_helper.from_array(np.asarray([2]), "two")
    graph = onnx.helper.make_graph(nodes, "g", [info("x", onnx.TensorProto.FLOAT, [1, 4])], outputs, [two])
    opsets = [onnx.helper.make_opsetid("", opset)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "model.onnx")
    study = look(tmp_path / "model.onnx")
    model, decisions = follow_decisions(study.source, study.source, study.facts)
    assert [(d.made, d.given, d.scores) for d in decisions] == [
        ("where", "where/given", ("scores", "values")),
        ("best", "best/given", ("scores",)),
    ]
    x = np.asarray([[3, 1, 4, 2]], np.float32)
    feeds = {"x": x, "where/given": np.asarray([[1, 0]]), "best/given": np.asarray([[3]])}
    values, where, best = _run(model, feeds)
    assert values.tolist() == [[1, 3]]
    assert where.tolist() == [[1, 0]]
    assert best.tolist() == [[3]]


def test_a_choice_among_whole_numbers_stays_the_graphs_own(tmp_path: Path) -> None:
    """CLIP's text tower finds its last token by the largest id: rounding has no part in it."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ArgMax", ["ids"], ["last"], axis=1)],
        "g",
        [info("ids", onnx.TensorProto.INT64, [1, 4])],
        [info("last", onnx.TensorProto.INT64, [1, 1])],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "model.onnx")
    study = look(tmp_path / "model.onnx")
    assert follow_decisions(study.source, study.source, study.facts) == (study.source, ())


def test_choosing_nodes_need_no_names(tmp_path: Path) -> None:
    """Exporters and optimizers leave names out; two nodes without one must not become two of one name."""

    def nameless(graph: Graph, name: str) -> str:
        end = _by_largest(graph, _by_largest(graph, name))
        for node in graph.nodes:
            node.name = "" if node.op_type == "TopK" else node.name
        return end

    path = detector(tmp_path / "model.onnx", nameless)
    _, result = pruned(path, 0)
    assert result.twin is not None
    assert sum(d.block is None for d in result.twin.differences) == 5  # two scores, two times values, the output
