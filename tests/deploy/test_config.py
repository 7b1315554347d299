"""Deployment files: what is read, and what every refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from toast_onnx.deploy.config import load_deployment
from toast_onnx.deploy.steps import plan_steps
from toast_onnx.errors import ConfigError

LEAST = "version: 1\nmodel: m.onnx\nprune: {ratios: r.yaml}\n"


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "d.yaml"
    path.write_text(text)
    return load_deployment(path)


def test_every_section_is_read_and_numbers_become_what_commands_take(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(
        LEAST + "precision: bf16\nbuild: {batch: 4, compute_capability: [8.9, '120']}\ncompare: {data: images}\n"
        "eval: {data: labelled, labels: l.csv}\nbench: {runtime: trtexec, batch: [1, 64], duration: 2}\n"
        "check: {tolerance: 0.05}\n"
    )
    found = load_deployment(path)
    assert found.build is not None
    assert (found.build.batch, found.build.compute_capability) == ("4", ("8.9", "120"))
    assert found.bench is not None
    assert (found.bench.runtime, found.bench.batch, found.bench.duration) == (("trtexec",), (1, 64), 2.0)
    assert found.check is not None
    assert found.check.tolerance == 0.05
    assert found.eval is not None
    assert found.eval.labels == "l.csv"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("prune: {ratios: r.yaml, data: 'code:run'}", "prune.data"),
        ("compare: {data: 'a.code:run'}", "compare.data"),
        ("eval: {data: 'code:run'}", "eval.data"),
        ("eval: {data: images, metric: 'code:run'}", "eval.metric"),
        ("eval: {data: images, metric: code}", "eval.metric"),
        ("build: {}\ncheck: {data: 'code:run'}", "check.data"),
    ],
)
def test_code_is_named_only_where_that_is_allowed(section: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(f"version: 1\nmodel: m.onnx\n{section}\n")
    with pytest.raises(ConfigError, match=f"{key} is Python code.*--allow-code"):
        load_deployment(path)
    load_deployment(path, allow_code=True)


@pytest.mark.parametrize("keys", ["model: --data=code:run", "model: m.onnx\noutput: --data=code:run"])
def test_no_path_is_taken_for_an_option(keys: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="starts with -"):
        read(tmp_path, LEAST.replace("model: m.onnx", keys))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "d.yaml holds no keys"),
        ("model: m.onnx\n", "d.yaml has no version; add the line `version: 1`"),
        ("version: 1\n", "d.yaml has no model; add the line"),
        ("version: 2\nmodel: m.onnx\nbuild: {}\n", "version is 2. Allowed: 1"),
        ("version: 1\nmodel: m.onnx\n", "asks for no step"),
        (LEAST + "bulid: {}\n", "unknown key 'bulid', did you mean build?"),
        ("version: 1\nmodel: m.onnx\nprune: {data: x}\n", "prune has no ratios; add the key"),
        ("version: 1\nmodel: m.onnx\nprune: {ratios: r, data: x, statistics: y}\n", "keep one"),
        (LEAST + "check: {}\n", "check, which needs an engine"),
        (LEAST + "build: {format: ort}\ncheck: {}\n", "check, which needs an engine"),
        (LEAST + "bench: {runtime: [onnxruntime, trtexec]}\n", "which needs an engine"),
        (LEAST + "precision: bf16\nbuild: {format: ort}\n", "takes fp32 or fp16"),
        (LEAST + "precision: int8\n", "precision is the text 'int8'"),
        (LEAST + "bench: {batch: [1, 0]}\n", "must be at least 1"),
        (LEAST + "bench: {batch: []}\n", "bench.batch"),
        (LEAST + "build:\n", "build is empty"),
        (LEAST + "build: {}\ncheck: {tolerance: -1}\n", "check.tolerance"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(f"version: 1\nmodel: m.onnx\nprune: {{ratios: {'r' * 5000}}}\n")
    assert [step.name for step in plan_steps(load_deployment(path), path)] == ["prune"]


def test_a_goal_stands_in_place_of_ratios(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("version: 1\nmodel: m.onnx\nplan: {macs: 0.6}\nprune: {data: images}\n")
    (step,) = plan_steps(load_deployment(path), path)
    assert step.arguments[:4] == ("prune", "m.onnx", "--macs", "0.6")
    assert "--ratios" not in step.arguments
    assert step.outputs[2] == "deploy/m.pruned.ratios.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prune: {data: images}", "prune has no ratios; add the key, or a section plan"),
        ("plan: {macs: 0.6}\nprune: {data: images, ratios: r.yaml}", "goes with a section prune"),
        ("plan: {macs: 0.6}\nprune: {}", "goes with a section prune"),
        ("plan: {macs: 0.6, params: 0.5}\nprune: {data: images}", "exactly one goal"),
    ],
)
def test_goals_that_do_not_fit(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(f"version: 1\nmodel: m.onnx\n{text}\n")
    with pytest.raises(ConfigError, match=words):
        load_deployment(path)
