"""Types as a user's own type checker sees them: both packages installed, the script outside of the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """\
import toast_onnx as toast
from toast_onnx_calibration import calibrate, plan

model = toast.load("digits_vit.onnx")
ratios = plan(model, "digits_calibration.npz", macs=0.6)
small = toast.prune(model, ratios, calibrate(model, "digits_calibration.npz"))
reveal_type(model)
reveal_type(ratios.ratios)
reveal_type(small.macs)
reveal_type([block.attention.qk_reason for block in model.match.blocks if block.attention])
small.save(3)
toast.prune(model, ratios, seeds=1)
"""


@pytest.mark.slow
def test_a_type_checker_sees_the_types_of_installed_packages(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    venv.create(tmp_path / "env", with_pip=False)  # without what the packages need: theirs are other libraries' types
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    for package in (ROOT / "toast_onnx", ROOT / "calibration" / "toast_onnx_calibration"):
        shutil.copytree(package, packages / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "script.py").write_text(SCRIPT)
    options = ["--strict", "--python-executable", str(tmp_path / "env" / "bin" / "python"), "--config-file="]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "script.py"],
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = re.findall(r"^script\.py:(\d+): (?:note|error): (.*)$", found.stdout, re.MULTILINE)
    told = {int(line): text for line, text in reversed(said)}  # the first of each line
    assert 'Revealed type is "toast_onnx.front.Study"' in told[7], found.stdout
    assert "toast_onnx.planning.schema.Ratios" in told[8]
    assert "int" in told[9]
    assert "toast_onnx.reasons.Reason" in told[10]
    assert 'incompatible type "int"' in told[11]
    assert '"seeds"' in told[12]
    assert set(told) == {7, 8, 9, 10, 11, 12}
