"""Bad input: one `Error:` line that says what to do, and every file as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from click.testing import CliRunner

from tests.end_to_end.command import QUICK, contents, refuse, succeed, toast, write_ratios
from toast_onnx_cli.main import main


def refuse_and_keep(folder: Path, *arguments: str | Path, **options: Any) -> str:
    """A refusal that leaves a folder exactly as it was."""
    before = contents(folder)
    line = refuse(*arguments, **options)
    assert contents(folder) == before
    return line


# --- models that cannot be read ---


def _text(path: Path) -> None:
    path.write_text("This is no model.\n" * 100)


def _picture(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _missing(path: Path) -> None:
    path.unlink()


def _cut(share: float) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        os.truncate(path, int(share * path.stat().st_size))

    return cut


def _unknown_input(path: Path) -> None:
    proto = onnx.load(path)
    next(n for n in proto.graph.node if n.op_type == "Softmax").input[0] = "nobody_makes_this"
    onnx.save(proto, path)


def _short_tensor(path: Path) -> None:
    proto = onnx.load(path)
    tensor = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    tensor.raw_data = tensor.raw_data[:-400]
    onnx.save(proto, path)


UNREADABLE = {
    "text": (_text, "is not an ONNX file or is truncated"),
    "picture": (_picture, "is not an ONNX file or is truncated"),
    "empty": (_empty, "holds no ONNX graph"),
    "folder": (_folder, "is a folder"),
    "missing": (_missing, "does not exist"),
    "cut at 1 %": (_cut(0.01), "truncated"),
    "cut at half": (_cut(0.5), "truncated"),
    "cut at 99 %": (_cut(0.99), "truncated"),
}


@pytest.mark.parametrize("command", ["inspect", "prune"])
@pytest.mark.parametrize("spoil", UNREADABLE)
def test_unreadable_model(spoil: str, command: str, model: Path, ratios: Path) -> None:
    change, message = UNREADABLE[spoil]
    change(model)
    more = ("--ratios", ratios) if command == "prune" else ()
    line = refuse_and_keep(model.parent, command, model, *more)
    assert message in line
    assert "model.onnx" in line


@pytest.mark.parametrize("spoil", [_unknown_input, _short_tensor])
def test_damaged_graph(spoil: Callable[[Path], None], model: Path, ratios: Path) -> None:
    spoil(model)
    assert "model.onnx" in refuse_and_keep(model.parent, "prune", model, "--ratios", ratios)


# --- external data ---


@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_external_data_missing(command: str, external: Path, ratios: Path) -> None:
    (external.parent / "weights.bin").unlink()
    more = ("--ratios", ratios) if command == "prune" else ()
    line = refuse_and_keep(external.parent, command, external, *more)
    assert "weights.bin" in line
    assert "missing" in line


@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_external_data_short(command: str, external: Path, ratios: Path) -> None:
    _cut(0.9)(external.parent / "weights.bin")
    more = ("--ratios", ratios) if command == "prune" else ()
    line = refuse_and_keep(external.parent, command, external, *more)
    assert "weights.bin" in line
    assert "too short" in line


def test_external_data_outside_the_folder_is_not_followed(external: Path, ratios: Path) -> None:
    proto = onnx.load(external, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    inner = external.parent / "inner"
    inner.mkdir()
    onnx.save(proto, inner / "model.onnx")
    refuse_and_keep(external.parent, "prune", inner / "model.onnx", "--ratios", ratios)


# --- weights that are no numbers ---


def _poison(path: Path, pick: Callable[[onnx.GraphProto], str], value: float) -> None:
    proto = onnx.load(path)
    name = pick(proto.graph)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[array.size // 2] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, path)


def _of_block(kind: str, operand: int, shape: tuple[int, ...], count: int = 0) -> Callable[[onnx.GraphProto], str]:
    """Picks the `count`-th initializer of a shape that nodes of a kind read as a certain operand."""

    def pick(graph: onnx.GraphProto) -> str:
        sizes = {t.name: tuple(t.dims) for t in graph.initializer}
        names = [n.input[operand] for n in graph.node if n.op_type == kind and len(n.input) > operand]
        return [n for n in names if sizes.get(n) == shape][count]

    return pick


POISONED = {
    "qkv weight": _of_block("MatMul", 1, (96, 288), 2),
    "qkv bias": _of_block("Add", 1, (288,), 2),
    "proj weight": _of_block("MatMul", 1, (96, 96), 2),
    "proj bias": _of_block("Add", 1, (96,), 4),
    "fc1 weight": _of_block("MatMul", 1, (96, 384), 2),
    "fc1 bias": _of_block("Add", 1, (384,), 2),
    "fc2 weight": _of_block("MatMul", 1, (384, 96), 2),
    "fc2 bias": _of_block("Add", 1, (96,), 5),
    "norm1 gain": _of_block("LayerNormalization", 1, (96,), 4),
    "norm2 bias": _of_block("LayerNormalization", 2, (96,), 5),
}
DATA_FREE = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc1": 0.25, "fc2": 0.5}}


@pytest.mark.parametrize("place", POISONED)
def test_weights_that_are_no_numbers(place: str, model: Path, ratios: Path) -> None:
    """Statistics without data are made of all of a block's weights, biases and norms."""
    _poison(model, POISONED[place], np.nan)
    before = contents(model.parent)
    done = CliRunner().invoke(main, ["prune", str(model), "--ratios", str(write_ratios(ratios, DATA_FREE))])
    line = done.stderr.splitlines()[-1]
    assert done.exit_code == 1, done.exception
    assert line.startswith("Error:")
    assert "block 2" in line
    assert "NaN or infinite" in line
    assert contents(model.parent) == before


