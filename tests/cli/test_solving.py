"""`--solve-on`: said in one line where there is no GPU, before any work, by every command that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
import pytest
import torch
from click.testing import CliRunner

from tests.calibration.tiny import colour_folder, colour_model
from toast_onnx.deploy.config import Prune, load_deployment
from toast_onnx.deploy.steps import plan_steps
from toast_onnx.importance.arithmetic import SOLVERS, solver
from toast_onnx_cli.main import main


@pytest.mark.parametrize("command", ["prune", "plan", "sensitivity", "sweep"])
def test_without_a_gpu_one_line_says_so(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, images = colour_model(tmp_path / "m.onnx"), colour_folder(tmp_path / "images")
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(main, [command, str(model), "--data", str(images), "--solve-on", "cuda"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: solving on cuda needs a GPU, and PyTorch finds none")
    assert result.output.endswith("solve on cpu\n")
    assert len(result.output.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
    assert solver() == "cpu"


def test_a_place_that_is_not_known_is_refused(tmp_path: Path) -> None:
    model = colour_model(tmp_path / "m.onnx")
    result = CliRunner().invoke(main, ["prune", str(model), "--solve-on", "tpu"])
    assert result.exit_code == 2
    assert "'tpu' is not one of 'cpu', 'cuda'" in result.output


def test_a_deployment_hands_it_on(tmp_path: Path) -> None:
    source = tmp_path / "deploy.yaml"
    source.write_text("version: 1\nmodel: m.onnx\nprune: {ratios: r.yaml, solve_on: cuda}\n")
    step = plan_steps(load_deployment(source), source)[0]
    assert step.arguments[step.arguments.index("--solve-on") + 1] == "cuda"
    assert step.needs == "gpu"  # it waits where there is none
    assert "torch" in step.packages


def test_the_deployment_file_knows_all_places() -> None:
    assert Prune.model_fields["solve_on"].annotation == Literal[tuple(SOLVERS)] | None


def test_a_shell_that_completes_a_line_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "cuda", lambda: pytest.fail("the GPU was asked for"))
    command = main.get_command(click.Context(main), "prune")
    assert command is not None
    command.make_context("prune", ["m.onnx", "--solve-on", "cuda"], resilient_parsing=True)
