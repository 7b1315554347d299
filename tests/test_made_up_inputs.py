"""What is made up where nothing is given must be what the model takes: sizes by symbol, masks by their meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from tests.matching.tiny import TOKENS, Graph, block
from tests.pruning import UNEVEN, look, prune_file
from toast_onnx.runtime import candidate_inputs

CASES = Path(__file__).parent / "cases" / "graphs"


def _model(path: Path, **inputs: list[int | str]) -> Path:
    """A graph whose inputs have these axes and that does nothing with them."""
    info = [onnx.helper.make_tensor_value_info(name, 1, axes) for name, axes in inputs.items()]
    out = [onnx.helper.make_tensor_value_info("y", 1, None)]
    nodes = [onnx.helper.make_node("Identity", [next(iter(inputs))], ["y"])]
    graph = onnx.helper.make_graph(nodes, "inputs", info, out)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("inputs", "right"),
    [
        ({"x": [16, "b", 64], "mask": ["b", 16]}, {"x": (16, 1, 64), "mask": (1, 16)}),
        ({"x": ["n", 1, 64], "mask": ["n", "n"]}, {"x": (16, 1, 64), "mask": (16, 16)}),
        ({"ids": ["b", "n"], "mask": ["b", 1, "n", "n"]}, {"ids": (1, 16), "mask": (1, 1, 16, 16)}),
        ({"image": ["b", 3, "h", "w"]}, {"image": (1, 3, 224, 224)}),
    ],
)
def test_one_symbol_has_one_size(
    inputs: dict[str, list[int | str]], right: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    assert look(_model(tmp_path / "model.onnx", **inputs)).counted_shapes == right


def test_a_given_size_holds_for_every_input(tmp_path: Path) -> None:
    path = _model(tmp_path / "model.onnx", x=["n", 1, 64], mask=["n", "n"])
    assert look(path, mask=(7, 7)).counted_shapes == {"x": (7, 1, 64), "mask": (7, 7)}


def test_a_length_that_a_reshape_fixes_is_found(tmp_path: Path) -> None:
    """Sequence first, exported at one length: the graph says which."""
    found = look(CASES / "mha_seqfirst_mask.onnx")
    (length,) = {found.counted_shapes["x"][0], *found.counted_shapes["mask"]}
    assert found.counted_shapes == {"x": (length, 1, 64), "mask": (length, length)}
    assert length != 16
    _, pruned = prune_file(CASES / "mha_seqfirst_mask.onnx", UNEVEN)
    assert pruned.twin is not None


def _masked(path: Path, meaning: str) -> Path:
    """A block whose mask (batch, tokens) of bools hides keys where it is `meaning`."""

    def hide(graph: Graph, scores: str) -> str:
        mask = graph.add("Unsqueeze", "mask", graph.constant([1, 2]))
        hidden = mask if meaning == "True hides" else graph.add("Not", mask)
        return graph.add("Where", hidden, graph.constant(-np.inf, np.float32), scores)

    graph, y = block(scores=hide)
    model = onnx.load(graph.save(path, y))
    info = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, ["batch", TOKENS])
    model.graph.input.append(info)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("meaning", ["True hides", "False hides"])
def test_either_meaning_of_a_mask_is_proven(meaning: str, tmp_path: Path) -> None:
    path = _masked(tmp_path / "model.onnx", meaning)
    _, pruned = prune_file(path, UNEVEN)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5


def test_partly_masked_comes_first(tmp_path: Path) -> None:
    path = _masked(tmp_path / "model.onnx", "True hides")
    tried = candidate_inputs(onnx.load(path), {"x": (3, TOKENS, 8), "mask": (3, TOKENS)}, 0)
    assert [float(each["mask"].mean()) for each in tried] == pytest.approx([14 / 15, 1 / 15, 1, 0])
    assert all(np.array_equal(each["x"], tried[0]["x"]) for each in tried)
