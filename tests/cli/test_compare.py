"""`toast-onnx compare`, and the measures it reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from tests import zoo
from tests.pruning import UNEVEN, look, prune_file
from tests.pruning import run as run_model
from toast_onnx.runtime import expose
from toast_onnx_calibration.agreement import Agreement, cosines, divergences
from toast_onnx_calibration.comparison import Comparison
from toast_onnx_cli.main import SUBCOMMANDS, main

Exported = Callable[[zoo.Case], Path]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Exported) -> Path:
    monkeypatch.chdir(tmp_path)
    source = exported(zoo.Case("timm-vit"))
    (tmp_path / "m.onnx").write_bytes(source.read_bytes())
    prune_file(tmp_path / "m.onnx", UNEVEN, tmp_path / "p.onnx")
    np.save(tmp_path / "x.npy", zoo.inputs(source, 5)["input"])
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compare", *arguments, "--data", "x.npy", "--threads", "1"])


def test_it_is_a_command() -> None:
    assert "compare" in SUBCOMMANDS


def test_a_model_agrees_with_itself(files: Path) -> None:
    document = json.loads(run("m.onnx", "m.onnx", "--rounds", "0", "--json").stdout)
    (logits,) = document["outputs"].values()
    assert logits["top1_agreement"] == 1
    assert logits["kl"] == pytest.approx(0, abs=1e-9)
    assert logits["relative_error"] < 1e-6
    assert document["latency"] is None
    assert all(b[part]["cosine"] == pytest.approx(1) for b in document["blocks"] for part in ("attention", "ffn"))


def test_behind_merged_tokens_the_class_token_is_compared(files: Path) -> None:
    """Of branches in front of the first merge all tokens, behind it the one that is never merged, by hand."""
    prune_file(files / "m.onnx", UNEVEN | {"tokens": {"merge": 0.2}}, files / "merged.onnx")
    document = json.loads(run("m.onnx", "merged.onnx", "--rounds", "0", "--json").stdout)
    feeds = {"input": np.load(files / "x.npy")}
    for k, seen in ((0, slice(None)), (1, slice(0, 1))):
        names = [look(files / name).match.blocks[k].attention.proj.linear.output for name in ("m.onnx", "merged.onnx")]
        a, b = (
            ort.InferenceSession(expose(onnx.load(files / file), [name]).SerializeToString()).run([name], feeds)[0]
            for file, name in zip(("m.onnx", "merged.onnx"), names, strict=True)
        )
        a, b = a[:, seen].astype(np.float64), b[:, seen].astype(np.float64)
        found = document["blocks"][k]["attention"]
        assert found["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4)
        assert found["cosine"] == pytest.approx(cosines(a.reshape(-1, 192), b.reshape(-1, 192)).mean(), rel=1e-4)
    assert any("3 of 4 branches: of these the learned tokens" in note for note in document["notes"])


def test_figures_are_those_of_numpy(files: Path) -> None:
    result = run("m.onnx", "p.onnx", "--rounds", "2", "--batch", "2", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    feeds = {"input": np.load(files / "x.npy")}
    a, b = (run_model(files / name, feeds)[0].astype(np.float64) for name in ("m.onnx", "p.onnx"))
    p, q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    found = document["outputs"]["logits"]
    assert found["kl"] == pytest.approx(float((np.exp(p) * (p - q)).sum(axis=1).mean()), rel=1e-4)
    assert found["top1_agreement"] == (a.argmax(axis=1) == b.argmax(axis=1)).mean()
    assert found["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4)
    assert document["samples"] == 5
    assert document["models"]["pruned"]["macs"] < document["models"]["dense"]["macs"]
    assert document["models"]["pruned"]["bytes"] == (files / "p.onnx").stat().st_size
    assert [t["batch"] for t in document["latency"]] == [2, 2]
    assert len(document["blocks"]) == 2


def test_tables(files: Path) -> None:
    result = run("m.onnx", "p.onnx", "--rounds", "1")
    assert result.exit_code == 0, result.stderr
    for word in ("MACs", "parameters", "latency", "same top-1", "attention", "ffn"):
        assert word in result.stdout


def comparison(same: float | None, speedup: float = 1.5, spread: float = 0.02) -> Comparison:
    """A comparison with made-up figures."""
    figures = {"macs": 100, "params": 100, "bytes": 100, "tokens": []}
    models = {"dense": figures | {"file": "d.onnx"}, "pruned": {**figures, "macs": 60, "bytes": 55, "file": "p.onnx"}}
    quartiles = [speedup - 0.1, speedup + 0.1]
    timing = {"batch": 1, "median_ms": 10.0, "spread": spread, "speedup": speedup, "speedup_quartiles": quartiles}
    first = timing | {"speedup": 1.0, "speedup_quartiles": [1.0, 1.0]}
    entry = {"cosine": 0.9, "relative_error": 0.25} | ({} if same is None else {"top1_agreement": same, "kl": 0.5})
    return Comparison(models, {"logits": entry}, [], [first, timing], 64, {}, ())


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            comparison(0.9),
            "p.onnx answers as the dense model does on 90.0% of 64 samples (KL 0.500) and takes 60% of its",
        ),
        (comparison(0.4), "p.onnx HARDLY AGREES any more"),
        (comparison(None), "differs from the dense model's outputs by 25.00% of their size"),
        (comparison(0.9), "1.50 times as fast (1.40 to 1.60)"),
        (comparison(0.9, 1.05), "no difference in latency could be told (0.95 to 1.15"),
    ],
)
def test_a_sentence_says_what_became_of_the_model(found: Comparison, words: str) -> None:
    assert words in found.verdict


def test_a_busy_machine_is_told() -> None:
    assert comparison(0.9).tables[0].lines == ()
    (line,) = comparison(0.9, spread=0.4).tables[0].lines
    assert "rounds differ by 40%" in line
    assert "10.00 ms, spread 40%" in comparison(0.9, spread=0.4).tables[0].text()


def test_the_sentence_is_first(files: Path) -> None:
    assert run("m.onnx", "p.onnx", "--rounds", "0").stdout.startswith("p.onnx ")


def test_tokens_behind_every_block_are_shown_where_some_were_merged(files: Path) -> None:
    prune_file(files / "m.onnx", {"version": 1, "tokens": {"merge": 0.2}}, files / "merged.onnx")
    result = run("m.onnx", "merged.onnx", "--rounds", "0")
    assert "tokens, first .. last block" in result.stdout
    assert "17 .. 17" in result.stdout
    assert "14 .. 1" in result.stdout  # 0.2 of 17 went; behind the last attention the class token alone is read
    assert "tokens, first" not in run("m.onnx", "p.onnx", "--rounds", "0").stdout


def test_tokens_are_compared_without_classes(files: Path, exported: Exported) -> None:
    source = exported(zoo.Case("hf-dinov2"))
    np.save(files / "x.npy", zoo.inputs(source, 2)["pixel_values"])
    document = json.loads(run(str(source), str(source), "--rounds", "0", "--json").stdout)
    assert set(document["outputs"]["last_hidden_state"]) == {"cosine", "relative_error"}


def test_models_that_do_not_belong_together(files: Path, exported: Exported) -> None:
    result = run("m.onnx", str(exported(zoo.Case("hf-dinov2"))))
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert "pixel_values" in line


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 999))
def test_divergence_of_scores_and_of_probabilities(rows: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, rows, classes)) * 3
    p, q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    expected = (np.exp(p) * (p - q)).sum(axis=1)
    np.testing.assert_allclose(divergences(a, b), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(divergences(np.exp(p), np.exp(q)), expected, rtol=1e-6, atol=1e-9)


def test_cosines_of_zero_rows() -> None:
    a, b = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    np.testing.assert_allclose(cosines(a, b), [1, 0, 1])


def test_batches_add_up() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 7, 3, 4))
    whole, parts = Agreement(True), Agreement(True)
    whole.add(a, b)
    for start, end in ((0, 2), (2, 5), (5, 7)):
        parts.add(a[start:end], b[start:end])
    assert parts.rows == whole.rows
    assert parts.to_json() == pytest.approx(whole.to_json())


def test_several_models_are_held_against_one_as_each_alone(files: Path) -> None:
    alone = [json.loads(run("m.onnx", name, "--rounds", "0", "--json").stdout) for name in ("p.onnx", "m.onnx")]
    result = run("m.onnx", "p.onnx", "m.onnx", "--rounds", "0", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    for one, each in zip(alone, document["comparisons"], strict=True):
        assert each == {key: value for key, value in one.items() if key != "read"}
    assert [m["file"] for m in document["models"]] == ["p.onnx", "m.onnx"]


def test_several_models_make_one_table_a_chart_and_csv(files: Path) -> None:
    result = run("m.onnx", "p.onnx", "m.onnx", "--rounds", "1", "--html", "c.html", "--sort", "kl")
    assert result.exit_code == 0, result.stderr
    first, *rest = result.stdout.splitlines()
    assert "is nearest to m.onnx" in first
    assert "branch outputs" not in result.stdout
    assert [line.split()[0] for line in rest if ".onnx" in line] == ["m.onnx", "m.onnx", "p.onnx"]
    assert "same answers against MACs left" in (files / "c.html").read_text()
    again = run("m.onnx", "p.onnx", "--rounds", "0", "--html", "c.html")
    assert "c.html exists already; give --overwrite" in again.stderr
