"""Options that take numbers: only finite ones within their bounds."""

from __future__ import annotations

import importlib

import click
import pytest
from click.testing import CliRunner

from toast_onnx_cli.main import SUBCOMMANDS, main
from toast_onnx_cli.numbers import FiniteRange

OPTIONS = [
    ("analyze", "--dead"),
    ("bench", "--duration"),
    ("check-engine", "--tolerance"),
    ("plan", "--macs"),
    ("plan", "--params"),
    ("plan", "--latency"),
    ("prune", "--class-weight"),
    ("prune", "--memory"),
    ("prune", "--tokens"),
    ("plan", "--points"),
    ("sensitivity", "--ratios"),
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_numbers_that_are_none(command: str, option: str, value: str) -> None:
    result = CliRunner().invoke(main, [command, f"{option}={value}", "m.onnx", "n.onnx"])
    assert result.exit_code == 2, result.output
    assert f"for '{option}'" in result.stderr


def test_every_float_option_is_finite() -> None:
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"toast_onnx_cli.{name.replace('-', '_')}")
        for parameter in module.command.params:
            if isinstance(parameter.type, click.types.FloatParamType):
                assert isinstance(parameter.type, FiniteRange), (name, parameter.name)


def test_bounds_still_count() -> None:
    assert FiniteRange(0, 1).convert("0.5", None, None) == 0.5
    for text in ("1.5", "-1", "x"):
        with pytest.raises(click.BadParameter):
            FiniteRange(0, 1).convert(text, None, None)
