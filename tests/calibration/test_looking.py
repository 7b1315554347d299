"""What the first layer sees: numbers against numpy's, pictures against the files they came from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.end_to_end.command import DIGITS
from tests.matching.tiny import block
from toast_onnx.errors import ConfigError, DataError
from toast_onnx_calibration.looking import SIDE, enlarged, image_bytes, look
from toast_onnx_cli.main import main

TEST = DIGITS.with_name("digits_test.npz")


def test_values_are_those_of_the_prepared_samples(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("mean: 0.1307\nstd: 0.3081\nchannels: gray\n")
    seen = look(DIGITS, TEST, preprocess=str(recipe), samples=20)
    with np.load(TEST) as file:
        pixels = (file["images"][:20].astype(np.float64) / 255 - 0.1307) / 0.3081
    assert seen.names == tuple(map(str, range(20)))
    got = [seen.values.low, seen.values.high, seen.values.mean, seen.values.std]
    np.testing.assert_allclose(got, [pixels.min(), pixels.max(), pixels.mean(), pixels.std()], rtol=1e-5)
    assert seen.source == str(recipe)
    assert "mean 0.1307, std 0.3081" in seen.lines[0]


def test_the_sheet_shows_what_went_in_in_its_place(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("mean: 0.5\nstd: 0.25\nchannels: gray\n")
    sheet = np.asarray(look(DIGITS, TEST, preprocess=str(recipe), samples=6).sheet())
    with np.load(TEST) as file:
        images = file["images"][:6]
    places = []
    for image in images:
        wanted = np.repeat(np.repeat(image, SIDE // 28, 0), SIDE // 28, 1)
        found = [
            (top, left)
            for top in range(0, sheet.shape[0] - SIDE)
            for left in (12 + k * (SIDE + 12) for k in range(4))
            if np.array_equal(sheet[top : top + SIDE : 9, left, 0], wanted[::9, 0])
            and np.array_equal(sheet[top : top + SIDE, left : left + SIDE], np.repeat(wanted[:, :, None], 3, 2))
        ]
        assert len(found) == 1
        places += found
    assert places == sorted(places)
    assert len({top for top, _ in places}) == 2


def test_a_picture_keeps_its_ratio_and_grows_in_whole_pixels() -> None:
    assert enlarged(Image.new("L", (100, 50))).size == (200, 100)
    assert enlarged(Image.new("RGB", (448, 224))).size == (SIDE, SIDE // 2)
    assert enlarged(Image.new("L", (1, 1))).mode == "RGB"


def test_what_is_no_picture_is_said(tmp_path: Path) -> None:
    graph, y = block()
    model = graph.save(tmp_path / "m.onnx", y)
    np.save(tmp_path / "x.npy", np.ones((2, *(d or 1 for d in look_shape(model))), np.float32))
    seen = look(model, tmp_path / "x.npy")
    assert seen.lines[0] == "ready tensors"
    with pytest.raises(DataError, match="no pictures; leave --contact-sheet out"):
        seen.sheet()
    with pytest.raises(ConfigError, match=r"end it in \.png"):
        image_bytes(Image.new("L", (2, 2)), Path("sheet.onnx"))


def look_shape(model: Path) -> list[int]:
    """The extents of a model's input behind the batch."""
    import onnx

    return [d.dim_value for d in onnx.load(model).graph.input[0].type.tensor_type.shape.dim[1:]]


def test_inspect_says_what_the_first_layer_sees_and_draws_it(tmp_path: Path) -> None:
    sheet = tmp_path / "seen.png"
    words = ["inspect", str(DIGITS), "--data", str(TEST), "--preprocess", "none"]
    shown = CliRunner().invoke(main, [*words, "--contact-sheet", str(sheet), "--samples", "4"])
    assert shown.exit_code == 0, shown.output
    assert "preprocessing none: stretched to 28x28" in shown.stdout
    assert "'pixels' gets values from 0 to 1" in shown.stdout
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.width == 4 * (SIDE + 12) + 12
    again = CliRunner().invoke(main, [*words, "--contact-sheet", str(sheet)])
    assert "give --overwrite" in again.stderr
    document = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert document["seen"]["source"] == "none"
    assert len(document["seen"]["samples"]) == 16
    alone = CliRunner().invoke(main, ["inspect", str(DIGITS), "--contact-sheet", str(sheet)])
    assert "add --data" in alone.stderr
