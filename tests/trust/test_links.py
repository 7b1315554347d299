"""Links that lead out of a model's folder are followed, said, and refused where that is asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from tests.matching.tiny import TOKENS, WIDTH, block
from toast_onnx.errors import ModelError
from toast_onnx.files import files_read, read_limited, remember_files
from toast_onnx.model import links_out
from toast_onnx_cli.main import SUBCOMMANDS, main


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
    report = json.loads(path.with_name("model.pruned.json").read_text())
    assert [f["file"] for f in report["dense"]["files"]] == ["model.onnx"]
    assert "links" not in json.loads(path.with_name("model.pruned.json").read_text())["dense"]


@pytest.mark.parametrize("what", ["weights", "graph"])
def test_every_command_that_reads_a_model_refuses_links(what: str, tmp_path: Path) -> None:
    path = cached(tmp_path)
    if what == "graph":
        graph, y = block()
        graph.save(tmp_path / "whole.onnx", y)
        path.unlink()
        path.symlink_to(tmp_path / "whole.onnx")
    np.save(tmp_path / "x.npy", np.zeros((2, TOKENS, WIDTH), np.float32))
    data, model = str(tmp_path / "x.npy"), str(path)
    for words in (
        ["inspect", model],
        ["calibrate", model, "--data", data],
        ["analyze", model, "--data", data],
        ["sensitivity", model, "--data", data],
        ["plan", model, "--data", data, "--macs", "0.8"],
        ["costs", model],
        ["compare", model, model, "--data", data],
        ["eval", model, "--data", data, "--metric", "json:dumps"],
        ["build", model, "--format", "onnx", "--precision", "fp16"],
        ["bench", model],
        ["finetune", model, "--teacher", model, "--data", data, "--steps", "1"],
    ):
        result = CliRunner().invoke(main, [*words, "--no-links"])
        assert result.exit_code == 1, (words, result.output)
        assert "is a link to" in result.stderr, (words, result.output)
    assert set(SUBCOMMANDS) - {"presets", "statistics"} == {
        name for name in SUBCOMMANDS if "--no-links" in CliRunner().invoke(main, [name, "--help"]).output
    }


def test_the_report_names_every_file_that_was_read(tmp_path: Path) -> None:
    graph, y = block()
    path, ratios = graph.save(tmp_path / "model.onnx", y), tmp_path / "r.yaml"
    ratios.write_text("version: 1\nalign: 1\nffn: {fc2: 0.5}\n")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((64, TOKENS, WIDTH)).astype(np.float32))
    statistics = tmp_path / "s.npz"
    measured = CliRunner().invoke(
        main, ["calibrate", str(path), "--data", str(tmp_path / "x.npy"), "-o", str(statistics), "--json"]
    )
    assert measured.exit_code == 0, measured.output
    assert [f["file"] for f in json.loads(measured.stdout)["read"]] == ["x.npy"]
    words = ["prune", str(path), "--ratios", str(ratios), "--statistics", str(statistics)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    report = json.loads(path.with_name("model.pruned.json").read_text())
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, ratios, statistics)}
    assert {f["file"]: f["sha256"] for f in (*report["dense"]["files"], *report["read"])} == expected
    for name, digest in expected.items():
        assert f"{name} {digest[:12]}" in result.stdout


def test_every_command_that_prints_json_names_what_it_read(tmp_path: Path) -> None:
    graph, y = block()
    path, data = graph.save(tmp_path / "model.onnx", y), tmp_path / "x.npy"
    np.save(data, np.random.default_rng(0).standard_normal((64, TOKENS, WIDTH)).astype(np.float32))
    trials = ["--parts", "fc2", "--ratios", "0.5", "--samples", "8"]
    for words, read in (
        (["inspect", path], []),
        (["sensitivity", path, "--data", data, *trials], ["x.npy"]),
        (["costs", path, "--parts", "fc2", "--rounds", "1", "--widths", "2"], []),
        (["bench", path, "--rounds", "1"], []),
        (["build", path, "--format", "onnx", "--precision", "fp16"], []),
    ):
        result = CliRunner().invoke(main, [*map(str, words), "--json"])
        assert result.exit_code == 0, (words, result.output)
        document = json.loads(result.stdout)
        assert [f["file"] for f in document["read"]] == read, words
        assert hashlib.sha256(path.read_bytes()).hexdigest() in json.dumps(document), words


def test_a_file_that_was_written_again_has_no_hash(tmp_path: Path) -> None:
    remember_files()
    (tmp_path / "a").write_bytes(b"1")
    read_limited(tmp_path / "a", 10, ModelError, "")
    (tmp_path / "a").write_bytes(b"22")
    assert files_read() == [{"file": "a", "sha256": None, "bytes": 1}]
    remember_files()
    assert files_read() == []
