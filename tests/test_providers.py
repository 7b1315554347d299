"""Execution providers: one list and one message for every command and for deployment files."""

from __future__ import annotations

import importlib
from pathlib import Path

import click
import onnxruntime as ort
import pytest

from tests.calibration.tiny import colour_model
from toast_onnx.deploy.config import Bench
from toast_onnx.engines.providers import open_session
from toast_onnx.errors import BackendError
from toast_onnx.providers import PROVIDERS, installed_providers, open_on
from toast_onnx_calibration.sessions import make_session
from toast_onnx_cli.main import SUBCOMMANDS


def test_every_command_offers_the_same_providers() -> None:
    commands = [importlib.import_module(f"toast_onnx_cli.{n.replace('-', '_')}").command for n in SUBCOMMANDS]
    offered = {
        command.name: option.type.choices
        for command in commands
        for option in command.params
        if option.name == "provider" and isinstance(option.type, click.Choice)
    }
    assert len(offered) >= 5
    assert {tuple(choices) for choices in offered.values()} == {tuple(PROVIDERS)}


@pytest.mark.parametrize("provider", list(PROVIDERS))
def test_a_deployment_file_takes_every_one(provider: str) -> None:
    assert Bench(provider=provider).provider == provider


def test_a_deployment_file_refuses_others() -> None:
    with pytest.raises(ValueError, match=f"Allowed: {', '.join(PROVIDERS)}"):
        Bench(provider="vulkan")


@pytest.mark.parametrize("provider", sorted(PROVIDERS.keys() - {"cpu"}))
def test_every_way_in_says_the_same_of_a_missing_one(
    provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = colour_model(tmp_path / "m.onnx")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert installed_providers() == ["cpu"]
    said = set()
    for way in (make_session, open_session, lambda p, name: open_on(str(p), name, ort.SessionOptions())):
        with pytest.raises(BackendError) as caught:
            way(path, provider)
        said.add(str(caught.value))
    (message,) = said
    assert message.startswith(f"provider {provider} is not installed (ONNX Runtime here lists cpu): install ")
    assert PROVIDERS[provider].package in message


def test_the_names_are_those_of_onnx_runtime() -> None:
    """ONNX Runtime knows the names of all providers it can be built with."""
    assert {p.name for p in PROVIDERS.values()} <= set(ort.get_all_providers())


def test_idle_threads_wait_in_a_loop_only_where_runs_are_timed(tmp_path: Path) -> None:
    path = colour_model(tmp_path / "m.onnx")
    for session, spins in ((open_session(path), "1"), (make_session(path), "0")):
        options = session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
