"""What a run writes: the same bytes twice, nothing changed that was not asked for, widths as the ratios say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import pytest

from tests import zoo
from tests.end_to_end.command import QUICK, contents, succeed, write_ratios
from tests.pruning import run, worst

Exported = Callable[[zoo.Case], Path]

#: One export of each way of writing attention: packed, separate layers, windows, fused node, decomposed norms.
CASES = [
    zoo.Case("timm-deit", "torchscript-17", "dynamic"),
    zoo.Case("timm-vit", "dynamo-20", "dynamic"),
    zoo.Case("hf-vit", "dynamo-23", "dynamic"),
    zoo.Case("timm-vit-unfused", "torchscript-14", "dynamic"),
    pytest.param(zoo.Case("timm-swin", "torchscript-17", "dynamic"), marks=pytest.mark.slow),
    zoo.Case("timm-vit", "torchscript-17", "static"),
]
NOTHING = {"version": 1, "attention": {"qk": 0, "vo": 0}, "ffn": {"fc1": 0, "fc2": 0}}


def prune(model: Path, out: Path, settings: dict[str, Any], *options: str) -> dict[str, Any]:
    """Run the command; returns its `--json`."""
    ratios = write_ratios(out.with_suffix(".ratios"), settings)
    document: dict[str, Any] = json.loads(succeed("prune", model, "--ratios", ratios, "-o", out, "--json", *options))
    return document


# --- the same again ---


def test_the_same_command_gives_the_same_bytes(model: Path, ratios: Path) -> None:
    """Data-free statistics, subspaces and the twin take part; model and report alike."""
    write_ratios(ratios, {"version": 1, "attention": {"qk": 0.5, "vo": 0.25}, "ffn": {"fc1": 0.25, "fc2": 0.5}})
    folder, found = model.parent / "made", []
    for _ in range(2):
        folder.mkdir()
        succeed("prune", model, "--ratios", ratios, "-o", folder / "new.onnx")
        found.append({Path(p).name: digest for p, digest in contents(folder).items()})
        shutil.rmtree(folder)
    assert sorted(found[0]) == ["new.json", "new.onnx"]
    assert found[0] == found[1]


def test_another_seed_is_recorded_and_gives_other_statistics(model: Path) -> None:
    settings = {"version": 1, "ffn": {"fc2": 0.5}}
    documents = [
        prune(model, model.with_name(f"{seed}.onnx"), settings, "--seed", str(seed), "--no-check") for seed in (0, 1)
    ]
    assert [d["options"]["seed"] for d in documents] == [0, 1]
    assert documents[0]["pruned"]["sha256"] != documents[1]["pruned"]["sha256"]


def test_json_is_the_report(model: Path, ratios: Path) -> None:
    printed = succeed("prune", model, "--ratios", ratios, "--json", "--report", model.parent / "report.json")
    assert json.loads(printed) == json.loads((model.parent / "report.json").read_text())
    assert not (model.parent / "model.pruned.json").exists()


def test_the_input_stays_and_defaults_lie_beside_it(model: Path, ratios: Path) -> None:
    before = model.read_bytes()
    succeed("prune", model, "--ratios", ratios)
    assert model.read_bytes() == before
    assert {p.name for p in model.parent.iterdir()} == {"model.onnx", "model.pruned.onnx", "model.pruned.json"}


# --- nothing asked for ---


@pytest.mark.parametrize("case", CASES[:3], ids=lambda c: c.id)
def test_a_ratio_of_0_everywhere_changes_no_result(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    path, out = exported(case), tmp_path / "same.onnx"
    document = prune(path, out, NOTHING)
    feeds = zoo.inputs(path, 1)
    for ours, theirs in zip(run(out, feeds), run(path, feeds), strict=True):
        assert np.array_equal(ours, theirs)
    assert document["pruned"]["macs"] == document["dense"]["macs"]
    assert document["pruned"]["params"] == document["dense"]["params"]
    assert [n.SerializeToString() for n in onnx.load(out).graph.node] == [
        n.SerializeToString() for n in onnx.load(path).graph.node
    ]


# --- what was not asked for ---


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_everything_else_stays(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    """Interface, opset, metadata, and every node that belongs to no layer of a pruned block or its data movement."""
    path, out = tmp_path / "model.onnx", tmp_path / "new.onnx"
    proto = onnx.load(exported(case))
    proto.metadata_props.add(key="author", value="somebody")
    proto.doc_string, proto.graph.doc_string = "a model", "a graph"
    onnx.save(proto, path)
    prune(path, out, QUICK | {"align": 1})
    onnx.checker.check_model(str(out), full_check=True)
    before, after = onnx.load(path), onnx.load(out)
    for name in ("ir_version", "producer_name", "producer_version", "doc_string", "domain", "model_version"):
        assert getattr(after, name) == getattr(before, name)
    assert after.graph.name == before.graph.name
    assert list(after.opset_import) == list(before.opset_import)
    assert list(after.metadata_props) == list(before.metadata_props)
    assert list(after.graph.input) == list(before.graph.input)  # symbolic batch and all
    assert list(after.graph.output) == list(before.graph.output)
    kinds = {"LayerNormalization", "Softmax", "Conv", "Erf", "Gelu", "ReduceMean", "Pow", "Roll", "Attention"}
    nodes = {n.name: n for n in after.graph.node}
    kept = [n for n in before.graph.node if n.op_type in kinds and n.name]
    assert kept
    for node in kept:
        if node.op_type == "Attention":  # its scale is written down, so that it stays what it was
            assert list(nodes[node.name].output) == list(node.output)
        else:
            assert nodes[node.name].SerializeToString() == node.SerializeToString()
    values = {t.name: t.SerializeToString() for t in before.graph.initializer}
    norms = {name for n in kept if n.op_type == "LayerNormalization" for name in n.input[1:]}
    same = {t.name for t in after.graph.initializer if values.get(t.name) == t.SerializeToString()}
    assert norms & set(values) <= same


def _embedding(proto: onnx.ModelProto) -> list[bytes]:
    """The nodes before the first norm."""
    nodes = list(proto.graph.node)
    first = next(i for i, n in enumerate(nodes) if n.op_type == "LayerNormalization")
    return [n.SerializeToString() for n in nodes[:first]]


def test_nodes_outside_the_blocks_are_byte_for_byte_the_same(exported: Exported, tmp_path: Path) -> None:
    case = zoo.Case("timm-deit", "torchscript-17", "dynamic")
    prune(exported(case), tmp_path / "new.onnx", QUICK)
    before, after = onnx.load(exported(case)), onnx.load(tmp_path / "new.onnx")
    assert [n for n in _embedding(before) if n not in _embedding(after)] == []
    assert after.graph.node[-1] == before.graph.node[-1]


def test_a_weight_that_layers_share_changes_for_one_of_them_alone(model: Path, tmp_path: Path) -> None:
    """Exporters store equal initializers once: here blocks 0 and 1 read one fc1 weight, and only block 0 is pruned.

    Their other weights differ, so that they are no one block: it takes --split-shared.
    """
    proto = onnx.load(model)
    sizes = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    layers = [n for n in proto.graph.node if n.op_type == "MatMul" and sizes.get(n.input[1]) == (96, 384)]
    layers[1].input[1] = layers[0].input[1]
    onnx.save(proto, model)
    document = prune(
        model, tmp_path / "new.onnx", {"version": 1, "blocks": {"block.0": {"ffn": {"fc2": 0.5}}}}, "--split-shared"
    )
    assert [b["after"]["width"] for b in document["blocks"]] == [192, 384, 384, 384, 384, 384]
    old = next(t for t in proto.graph.initializer if t.name == layers[0].input[1])
    assert old in onnx.load(tmp_path / "new.onnx").graph.initializer


@pytest.mark.parametrize("batch", ["static", "dynamic"])
def test_batch_stays_what_it_was(batch: str, exported: Exported, tmp_path: Path) -> None:
    path, out = exported(zoo.Case("timm-vit", "torchscript-17", batch)), tmp_path / "new.onnx"
    document = prune(path, out, QUICK)
    assert document["twin"]["batches"] == ([1, 3] if batch == "dynamic" else [1])
    feeds = zoo.inputs(path, 1)
    assert [o.shape for o in run(out, feeds)] == [(1, 10)]
    if batch == "dynamic":
        four = zoo.inputs(path, 4)
        each = [run(out, {k: v[i : i + 1] for k, v in four.items()})[0] for i in range(4)]
        assert worst(run(out, four), [np.concatenate(each)]) < 1e-5


# --- rounding and addressing ---


def widths(document: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(qk, vo, hidden) of every block after pruning."""
    return [(b["after"]["qk_dim"], b["after"]["vo_dim"], b["after"]["width"]) for b in document["blocks"]]


