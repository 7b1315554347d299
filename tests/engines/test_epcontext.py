"""Models with their engines inside, with a STAND-IN for the provider: the real ones need a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.helper
import pytest

from tests.engines import graphs
from toast_onnx.engines import cuda, epcontext
from toast_onnx.engines.epcontext import build_ep_context
from toast_onnx.engines.record import read_record, record_path
from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.model import file_hash


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return graphs.save(graphs.mlp(), tmp_path / "m.onnx")


def provider(monkeypatch: pytest.MonkeyPatch, *nodes: str) -> dict[str, Any]:
    """A provider that writes a model of these nodes where the session's settings say; returns what it was given."""
    given: dict[str, Any] = {}

    def open_on(source: str, name: str, options: Any, settings: dict[str, str], label: str) -> None:
        keys = ("ep.context_enable", "ep.context_embed_mode", "ep.context_file_path")
        given.update({key: options.get_session_config_entry(key) for key in keys}, settings=settings, name=name)
        made = [onnx.helper.make_node(op, ["x"], ["y"], domain="com.microsoft") for op in nodes]
        graph = graphs.mlp().graph
        written = onnx.helper.make_graph(made, "context", graph.input, graph.output)
        onnx.save(onnx.helper.make_model(written), given["ep.context_file_path"])

    monkeypatch.setattr(epcontext, "open_on", open_on)
    return given


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_provider_is_asked_for_one_file_and_the_profile(
    backend: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = provider(monkeypatch, "EPContext")
    out = model.with_name("c.onnx")
    record = build_ep_context(model, out, backend=backend, batch=(1, 2, 4))
    assert (given["name"], given["ep.context_enable"], given["ep.context_embed_mode"]) == (backend, "1", "1")
    prefix = "trt" if backend == "tensorrt" else "nv"
    assert given["settings"][f"{prefix}_profile_max_shapes"] == "x:4x4x32"
    assert [n.op_type for n in onnx.load(out).graph.node] == ["EPContext"]
    assert record["engines_inside"] == 1
    found = read_record(out)
    assert found is not None
    assert (found.backend, found.model_sha256) == (backend, file_hash(model))


def test_a_provider_that_took_nothing_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provider(monkeypatch, "FusedMatMul")
    with pytest.raises(BackendError, match="took no node"):
        build_ep_context(model, model.with_name("c.onnx"), backend="tensorrt")
    assert not model.with_name("c.onnx").exists()
    assert not record_path(model.with_name("c.onnx")).exists()


def test_without_a_gpu_one_line_says_what_to_do(model: Path) -> None:
    if cuda.driver() is not None:
        pytest.skip("a GPU is here")
    with pytest.raises(BackendError, match=r"builds on a GPU.*--format engine --backend tensorrt-rtx"):
        build_ep_context(model, model.with_name("c.onnx"))


def test_other_names_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"writes \.onnx files"):
        build_ep_context(model, model.with_name("c.ort"))
    with pytest.raises(ConfigError, match="the model itself"):
        build_ep_context(model, model)
