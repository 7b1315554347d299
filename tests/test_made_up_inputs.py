"""What is made up where nothing is given must be what the model takes: sizes by symbol, masks by their meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from click.testing import CliRunner

from tests.matching.tiny import TOKENS, Graph, block
from tests.pruning import UNEVEN, look, prune_file
from toast_onnx.errors import ModelError
from toast_onnx.matching import input_shapes
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.index_ranges import index_ranges
from toast_onnx.proof.inputs import twin_inputs
from toast_onnx.runtime import candidate_inputs
from toast_onnx_cli.main import main

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


def _with_inputs(path: Path, hide: Callable[[Graph, str], str], names: list[str], batch: str | int) -> Path:
    """A block whose scores pass `hide`, with masks (batch, tokens) of bools."""
    graph, y = block(scores=hide)
    model = onnx.load(graph.save(path, y))
    for name in names:
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, [batch, TOKENS]))
    if isinstance(batch, int):
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, path)
    return path


def _masked(path: Path, meaning: str, batch: str | int) -> Path:
    """A block whose mask (batch, tokens) of bools hides keys where it is `meaning`."""

    def hide(graph: Graph, scores: str) -> str:
        mask = graph.add("Unsqueeze", "mask", graph.constant([1, 2]))
        hidden = mask if meaning == "True hides" else graph.add("Not", mask)
        return graph.add("Where", hidden, graph.constant(-np.inf, np.float32), scores)

    return _with_inputs(path, hide, ["mask"], batch)


@pytest.mark.parametrize("meaning", ["True hides", "False hides"])
@pytest.mark.parametrize("batch", ["batch", 1])
def test_either_meaning_of_a_mask_is_proven(meaning: str, batch: str | int, tmp_path: Path) -> None:
    path = _masked(tmp_path / "model.onnx", meaning, batch)
    dense, pruned = prune_file(path, UNEVEN)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-5
    for feeds in twin_inputs(dense):
        assert 0 < feeds["mask"].mean() < 1, "partly masked is preferred"


def test_partly_masked_comes_first(tmp_path: Path) -> None:
    path = _masked(tmp_path / "model.onnx", "True hides", "batch")
    tried = candidate_inputs(onnx.load(path), {"x": (3, TOKENS, 8), "mask": (3, TOKENS)}, 0)
    assert [float(each["mask"].mean()) for each in tried] == pytest.approx([14 / 15, 1 / 15, 1, 0])
    assert all(np.array_equal(each["x"], tried[0]["x"]) for each in tried)


def test_two_masks_may_mean_opposite_things(tmp_path: Path) -> None:
    """A mask of keys that are padding beside one of positions that may be seen."""

    def hide(graph: Graph, scores: str) -> str:
        padding = graph.add("Unsqueeze", "mask", graph.constant([1, 2]))
        allowed = graph.add("Not", graph.add("Unsqueeze", "visible_mask", graph.constant([1, 2])))
        hidden = graph.add("Or", padding, allowed)
        return graph.add("Where", hidden, graph.constant(-np.inf, np.float32), scores)

    path = _with_inputs(tmp_path / "model.onnx", hide, ["mask", "visible_mask"], "batch")
    _, pruned = prune_file(path, UNEVEN)
    assert pruned.twin is not None


def _table(path: Path, index: Callable[[Graph, str], str], rows: int = 4) -> Path:
    """A block that adds entries of a table to its scores, chosen by an input of integers."""

    def add(graph: Graph, scores: str) -> str:
        entries = graph.add("Gather", graph.random(rows, 1), index(graph, "ids"))
        return graph.add("Add", scores, graph.add("Unsqueeze", entries, graph.constant([1])))

    graph, y = block(scores=add)
    model = onnx.load(graph.save(path, y))
    model.graph.input.append(onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", 1]))
    onnx.save(model, path)
    return path


INDEX: dict[str, tuple[Callable[[Graph, str], str], tuple[int, int]]] = {
    "directly": (lambda g, ids: ids, (0, 3)),
    "through a Cast": (lambda g, ids: g.add("Cast", ids, to=onnx.TensorProto.INT32), (0, 3)),
    "one is added": (lambda g, ids: g.add("Add", g.constant(1), ids), (-1, 2)),
    "two are taken off": (lambda g, ids: g.add("Sub", ids, g.constant(2)), (2, 5)),
    "clipped, wider than the table": (lambda g, ids: g.add("Clip", ids, g.constant(0), g.constant(9)), (-(2**31), 3)),
    "clipped at its rows": (lambda g, ids: g.add("Clip", ids, g.constant(0), g.constant(3)), (-(2**31), 2**31)),
    "doubled": (lambda g, ids: g.add("Mul", ids, g.constant(2)), (0, 1)),
}


@pytest.mark.parametrize("way", INDEX)
def test_integers_stay_within_the_table_they_index(way: str, tmp_path: Path) -> None:
    index, allowed = INDEX[way]
    path = _table(tmp_path / "model.onnx", index)
    dense, pruned = prune_file(path, UNEVEN)
    assert pruned.twin is not None
    assert index_ranges(dense.view, dense.counted).get("ids", (-(2**31), 2**31)) == allowed


def _roots(path: Path) -> Path:
    """A block behind a square root: numbers that are not positive make NaN of everything."""
    graph, y = block()
    model = onnx.load(graph.save(path, y))
    for node in model.graph.node:
        node.input[:] = ["root" if name == "x" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Sqrt", ["x"], ["root"]))
    onnx.save(model, path)
    return path


def test_the_proof_runs_on_samples_alone_where_nothing_made_up_fits(tmp_path: Path) -> None:
    path = _roots(tmp_path / "model.onnx")
    done: list[str] = []
    with pytest.raises(ModelError, match=r"no finite number on made-up inputs .* --data"):
        prune_file(path, UNEVEN, progress=done.append)
    assert not done, "found out before the work"
    sample = {"x": np.random.default_rng(0).random((2, TOKENS, 8), np.float32)}
    _, pruned = prune_file(path, UNEVEN, samples=[sample])
    assert pruned.twin is not None
    assert pruned.twin.batches == (2,)
    assert any("samples of the data alone" in note for note in pruned.notes)


def test_the_proof_runs_on_samples_too(tmp_path: Path) -> None:
    graph, y = block()
    sample = {"x": np.random.default_rng(0).random((2, TOKENS, 8), np.float32)}
    _, pruned = prune_file(graph.save(tmp_path / "model.onnx", y), UNEVEN, samples=[sample])
    assert pruned.twin is not None
    assert pruned.twin.batches == (1, 3, 2)


def test_data_reaches_the_proof_of_the_command(tmp_path: Path) -> None:
    path = _roots(tmp_path / "model.onnx")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).random((32, TOKENS, 8), np.float32))
    (tmp_path / "half.yaml").write_text("version: 1\nattention: {qk: 0.5, vo: 0.5}\nalign: 1\n")
    arguments = ["prune", str(path), "--ratios", str(tmp_path / "half.yaml")]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "export it again" not in refused.output
    proven = CliRunner().invoke(main, [*arguments, "--data", str(tmp_path / "data.npy")])
    assert proven.exit_code == 0, proven.output
    assert "proven on samples of the data alone" in proven.output


@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_baked_into_reshapes_is_taken_as_fixed(size: int, tmp_path: Path) -> None:
    graph, y = block()
    for name, value in graph.weights.items():
        if value.tolist() in ([0, 0, 2, 4], [0, 0, 8]):
            graph.weights[name] = np.asarray([size, *value.tolist()[1:]])
    path = graph.save(tmp_path / "model.onnx", y)
    dense, pruned = prune_file(path, UNEVEN)
    assert dense.counted_shapes == {"x": (size, TOKENS, 8)}
    assert not dense.dynamic_batch
    assert len(dense.notes) == 1
    assert pruned.twin is not None
    assert pruned.twin.batches == (size,)
    assert not look(path, x=(size, TOKENS, 8)).notes
    shown = CliRunner().invoke(main, ["inspect", str(path)])
    assert f"note: {dense.notes[0]}" in " ".join(shown.output.split())


def test_samples_come_in_the_batch_that_is_baked_in(tmp_path: Path) -> None:
    graph, y = block()
    for name, value in graph.weights.items():
        if value.tolist() in ([0, 0, 2, 4], [0, 0, 8]):
            graph.weights[name] = np.asarray([1, *value.tolist()[1:]])
    path = graph.save(tmp_path / "model.onnx", y)
    np.save(tmp_path / "data.npy", np.random.default_rng(0).random((24, TOKENS, 8), np.float32))
    (tmp_path / "half.yaml").write_text("version: 1\nattention: {qk: 0.5, vo: 0.5}\nffn: {fc2: 0.5}\nalign: 1\n")
    arguments = ["prune", str(path), "--ratios", str(tmp_path / "half.yaml"), "--data", str(tmp_path / "data.npy")]
    pruned = CliRunner().invoke(main, arguments)
    assert pruned.exit_code == 0, pruned.output
    assert "samples of" in pruned.output
    again = ["--data", str(tmp_path / "data.npy"), "--steps", "2", "--batch", "4", "-o", str(tmp_path / "tuned.onnx")]
    tuned = CliRunner().invoke(main, ["finetune", str(tmp_path / "model.pruned.onnx"), "--teacher", str(path), *again])
    assert tuned.exit_code == 0, tuned.output


@pytest.mark.parametrize(("rows", "extra", "side"), [(36, 1, 96), (49, 0, 112)])
def test_the_image_size_that_a_table_of_positions_fixes_is_found(
    rows: int, extra: int, side: int, tmp_path: Path
) -> None:
    """Square images in patches of 16, with a class token and without."""
    graph = Graph()
    patches = graph.add("Conv", "x", graph.random(8, 3, 16, 16), strides=[16, 16])
    tokens = graph.add("Reshape", patches, graph.constant([0, 8, -1]))
    tokens = graph.add("Transpose", tokens, perm=[0, 2, 1])
    if extra:
        first = graph.add("Slice", tokens, graph.constant([0]), graph.constant([1]), graph.constant([1]))
        tokens = graph.add("Concat", first, tokens, axis=1)
    y = graph.add("Add", tokens, graph.random(1, rows + extra, 8))
    found = look(_image_model(graph, y, tmp_path / "model.onnx"))
    assert found.counted_shapes == {"x": (1, 3, side, side)}
    (note,) = found.notes
    assert f"--shape x=1x3x{side}x{side}" in note


def test_the_height_of_text_lines_is_found(tmp_path: Path) -> None:
    """Sixteenths of the height must be three, as in networks for text lines of 48 pixels."""
    graph = Graph()
    features = graph.add("Conv", "x", graph.random(8, 3, 16, 16), strides=[16, 16])
    y = graph.add("Add", features, graph.random(1, 8, 3, 14))
    assert look(_image_model(graph, y, tmp_path / "model.onnx")).counted_shapes["x"][2:] == (48, 224)


def test_where_no_size_fits_the_free_axes_are_named(tmp_path: Path) -> None:
    graph = Graph()
    y = graph.add("MatMul", graph.add("Reshape", "x", graph.constant([7, 11, 13])), graph.random(5, 5))
    path = _image_model(graph, y, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"axis 2 of 'x' \(h\)"):
        look(path)


def _image_model(graph: Graph, y: str, path: Path) -> Path:
    model = onnx.load(graph.save(path, y))
    model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", 1, ["batch", 3, "h", "w"]))
    onnx.save(model, path)
    return path


def test_a_graph_that_no_size_fits_is_given_up_in_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contradiction far behind, and many lengths to try: the nodes walked are bounded, not the attempts."""
    make = onnx.helper.make_node
    values = {f"n{n}": onnx.numpy_helper.from_array(np.asarray([n])) for n in range(2, 150)}
    lengths = [make("Constant", [], [name], value=value) for name, value in values.items()]
    chain = [make("Relu", ["x" if i == 0 else f"r{i - 1}"], [f"r{i}"]) for i in range(500)]
    nodes = [*lengths, make("Concat", [*values], ["lengths"], axis=0), *chain]
    nodes.append(make("MatMul", ["r499", "w"], ["y"]))
    info = [onnx.helper.make_tensor_value_info(n, 1, a) for n, a in (("x", ["b", "n", 8]), ("y", ["b", "n", 4]))]
    weights = [onnx.numpy_helper.from_array(np.zeros((9, 4), np.float32), "w")]
    graph = onnx.helper.make_graph(nodes, "contradiction", info[:1], info[1:], weights)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    walked = 0

    def counted(self: Facts, node: onnx.NodeProto) -> None:
        nonlocal walked
        walked += 1
        walk(self, node)

    walk = Facts._walk
    monkeypatch.setattr(Facts, "_walk", counted)
    monkeypatch.setattr(input_shapes, "_STEPS", 5_000)
    with pytest.raises(ModelError, match="give the shapes with --shape"):
        look(path)
    assert 5_000 < walked < 5_000 + 3 * len(nodes)