@pytest.mark.parametrize(
    ("align", "expected"),
    [
        # of 32, 32 and 384: 32 * 0.7 = 22.4, 32 * 0.4 = 12.8, 384 * 0.35 = 134.4
        (None, (24, 16, 136)),  # 8 by default
        (1, (22, 13, 134)),
        ({"head_dim": 4, "width": 64}, (24, 12, 128)),
        ({"head_dim": 32, "width": 384}, (32, 32, 384)),
        ({"head_dim": 3, "width": 100}, (21, 12, 100)),
    ],
    ids=str,
)
def test_rounding(align: Any, expected: tuple[int, int, int], model: Path, tmp_path: Path) -> None:
    settings = QUICK | {"ffn": {"fc2": 0.65, "score": "l2"}} | ({"align": align} if align else {})
    settings["attention"] = QUICK["attention"] | {"qk": 0.3, "vo": 0.6}
    assert widths(prune(model, tmp_path / "new.onnx", settings, "--no-check")) == [expected] * 6


def test_blocks_by_number_by_pattern_and_by_list(exported: Exported, tmp_path: Path) -> None:
    """Three DeiT blocks, 64 dimensions a head and 768 hidden units; later overrides win."""
    text = """
version: 1
attention: {qk: 0.5, vo: 0.25, select: index, score: l2}
ffn: {fc2: [0, 0.25, 0.5], score: l2}
compensation: {kind: none}
blocks:
  0: {attention: {qk: 0, vo: 0.5}}
  "*blocks.2/mlp*": {ffn: {fc2: 0.75}}
  2: {attention: {vo: 0}}
"""
    path = exported(zoo.Case("timm-deit", "torchscript-17", "dynamic"))
    ratios = tmp_path / "ratios.yaml"
    ratios.write_text(text)
    document = json.loads(succeed("prune", path, "--ratios", ratios, "-o", tmp_path / "new.onnx", "--json"))
    assert widths(document) == [(64, 32, 768), (32, 48, 576), (32, 64, 192)]
    assert [b["settings"]["fc2"] for b in document["blocks"]] == ["0", "0.25", "0.75"]


