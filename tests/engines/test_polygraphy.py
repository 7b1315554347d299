"""The Polygraphy script: what it says, and (slow: a package more) that Polygraphy runs it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

import onnx
import onnx.numpy_helper
import pytest

from tests.engines import graphs
from toast_onnx.engines.engine_check import TOLERANCES
from toast_onnx.engines.polygraphy import comparison_script

RECORD = {
    "backend": "tensorrt-rtx",
    "precision": "fp16",
    "profile": {"x": {"min": [1, 4, 32], "opt": [2, 4, 32], "max": [4, 4, 32]}},
}


def written(folder: Path) -> Path:
    model = graphs.save(graphs.mlp(), folder / "m.onnx")
    script = folder / "check.py"
    (folder / "out").mkdir()
    engine = folder / "out" / "m.engine"
    script.write_text(comparison_script(script, engine, model, onnx.load(model), RECORD))
    return script


def test_it_is_python_and_holds_what_the_engine_was_built_for(tmp_path: Path) -> None:
    text = written(tmp_path).read_text()
    compile(text, "check.py", "exec")
    assert "INPUTS = {\n    'x': ('float32', (2, 4, 32)),\n}" in text
    assert f"TOLERANCE = {TOLERANCES['fp16']}" in text
    assert "'out/m.engine'" in text
    assert 'setdefault("POLYGRAPHY_USE_TENSORRT_RTX", "1")' in text
    assert "POLYGRAPHY_USE" not in comparison_script(
        tmp_path / "c.py", tmp_path / "e", tmp_path / "m.onnx", graphs.mlp(), RECORD | {"backend": "tensorrt"}
    )


@pytest.mark.slow
@pytest.mark.parametrize(("error", "status"), [(0.0, 0), (1e-3, 0), (0.5, 1)])
def test_polygraphy_runs_it(error: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a STAND-IN for the engine, since none runs here: the model with an output bias that is off."""
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install --no-deps polygraphy")
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    script = written(tmp_path)
    other = graphs.mlp()
    other.graph.node[-1].output[0] = "probabilities"
    other.graph.node.append(onnx.helper.make_node("Add", ["probabilities", "error"], ["y"]))
    other.graph.initializer.append(onnx.numpy_helper.from_array(graphs.np.float32(error), "error"))
    off = graphs.save(other, tmp_path / "off.onnx")
    stand_in = ModuleType("polygraphy.backend.trt")
    stand_in.EngineFromBytes = lambda _: SessionFromOnnx(str(off), providers=["cpu"])  # type: ignore[attr-defined]
    stand_in.TrtRunner = OnnxrtRunner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", stand_in)
    main = runpy.run_path(str(script))["main"]
    assert main() == status