@pytest.mark.parametrize("place", ["qkv weight", "fc2 weight"])
def test_infinite_weights_stop_the_command_that_needs_no_statistics(place: str, model: Path, ratios: Path) -> None:
    _poison(model, POISONED[place], -np.inf)
    line = refuse_and_keep(model.parent, "prune", model, "--ratios", ratios)
    assert "block 2" in line
    assert "NaN or infinite" in line


# --- ratios that do not fit ---

BAD_RATIOS = {
    "no such block": ({"blocks": {"6": {"attention": {"qk": 0.5}}}}, ["blocks", "6 blocks"]),
    "no such pattern": ({"blocks": {"*/layer.3/*": {"ffn": {"fc2": 0.5}}}}, ["*/layer.3/*", "matches no block"]),
    "list too short": ({"ffn": {"fc2": [0.5] * 5}}, ["ffn.fc2", "5 ratios", "6 blocks"]),
    "list too long": ({"attention": {"qk": [0.5] * 7}}, ["attention.qk", "7 ratios", "6 blocks"]),
    "ratio 1": ({"attention": {"qk": 1}}, ["attention.qk", "1", "not including 1"]),
    "ratio above 1": ({"ffn": {"fc2": 1.5}}, ["ffn.fc2", "1.5"]),
    "ratio below 0": ({"attention": {"vo": -0.25}}, ["attention.vo", "-0.25"]),
    "ratio in a list": ({"ffn": {"fc2": [0, 0, 0, 0, 0, 2]}}, ["ffn.fc2[5]", "2"]),
    "ratio in an override": ({"blocks": {0: {"ffn": {"fc1": 3}}}}, ["fc1", "3"]),
    "ratio as text": ({"attention": {"qk": "50%"}}, ["attention.qk", "50%"]),
    "unknown key": ({"attention": {"kq": 0.5}}, ["'kq'", "did you mean qk?"]),
    "unknown section": ({"atention": {"qk": 0.5}}, ["'atention'", "did you mean attention?"]),
    "unknown score": ({"attention": {"qk": 0.5, "select": "index", "score": "l3"}}, ["attention.score", "l3", "l1"]),
}


