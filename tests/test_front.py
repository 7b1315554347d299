"""The front door: ten lines on the shipped example, an import that costs nothing, results that show themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

import toast_onnx
import toast_onnx_calibration
from toast_onnx.errors import ConfigError, ModelError

EXAMPLES = Path(__file__).parent.parent / "examples"
HEAVY = ("onnxruntime", "torch", "tensorrt", "tensorrt_rtx", "onnx", "numpy")


def test_ten_lines_prune_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("digits_vit.onnx", "digits_calibration.npz"):
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)

    import toast_onnx as toast
    from toast_onnx_calibration import calibrate, plan

    model = toast.load("digits_vit.onnx")
    ratios = plan(model, "digits_calibration.npz", macs=0.6, parts=("tokens", "fc2"), preprocess="none", samples=16)
    small = toast.prune(model, ratios, calibrate(model, "digits_calibration.npz", preprocess="none"))
    small.save("small.onnx")

    onnx.checker.check_model("small.onnx", full_check=True)
    report = json.loads(Path("small.json").read_text())
    assert small.twin is not None
    assert small.twin.worst < 1e-3
    assert report["pruned"]["macs"] == small.macs
    assert 0.5 < small.macs / report["dense"]["macs"] <= 0.6
    assert report["statistics"]["samples"] == 256
    assert [row[0] for row in small.table.rows] == [str(block.index) for block in model.match.blocks]
    for shown in (model, ratios, small):
        assert 3 < len(repr(shown).splitlines()) < 20
        assert shown._repr_html_().startswith("<table>")
    ratios.save("small.yaml")
    again = toast.prune("digits_vit.onnx", "small.yaml")
    assert again.widths == small.widths
    assert again.source["source"].startswith("weights and synthetic tokens")


def test_a_report_that_cannot_be_written_leaves_no_model(tmp_path: Path) -> None:
    small = toast_onnx.prune(EXAMPLES / "digits_vit.onnx", {"version": 1, "ffn": {"fc2": 0.5, "score": "l2"}})
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(ModelError):
        small.save(tmp_path / "small.onnx", tmp_path / "taken" / "small.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_sensitivity_shows_itself(tmp_path: Path) -> None:
    model = toast_onnx.load(EXAMPLES / "digits_vit.onnx")
    data = EXAMPLES / "digits_calibration.npz"
    found = toast_onnx_calibration.sensitivity(
        model, data, parts=("fc2",), ratios=(0.5,), blocks=(0, 3), preprocess="none", samples=16
    )
    assert [row[:2] for row in found.table.rows] == [["0", "fc2"], ["3", "fc2"]]
    found.save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == found.report()
    with pytest.raises(ConfigError, match="one budget"):
        toast_onnx_calibration.plan(model, data, preprocess="none")


@pytest.mark.parametrize("package", ["toast_onnx", "toast_onnx_calibration"])
def test_an_import_loads_nothing_heavy(package: str) -> None:
    text = f"import sys, {package}; print([m for m in {HEAVY!r} if m in sys.modules])"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - started < 3  # 0.03 s alone; the interpreter and a busy machine are not ours


@pytest.mark.parametrize("package", [toast_onnx, toast_onnx_calibration])
def test_every_public_name_is_there_and_stays_itself(package: object) -> None:
    """A submodule of the same name would take the place of a function once it is imported."""
    import importlib
    import pkgutil

    names = package.__all__  # type: ignore[attr-defined]
    assert not set(names) & {m.name for m in pkgutil.iter_modules(package.__path__)}  # type: ignore[attr-defined]
    for name in names:
        assert callable(getattr(package, name))
    with pytest.raises(AttributeError):
        importlib.import_module(package.__name__).nothing  # type: ignore[attr-defined]  # noqa: B018
