"""The documentation: its runnable blocks run, its links lead somewhere, its options exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from _pytest.mark import ParameterSet

from toast_onnx.deploy.config import load_deployment
from toast_onnx.deploy.steps import plan_steps
from toast_onnx.importance.scores import ATTENTION_SCORES, FFN_SCORES
from toast_onnx.planning.ratios import load_ratios, resolve
from toast_onnx.solving.compensations import COMPENSATIONS
from toast_onnx_calibration.recipes import parse_recipe
from toast_onnx_cli.main import SUBCOMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLE_FILES = sorted(p for p in (ROOT / "examples").iterdir() if p.is_file())
BLOCK = re.compile(r"<!-- runnable(?:: (?P<kind>\w+))? -->\n```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
DATA = ("ratios", "recipe", "deployment")  # checked as data; any other word is a module that the block needs
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def blocks(page: Path) -> list[re.Match[str]]:
    """The runnable blocks of a page, in order."""
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def prose(page: Path) -> str:
    """A page without its code blocks and comments."""
    return re.sub(r"^ *```.*?^ *```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What Python-Markdown makes of the headings: lower case, no punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def pages_to_run() -> Iterator[ParameterSet]:
    """Pages with commands to run."""
    for page in PAGES:
        if any(block["kind"] not in DATA for block in blocks(page)):
            yield pytest.param(page, id=page.stem)


@pytest.mark.slow  # README's first command runs the example in every run
@pytest.mark.parametrize("page", list(pages_to_run()))
def test_runnable_blocks_run(page: Path, tmp_path: Path) -> None:
    for source in EXAMPLE_FILES:
        shutil.copy(source, tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    missing = set()
    for block in blocks(page):
        needs = block["kind"]
        if needs in DATA:
            continue
        if needs and importlib.util.find_spec(needs) is None:
            missing.add(needs)
            continue
        command = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}[block["language"]]
        done = subprocess.run(
            [*command, block["text"]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{page.name}:\n{block['text']}\n{done.stderr}"
    if missing:
        pytest.skip(f"ran all blocks but those that need {', '.join(sorted(missing))}, not installed here")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_marked_as_runnable_is_of_a_kind_that_a_test_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^<!-- runnable", text, flags=re.MULTILINE)) == len(blocks(page))
    for block in blocks(page):
        assert block["language"] == "yaml" if block["kind"] in DATA else block["language"] in ("bash", "python")


def shown(kind: str) -> list[str]:
    """The data blocks of a kind, of all pages."""
    return [block["text"] for page in PAGES for block in blocks(page) if block["kind"] == kind]


def test_ratios_shown_are_read_and_fit_the_example(tmp_path: Path) -> None:
    texts = shown("ratios")
    assert len(texts) >= 2
    names = [f"block.{index}" for index in range(6)]
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        assert len(resolve(load_ratios(path), names, [[name] for name in names])) == 6


def test_deployments_shown_are_read_and_name_files_of_the_example(tmp_path: Path) -> None:
    texts = [*shown("deployment"), (ROOT / "examples" / "deploy.yaml").read_text(encoding="utf-8")]
    assert len(texts) >= 2
    for source in EXAMPLE_FILES:
        shutil.copy(source, tmp_path)
    for text in texts:
        path = tmp_path / "shown.yaml"
        path.write_text(text, encoding="utf-8")
        written: set[str] = set()
        for step in plan_steps(load_deployment(path), path):
            known = {name for name in step.inputs if (tmp_path / name).exists() or name == "none"}
            assert set(step.inputs) <= known | written
            written |= set(step.outputs)


def test_scores_and_compensations_are_described_as_their_tables_say() -> None:
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    for key, table in (("attention.score", ATTENTION_SCORES), ("ffn.score", FFN_SCORES)):
        shown_rows = re.findall(rf"^\| `{key}` \| `([\w-]+)` \| (\w+) \| (.+) \|$", text, flags=re.MULTILINE)
        assert shown_rows == [(name, entry.needs, entry.meaning) for name, entry in table.items()]
        assert f"| `{key}` | {', '.join(f'`{name}`' for name in table)} |" in text
    kinds = re.search(r"^\| `compensation.kind` \| ([^|]+) \|", text, flags=re.MULTILINE)
    assert kinds is not None
    assert set(re.findall(r"`(\w+)`", kinds[1])) == set(COMPENSATIONS)


def test_recipe_shown_is_read() -> None:
    assert [parse_recipe(yaml.safe_load(text), "docs").crop for text in shown("recipe")] == [224]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in (m["target"] for m in LINK.finditer(prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name} links to {target}; {found.name} has {sorted(anchors(found))}"


def test_every_command_is_described_and_every_described_option_exists() -> None:
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    sections = dict(zip(*[iter(re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:])] * 2, strict=True))
    context = click.Context(main)
    for name in SUBCOMMANDS:
        found = {words.split()[0] for words in sections}
        assert name in found, f"commands.md lacks {name}: run python docs/generate_commands.py"
    for name, section in sections.items():
        command = main.get_command(context, name.split()[0])
        for word in name.split()[1:]:
            assert isinstance(command, click.Group)
            command = command.get_command(context, word)
        assert command is not None, f"commands.md describes {name}, which does not exist"
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        described = set(re.findall(r"^\| `(?:-\w, )?(--[\w-]+)", section, flags=re.MULTILINE))
        assert described
        assert described <= known, f"{name}: run python docs/generate_commands.py"


def test_the_navigation_names_pages_that_exist() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [
        entry for part in navigation for entry in (next(iter(part.values())) if isinstance(part, dict) else [part])
    ]
    assert len(named) == len({*named})
    assert {*named} == {page.name for page in PAGES}