@pytest.mark.parametrize("case", BAD_RATIOS)
def test_ratios_that_do_not_fit(case: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    settings, needles = BAD_RATIOS[case]
    lines = [f"{key}: {json.dumps(value)}" for key, value in {"version": 1, **settings}.items()]
    text = "\n".join(lines).replace('"6":', "6:").replace('"0":', "0:")  # block numbers are numbers
    ratios = write_ratios(tmp_path_factory.mktemp("bad") / "ratios.yaml", text)
    line = refuse_and_keep(model.parent, "prune", model, "--ratios", ratios)
    assert [needle for needle in needles if needle not in line] == [], line


@pytest.mark.parametrize("text", ["", "version: 1\nattention: {qk: 0.5", "\x00\x01", "- 1\n- 2\n", "version: 2\n"])
def test_ratios_files_that_are_none(text: str, model: Path, ratios: Path) -> None:
    refuse_and_keep(model.parent, "prune", model, "--ratios", write_ratios(ratios, text))


def test_ratios_file_that_does_not_exist(model: Path) -> None:
    assert "nowhere.yaml" in refuse_and_keep(model.parent, "prune", model, "--ratios", model.parent / "nowhere.yaml")


# --- parts that cannot be pruned ---


@pytest.fixture
def half_prunable(model: Path) -> Path:
    """The digits model whose block 1 hands the hidden units of its network out as an output of the graph."""
    proto = onnx.load(model)
    sizes = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    fc2 = [n for n in proto.graph.node if n.op_type == "MatMul" and sizes.get(n.input[1]) == (384, 96)][1]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(fc2.input[0], 1, ["batch", 17, 384]))
    onnx.save(proto, model)
    return model


def test_ratio_on_a_part_that_is_not_prunable(half_prunable: Path, ratios: Path) -> None:
    line = refuse_and_keep(half_prunable.parent, "prune", half_prunable, "--ratios", ratios)
    assert "block 1" in line
    assert "fc2 cannot be pruned: the hidden activation is also an output of the graph" in line
    assert "--skip-unprunable" in line


def test_skip_unprunable_goes_on(half_prunable: Path, ratios: Path) -> None:
    printed = succeed("prune", half_prunable, "--ratios", ratios, "--skip-unprunable", "--json")
    blocks = json.loads(printed)["blocks"]
    assert [b["after"]["width"] for b in blocks] == [192, 384, 192, 192, 192, 192]
    assert [b["after"]["vo_dim"] for b in blocks] == [24] * 6
    assert blocks[1]["kept"]["fc2"] is None


def test_ratio_of_0_on_a_part_that_is_not_prunable_is_no_error(half_prunable: Path, ratios: Path) -> None:
    settings = QUICK | {"blocks": {"block.1": {"ffn": {"fc2": 0}}}}
    succeed("prune", half_prunable, "--ratios", write_ratios(ratios, settings))


def test_model_without_a_block(tmp_path: Path, ratios: Path) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"])],
        "no transformer",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 4, 6, 6])],
        [onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "model.onnx")
    line = refuse_and_keep(tmp_path, "prune", tmp_path / "model.onnx", "--ratios", ratios)
    assert "no transformer block" in line
    assert "0 blocks" in succeed("inspect", tmp_path / "model.onnx")


# --- shapes ---


@pytest.mark.parametrize(
    ("shape", "needle"),
    [
        ("pixels=1x1x32x32", "fixes at 28"),
        ("pixels=1x28x28", "3 axes"),
        ("image=1x1x28x28", "inputs are: pixels"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_shapes_that_contradict_the_model(command: str, shape: str, needle: str, model: Path, ratios: Path) -> None:
    more = ("--ratios", ratios) if command == "prune" else ()
    assert needle in refuse_and_keep(model.parent, command, model, "--shape", shape, *more)


@pytest.mark.parametrize("shape", ["pixels", "pixels=", "pixels=1x0x28x28", "pixels=1,1,28,28", "=1x1", "pixels=axb"])
def test_shapes_that_are_none_are_wrong_usage(shape: str, model: Path) -> None:
    done = toast("inspect", model, "--shape", shape)
    assert done.returncode == 2
    assert "input=1x3x224x224" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_symbolic_size_that_the_graph_does_not_take(model: Path, ratios: Path) -> None:
    """Height and width declared free, position table for 16 patches: 32x32 does not fit."""
    proto = onnx.load(model)
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size_{axis}"
    onnx.save(proto, model)
    line = refuse_and_keep(model.parent, "prune", model, "--ratios", ratios, "--shape", "pixels=1x1x56x56")
    assert "--shape" in line
    assert "28x28" in succeed("inspect", model, "--shape", "pixels=1x1x28x28")
