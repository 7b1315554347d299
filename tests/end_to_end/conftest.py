"""A model and a ratios file to run the command on."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from tests.end_to_end.command import DIGITS, QUICK, write_ratios


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the digits model in an empty folder."""
    return Path(shutil.copy(DIGITS, tmp_path / "model.onnx"))


@pytest.fixture
def ratios(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good ratios file in a folder of its own."""
    return write_ratios(tmp_path_factory.mktemp("ratios") / "ratios.yaml", QUICK)


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """The digits model with its weights in a file `weights.bin` beside it."""
    path = tmp_path / "model.onnx"
    onnx.save(onnx.load(DIGITS), path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return path
