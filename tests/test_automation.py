"""Workflows, Dockerfiles, README and the extras agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(workflow: Path) -> list[str]:
    """Every line that a workflow runs."""
    document: dict[str, Any] = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    steps = [step for job in document["jobs"].values() for step in job.get("steps", [])]
    return [line.strip() for step in steps for line in step.get("run", "").splitlines()]


def test_continuous_integration_runs_the_tests_as_readme_does() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (wanted,) = {f"python {found}" for found in re.findall(r"-m pytest [^`\n]*", readme)}
    for name in ("ci.yml", "weekly.yml"):
        assert wanted in commands(ROOT / ".github" / "workflows" / name)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_ask_for_no_more_than_they_need(path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert document["permissions"] == {"contents": "read"}
    for name, job in document["jobs"].items():
        assert "uses" in job or "timeout-minutes" in job, f"{path.name}: {name} could run for hours"


def test_images_are_built_from_pinned_bases_and_do_not_run_as_root() -> None:
    for path in (ROOT / "docker").glob("*.Dockerfile"):
        text = path.read_text(encoding="utf-8")
        bases = re.findall(r"^ARG BASE=(\S+)", text, flags=re.MULTILINE)
        assert all(re.search(r":[\w.-]*\d", base) for base in bases)
        assert bases
        users = re.findall(r"^USER (\S+)", text, flags=re.MULTILINE)
        assert users
        assert users[-1] not in ("root", "0")
        assert re.search(r"^HEALTHCHECK", text, flags=re.MULTILINE)
        assert 'ENTRYPOINT ["toast-onnx"]' in text


def extra(name: str) -> list[str]:
    """Names of the packages that an extra brings."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines: list[str] = document["project"]["optional-dependencies"][name]
    return [re.split(r"[<>=!;\[ ]", line)[0] for line in lines]


def test_the_test_extra_holds_what_pages_and_plots_need() -> None:
    """README's second command installs that extra alone, and a fast test may not be skipped for a missing package."""
    assert set(extra("report")) <= set(extra("test"))


def test_the_core_brings_only_what_the_core_imports() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    modules = {
        "onnxruntime-gpu": "onnxruntime",
        "Pillow": "PIL",
        "PyYAML": "yaml",
    }
    rooms = ("toast_onnx", "calibration", "cli")
    text = "\n".join(p.read_text(encoding="utf-8") for room in rooms for p in (ROOT / room).rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, flags=re.MULTILINE))
    core = {re.split(r"[<>=!;\[ ]", line)[0] for line in document["project"]["dependencies"]}
    assert {name for name in core if modules.get(name, name) not in imported} == set()


def test_continuous_integration_begins_with_what_readme_says() -> None:
    """Nothing is installed before README's own commands, or between them: they would pass for another reason."""
    steps = re.findall(r'^\s*step "([^"]+)"', (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert steps[:3] == ["README's first command", "README's second command", "tools"]
    before = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split('step "tools"')[0]
    assert "pip install" not in before
