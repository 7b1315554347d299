"""Links that lead out of a model's folder are followed, said, and refused where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from click.testing import CliRunner, Result

from tests.matching.tiny import block
from toast_onnx.model import links_out
from toast_onnx_cli.main import main


def cached(folder: Path) -> Path:
    """A model whose weights lie in a store beside its folder, as download caches keep them."""
    graph, y = block()
    (folder / "view").mkdir()
    (folder / "store").mkdir()
    path = folder / "view" / "model.onnx"
    onnx.save(onnx.load(graph.save(path, y)), path, save_as_external_data=True, location="w.bin", size_threshold=200)
    (path.parent / "w.bin").rename(folder / "store" / "blob")
    (path.parent / "w.bin").symlink_to(folder / "store" / "blob")
    return path


def prune(path: Path, *options: str) -> Result:
    ratios = path.with_name("r.yaml")
    ratios.write_text("version: 1\nffn: {fc2: 0.5}\n")
    return CliRunner().invoke(main, ["prune", str(path), "--ratios", str(ratios), *options])


def test_links_are_followed_and_said(tmp_path: Path) -> None:
    path = cached(tmp_path)
    result = prune(path)
    assert result.exit_code == 0, result.stderr
    report = json.loads(path.with_name("model.pruned.json").read_text())
    assert report["dense"]["links"] == {"w.bin": str((tmp_path / "store" / "blob").resolve())}


def test_links_are_refused_where_that_is_asked_for(tmp_path: Path) -> None:
    path = cached(tmp_path)
    result = prune(path, "--no-links")
    assert result.exit_code == 1
    assert "'w.bin' is a link to" in result.stderr
    assert not path.with_name("model.pruned.onnx").exists()


def test_a_model_without_links_says_nothing(tmp_path: Path) -> None:
    graph, y = block()
    path = graph.save(tmp_path / "model.onnx", y)
    assert links_out(path) == {}
    assert prune(path, "--no-links").exit_code == 0
    assert "links" not in json.loads(path.with_name("model.pruned.json").read_text())["dense"]