# --- what inspect says ---


def test_inspect_document_and_table(model: Path) -> None:
    document = json.loads(succeed("inspect", model, "--json"))
    assert {"model", "opset", "producer", "macs", "params", "blocks", "declined"} <= set(document)
    block = document["blocks"][0]
    assert set(block) == {"index", "name", "attention", "ffn", "tokens"}
    merging = {"mergeable": True, "reason": None, "kind": None, "node": None}
    assert block["tokens"] == merging | {"count": 17, "special": 1, "unread": False}
    assert set(block["attention"]) == {"heads", "qk_dim", "vo_dim", "heads_prunable", "qk", "vo", "macs", "params"}
    assert set(block["ffn"]) == {"in_features", "width", "activation", "gated", "fc1", "fc2", "macs", "params"}
    for part, names in (("attention", ("heads_prunable", "qk", "vo")), ("ffn", ("fc1", "fc2"))):
        assert all(
            block[part][name] == {"prunable": True, "reason": None, "kind": None, "node": None} for name in names
        )
    assert (block["attention"]["heads"], block["attention"]["qk_dim"], block["ffn"]["width"]) == (3, 32, 384)
    assert block["ffn"]["activation"] == "gelu"
    # 17 tokens of 96 channels: qkv and proj, two products of 3 heads; two layers of 384
    assert block["attention"]["macs"] == 17 * 96 * 4 * 96 + 2 * 17 * 17 * 96
    assert block["attention"]["params"] == 96 * 4 * 96 + 4 * 96
    assert block["ffn"]["macs"] == 2 * 17 * 96 * 384
    assert block["ffn"]["params"] == 2 * 96 * 384 + 384 + 96
    table = succeed("inspect", model)
    assert "6 blocks" in table
    assert "heads qk vo fc1 fc2" in table


def test_macs_of_a_pruned_model_follow_its_widths(model: Path, ratios: Path) -> None:
    succeed("prune", model, "--ratios", ratios)
    document = json.loads(succeed("inspect", model.with_name("model.pruned.onnx"), "--json"))
    for block in document["blocks"]:
        qk, vo, hidden = 3 * 16, 3 * 24, 192
        assert block["attention"]["macs"] == 17 * 96 * (2 * qk + 2 * vo) + 17 * 17 * (qk + vo)
        assert block["attention"]["params"] == 96 * (2 * qk + 2 * vo) + 2 * qk + vo + 96
        assert block["ffn"]["macs"] == 2 * 17 * 96 * hidden


def test_inspect_takes_shapes(model: Path) -> None:
    one, four = (
        json.loads(succeed("inspect", model, "--json", "--shape", f"pixels={n}x1x28x28"))["macs"] for n in (1, 4)
    )
    assert four == 4 * one
