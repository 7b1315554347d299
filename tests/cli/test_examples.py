"""Every command's `--help` ends with examples, and each of them does what it says where its needs are met."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from _pytest.mark import ParameterSet
from click.testing import CliRunner
from PIL import Image

from tests.end_to_end.command import DIGITS
from toast_onnx_cli import console
from toast_onnx_cli.commands import ToastCommand, folded
from toast_onnx_cli.main import SUBCOMMANDS, main

CONTEXT = click.Context(main)
#: Characters of the narrowest terminal.
NARROW = 60
#: What an example needs that is not everywhere, and what its command says without it.
ELSEWHERE = {
    "build model.pruned.onnx -o": "TensorRT",
    "check-engine": "GPU",
    "deploy deploy.yaml": "elsewhere.sh",
}
#: The user's own defaults (`TOAST_COMMAND_OPTION`) while examples run: enough to see that they do.
FEW = {
    "SENSITIVITY_SAMPLES": "8",
    "PLAN_SAMPLES": "8",
    "SWEEP_SAMPLES": "8",
    "PRUNE_SAMPLES": "64",
    "ANALYZE_SAMPLES": "16",
    "COMPARE_SAMPLES": "32",
    "COMPARE_ROUNDS": "2",
    "BENCH_ROUNDS": "2",
    "COSTS_ROUNDS": "2",
    "FINETUNE_SAMPLES": "16",
}
#: Examples that take more than a second or two; a run of each of these commands is in the fast tests elsewhere.
DEAR = (
    "analyze",
    "bench",
    "compare",
    "costs",
    "deploy",
    "finetune",
    "plan",
    "prune",
    "quantize",
    "report",
    "sensitivity",
    "sweep",
)
FAST = ("prune model.onnx --ratios", "compare model.onnx model.pruned.onnx --data", "deploy deploy.yaml --dry-run")


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its name; those of a group one by one."""
    for name in SUBCOMMANDS:
        command = main.get_command(CONTEXT, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in command.commands.items())
        else:
            yield name, command


def examples() -> list[ParameterSet]:
    """The examples of all commands."""
    return [
        pytest.param(
            line, id=line, marks=[pytest.mark.slow] if line.startswith(DEAR) and not line.startswith(FAST) else []
        )
        for _, command in commands()
        for line in getattr(command, "examples", ())
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that examples speak of: a model with its recipe beside it, images in folders, earlier results."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copy(DIGITS, folder / "model.onnx")
    recipe = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))
    with np.load(DIGITS.with_name("digits_test.npz")) as file:
        for number, (pixels, label) in enumerate(zip(file["images"][:128], file["labels"], strict=False)):
            path = folder / "images" / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    shutil.copy(DIGITS.with_name("ratios.yaml"), folder)
    deployment = {"version": 1, "model": "model.onnx", "output": "deployed", "prune": {"ratios": "ratios.yaml"}}
    deployment |= {"build": {}, "eval": {"data": "images", "labels": "folders"}}
    (folder / "deploy.yaml").write_text(yaml.safe_dump(deployment))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(["prune", "model.onnx", "--ratios", "ratios.yaml"])
        for share, name in (("1/2", "a.npz"), ("2/2", "b.npz")):
            run(["calibrate", "model.onnx", "--data", "images", "--samples", "32", "--shard", share, "-o", name])
    for name, suffix in itertools.product(("small", "tiny"), (".onnx", ".json")):
        shutil.copy(folder / f"model.pruned{suffix}", folder / f"{name}{suffix}")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these files to work in."""
    folder = shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(folder)
    for name, value in FEW.items():
        monkeypatch.setenv(f"TOAST_{name}", value)
    return folder


def run(words: Sequence[str], **settings: Any) -> Any:
    """A command in this process, expected to succeed."""
    result = CliRunner().invoke(main, [*words], **settings)
    assert result.exit_code == 0, result.output
    return result


def prepare(line: str, place: Path) -> None:
    """What an earlier example of the same command's help, or another command, would have left."""
    if "model.costs.json" in line:
        run(["costs", "model.onnx", "--threads", "1", "--widths", "2", "--rounds", "2"])
    if "model.sweep/" in line:
        (place / "model.sweep").mkdir()
        for name in ("model.pruned", "small"):
            shutil.copy(f"{name}.json", "model.sweep")
    if line.startswith("check-engine"):
        (place / "model.engine").write_bytes(b"an engine")
    written = "small" if "-o small.onnx" in line else "model.pruned" if line.startswith("prune") else None
    for suffix in (".onnx", ".json") if written is not None else ():
        (place / f"{written}{suffix}").unlink()


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_has_examples_that_fit_a_narrow_terminal(name: str, command: click.Command) -> None:
    assert isinstance(command, ToastCommand)
    assert command.examples
    shown = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=NARROW).output
    lines = shown[shown.index("\nExample") :].splitlines()[2:]
    assert all(len(line) <= NARROW for line in lines)
    text = " ".join(" ".join(lines).replace("\\", " ").split())
    assert text == " ".join(f"toast-onnx {line}" for line in command.examples)
    for line in command.examples:
        assert f"{line} ".startswith(f"{name} ")
        known = {option for p in command.params for option in p.opts}
        assert {word for word in line.split() if word.startswith("-")} <= known


