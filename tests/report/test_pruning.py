"""The document beside a pruned model: what is needed to audit a run, and nothing that changes from run to run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

from tests.matching.tiny import DIM, HEADS, HIDDEN, WIDTH, block
from tests.pruning import UNEVEN, prune_file
from toast_onnx.report.pruning import json_bytes, pruning_report

OPTIONS = {"seed": 0}


def reported(folder: Path, settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Prune the tiny block and report."""
    graph, y = block()
    path, out = graph.save(folder / "tiny.onnx", y), folder / "new.onnx"
    dense, pruned = prune_file(path, settings, out, **options)
    return pruning_report(pruned, dense, out, OPTIONS)


def test_widths_and_costs_before_and_after(tmp_path: Path) -> None:
    document = reported(tmp_path, UNEVEN)
    (found,) = document["blocks"]
    assert (found["before"]["qk_dim"], found["before"]["vo_dim"], found["before"]["width"]) == (DIM, DIM, HIDDEN)
    assert (found["after"]["qk_dim"], found["after"]["vo_dim"], found["after"]["width"]) == (2, 3, HIDDEN // 2)
    for when in ("dense", "pruned"):
        path = tmp_path / document[when]["file"]
        assert document[when]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert document[when]["bytes"] == path.stat().st_size
    assert document["pruned"]["params"] < document["dense"]["params"]
    assert document["pruned"]["macs"] < document["dense"]["macs"]
    assert document["options"] == OPTIONS
    assert document["twin"]["worst"] <= document["twin"]["tolerance"]
    assert {"toast-onnx", "onnx", "onnxruntime", "numpy"} <= set(document["versions"])


def test_kept_indices_are_the_weights_that_are_there(tmp_path: Path) -> None:
    """Taking the reported indices out of the dense weights gives the weights of the pruned file."""
    found = reported(tmp_path, UNEVEN)["blocks"][0]["kept"]
    dense = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "tiny.onnx").graph.initializer}
    nodes = {n.name: n for n in onnx.load(tmp_path / "tiny.onnx").graph.node}
    new = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "new.onnx").graph.initializer]

    def weight(name: str) -> np.ndarray:
        return dense[nodes[f"{name}/MatMul"].input[1]]

    def columns(w: np.ndarray, kept: list[list[int]]) -> np.ndarray:
        return np.concatenate([w.reshape(WIDTH, HEADS, DIM)[:, h, k] for h, k in enumerate(kept)], axis=1)

    packed = np.concatenate([columns(weight(n), found[p]) for n, p in (("q", "qk"), ("k", "qk"), ("v", "vo"))], axis=1)
    fc1 = weight("fc1")[found["fc1"]][:, found["fc2"]]
    for expected in (packed, fc1, weight("fc2")[found["fc2"]], columns(weight("proj").T, found["vo"]).T):
        assert any(w.shape == expected.shape and np.array_equal(w, expected) for w in new)


def test_a_basis_has_no_indices(tmp_path: Path) -> None:
    document = reported(tmp_path, {"version": 1, "attention": {"qk": 0.5, "vo": 0.25}, "align": 1}, check=False)
    kept = document["blocks"][0]["kept"]
    assert kept == {"heads": None, "qk": "basis", "vo": "basis", "fc1": None, "fc2": None}
    assert document["twin"] is None
    assert "no data" in document["statistics"]


def test_dropped_heads_are_reported(tmp_path: Path) -> None:
    attention = {"heads": 0.5, "vo": 0.25, "select": "index", "score": "l2"}
    settings = {"version": 1, "attention": attention, "align": 1, "compensation": {"kind": "none"}}
    document = reported(tmp_path, settings)
    (found,) = document["blocks"]
    assert found["settings"]["heads"] == "0.5"
    assert (found["before"]["heads"], found["after"]["heads"]) == (HEADS, HEADS // 2)
    (head,) = found["kept"]["heads"]
    ((*dims,),) = found["kept"]["vo"]
    assert found["kept"]["qk"] is None  # every dimension of the head that stays
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "tiny.onnx").graph.initializer}
    proj = next(n for n in onnx.load(tmp_path / "tiny.onnx").graph.node if n.name == "proj/MatMul").input[1]
    rows = weights[proj].reshape(HEADS, DIM, WIDTH)[head, dims]
    new = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "new.onnx").graph.initializer]
    assert any(w.shape == rows.shape and np.array_equal(w, rows) for w in new)
    assert document["pruned"]["macs"] < document["dense"]["macs"]


def test_nothing_in_it_depends_on_time_or_place(tmp_path: Path) -> None:
    documents = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        documents.append(reported(tmp_path / name, UNEVEN))
    assert documents[0] == documents[1]
    assert str(tmp_path) not in json.dumps(documents[0])


def test_the_file_is_the_document(tmp_path: Path) -> None:
    document = reported(tmp_path, UNEVEN)
    assert json.loads(json_bytes(document)) == json.loads(json.dumps(document))
