"""What needs gradients has them, though its caller works without: `torch.no_grad` changes no result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.cli.test_finetune import HALF, arguments
from tests.finetune.test_fisher import CHANNELS, CLASSES, TOKENS, class_reader
from tests.pruning import prune_file
from toast_onnx.finetune.fisher import Probe, fisher
from toast_onnx.finetune.local import LocalSettings, train_block
from toast_onnx_cli.main import main

Off = Callable[[], AbstractContextManager[object]]
RNG = np.random.default_rng(0)
EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])


def test_fisher_information(off: Off, tmp_path: Path) -> None:
    model = class_reader(tmp_path, RNG.normal(size=(CHANNELS, CLASSES)))
    batches = [{"x": RNG.normal(size=(8, TOKENS, CHANNELS)).astype(np.float32)}]
    sums, counts = fisher(model, [Probe("y", -1)], ["scores"], batches)
    with off():
        again, counted = fisher(model, [Probe("y", -1)], ["scores"], batches)
        assert not torch.is_grad_enabled()
    assert counted == counts
    assert np.array_equal(again["y"], sums["y"])


def test_blocks_are_trained(off: Off, tmp_path: Path) -> None:
    read_out = RNG.normal(size=(CHANNELS, CLASSES))
    piece = class_reader(tmp_path, read_out)
    x = RNG.normal(size=(8, 4, TOKENS, CHANNELS)).astype(np.float32)
    wanted = (2 * x[:, :, 0] @ (read_out + 0.1)).astype(np.float32)
    given = (piece, {"read_out": np.ones_like(read_out, bool)}, x, wanted, np.ones((8, 1)), LocalSettings(steps=4))
    (values, after) = train_block(*given)
    with off():
        (again, found) = train_block(*given)
    assert values
    assert found == after
    assert np.array_equal(again["read_out"], values["read_out"])


def test_fine_tuning(off: Off, tmp_path: Path) -> None:
    with np.load(EXAMPLES / "digits_calibration.npz") as archive:
        np.savez(tmp_path / "data.npz", images=archive[archive.files[0]][:48])
    prune_file(EXAMPLES / "digits_vit.onnx", HALF, tmp_path / "pruned.onnx")
    with off():
        result = CliRunner().invoke(main, arguments(tmp_path, tmp_path / "tuned.onnx", steps=2))
    assert result.exit_code == 0, result.output
    plain = CliRunner().invoke(main, arguments(tmp_path, tmp_path / "plain.onnx", steps=2))
    assert plain.exit_code == 0, plain.output
    assert (tmp_path / "tuned.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()