@pytest.mark.parametrize("line", examples())
def test_an_example_does_what_it_says(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(line, place)
    if "--max-drop" in line:  # three minutes; its search and judgement have tests in test_goals.py, its plans run below
        command = main.get_command(CONTEXT, line.split()[0])
        assert command is not None
        assert command.make_context(command.name, line.split()[1:]).params["max_drop"] == 2
        return
    if "--macs" in line:
        command = line.split()[0].upper()
        monkeypatch.setenv(f"TOAST_{command}_PARTS", "fc2")  # a quarter of the trials
        monkeypatch.setenv(f"TOAST_{command}_SAMPLES", "16" if command == "PRUNE" else "8")
    tables: list[tuple[int, int]] = []

    def noted(columns: Any, rows: Any, title: Any, align: Any, width: Any) -> list[str]:
        lines = console_lines(columns, rows, title, align, width)
        if not line.startswith(("build", "deploy")):  # whose cells hold sentences
            titles = len(console_lines((), (), title, None, width)) if title else 0
            tables.append((len(lines) - titles, len(console_lines(columns, rows, None, align, None))))
        assert all(len(each) <= width for each in lines)
        return lines

    console_lines = console.table_lines
    monkeypatch.setattr(console, "line_width", lambda: NARROW)
    monkeypatch.setattr(console, "table_lines", noted)
    result = CliRunner().invoke(main, line.split())
    if result.exit_code != 0:
        needs = next((need for start, need in ELSEWHERE.items() if line.startswith(start)), None)
        assert needs is not None, result.output
        (error,) = [each for each in result.stderr.splitlines() if each.startswith("Error:")]
        assert needs in error
    assert "Traceback" not in result.output
    assert all(narrow <= wide + 1 for narrow, wide in tables), tables  # no row takes two lines; headings may


def test_shared_options_stand_in_one_order_and_one_spelling() -> None:
    before: dict[tuple[str, str], str] = {}
    meanings: dict[str, set[tuple[str | None, str | None]]] = {}
    for name, command in commands():
        options = [p for p in command.params if isinstance(p, click.Option)]
        for first, second in itertools.combinations((p.opts[-1] for p in options), 2):
            before[first, second] = name
        for option in options:
            meanings.setdefault(option.opts[-1], set()).add((option.help, option.metavar))
    assert [f"{a} {b}: {before[a, b]}, {before[b, a]}" for a, b in before if a < b and (b, a) in before] == []
    same = ("--json", "--preprocess", "--max-pixels", "--provider", "--statistics", "--shape", "--no-links", "--target")
    assert {name: texts for name, texts in meanings.items() if name in same and len(texts) != 1} == {}
    assert {metavar for _, metavar in meanings["--data"]} == {"DATA"}
    assert {metavar for _, metavar in meanings["--labels"]} == {"LABELS"}


def test_a_long_line_is_folded_as_a_shell_reads_it() -> None:
    lines = folded("toast-onnx compare a.onnx b.onnx --data images/ --html page.html", 40)
    assert lines == ["toast-onnx compare a.onnx b.onnx \\", "    --data images/ --html page.html"]


def test_ratios_come_from_standard_input_and_documents_go_to_standard_output(place: Path) -> None:
    text = (place / "ratios.yaml").read_text()
    printed = run(["prune", "model.onnx", "--ratios", "-", "-o", "piped.onnx", "--report", "-"], input=text).stdout
    document = json.loads(printed)
    assert document["pruned"]["file"] == "piped.onnx"
    assert (place / "piped.onnx").read_bytes() == (place / "model.pruned.onnx").read_bytes()
    assert not (place / "piped.json").exists()
    assert not (place / "-").exists()


@pytest.mark.slow
def test_a_plan_is_piped_into_prune(place: Path) -> None:
    plan = run(["plan", "model.onnx", "--data", "images/", "--samples", "8", "--parts", "fc2", "--no-heads",
                "--params", "0.8", "-o", "-"]).stdout  # fmt: skip
    assert yaml.safe_load(plan)["version"] == 1
    assert not (place / "model.ratios.yaml").exists()
    run(["prune", "model.onnx", "--ratios", "-", "-o", "planned.onnx"], input=plan)


@pytest.mark.parametrize(
    ("text", "says"), [("", "is empty"), ("version: 1\nfnn: {}\n", "standard input"), ("\0", "text")]
)
def test_what_standard_input_lacks_is_one_line(text: str, says: str, place: Path) -> None:
    result = CliRunner().invoke(main, ["prune", "model.onnx", "--ratios", "-", "-o", "new.onnx"], input=text)
    assert result.exit_code == 1
    assert "Error: standard input" in result.stderr
    assert says in result.stderr


def test_quiet_may_stand_behind_the_command(place: Path) -> None:
    words = ["--data", "images/", "--samples", "8", "--ratios", "ratios.yaml", "-o"]
    loud = run(["calibrate", "model.onnx", *words, "loud.npz"])
    quiet = run(["calibrate", "-q", "model.onnx", *words, "quiet.npz"])
    assert "calibrating" in loud.stderr
    assert quiet.stderr == ""
    assert "quiet.npz" in quiet.stdout


def test_no_color_leaves_a_bar_without_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    coloured = []
    for _ in range(2):
        with console.progress("solving", 2) as advance:
            advance()
        coloured.append("\x1b[3" in capsys.readouterr().err)
        monkeypatch.setenv("NO_COLOR", "1")
    assert coloured == [True, False]
