"""Standard error holds the tool's own words: no warnings of NumPy, no coloured log of ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from tests.end_to_end.command import refuse, toast, write_ratios
from tests.matching.tiny import TOKENS, WIDTH, Graph, block
from tests.pruning import UNEVEN


def beside_progress(stderr: str) -> list[str]:
    """The lines of standard error but those that say what the command is at."""
    progress = ("pruning ...", "pruning: done", "evaluating ", "measuring ")
    return [line for line in stderr.splitlines() if not line.startswith(progress)]


def odd_constants(graph: Graph, scores: str) -> str:
    """Adds to the scores what a T5's buckets do on their way: the logarithm of 0 and NaN as an integer, unused."""
    distance = graph.constant(np.arange(TOKENS), np.float32)
    logarithm = graph.add("Log", distance)  # log(0)
    nothing = graph.add("Mul", logarithm, graph.constant(0.0, np.float32))  # -inf * 0
    bucket = graph.add("Cast", nothing, to=onnx.TensorProto.INT64)
    large = graph.add("Cast", graph.add("Exp", graph.constant([1e4] * TOKENS, np.float32)), to=onnx.TensorProto.INT32)
    near = graph.add("Less", distance, graph.constant(100, np.float32))
    both = graph.add("Add", bucket, graph.add("Cast", large, to=onnx.TensorProto.INT64))
    kept = graph.add("Where", near, graph.constant([0] * TOKENS), both)
    return graph.add("Add", scores, graph.add("Cast", kept, to=onnx.TensorProto.FLOAT))


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that is a file: ONNX Runtime cannot store its identifier there and would say so."""
    (tmp_path / "home").write_text("")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)


@pytest.mark.usefixtures("homeless")
def test_constants_that_are_no_numbers_are_folded_in_silence(tmp_path: Path) -> None:
    graph, y = block(scores=odd_constants)
    path = graph.save(tmp_path / "model.onnx", y)
    for command in (("inspect", path), ("prune", path, "--ratios", write_ratios(tmp_path / "r.yaml", UNEVEN))):
        done = toast(*command)
        assert done.returncode == 0, done.stderr
        assert beside_progress(done.stderr) == []


def misfit(folder: Path) -> Path:
    """A model that is well-formed to ONNX and that ONNX Runtime fails to run: 4 columns meet 5 rows."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "misfit",
        [info("x", onnx.TensorProto.FLOAT, ["batch", "columns"])],
        [info("y", onnx.TensorProto.FLOAT, ["batch", 3])],
        [onnx.numpy_helper.from_array(np.ones((5, 3), np.float32), "w")],
    )
    path = folder / "misfit.onnx"
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def unknown(folder: Path) -> Path:
    """A model with an operator that ONNX Runtime has none of."""
    graph, y = block()
    graph.nodes.append(onnx.helper.make_node("Sparkle", [y], ["z"], domain="com.example"))
    path = graph.save(folder / "unknown.onnx", "z")
    model = onnx.load(path)
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(model, path)
    return path


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("command", ["eval", "bench", "build"])
def test_what_onnx_runtime_refuses_is_one_line_of_ours(command: str, tmp_path: Path) -> None:
    model = unknown(tmp_path) if command != "eval" else misfit(tmp_path)
    name, shape = ("x", (8, 4)) if command == "eval" else ("x", (8, TOKENS, WIDTH))
    np.savez(tmp_path / "data.npz", **{name: np.ones(shape, np.float32)})
    np.save(tmp_path / "labels.npy", np.zeros(8, np.int64))
    arguments = {
        "eval": ("--data", tmp_path / "data.npz", "--labels", tmp_path / "labels.npy", "--preprocess", "none"),
        "bench": ("--rounds", "2"),
        "build": ("--format", "ort", "-o", tmp_path / "out.ort"),
    }[command]
    line = refuse(command, model, *arguments)
    done = toast(command, model, *arguments)
    assert beside_progress(done.stderr) == [line]
    assert "ONNX Runtime" in line


def test_the_library_leaves_the_log_as_it_was_and_telemetry_off(tmp_path: Path) -> None:
    code = (
        "import os\nfrom toast_onnx.ort import ort, quiet\nassert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "with quiet():\n    pass\nos.write(2, b'still here')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "still here")
