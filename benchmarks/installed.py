"""The installed command, for benchmarks that measure what users run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def toast_onnx(*arguments: str | Path) -> str:
    """Runs the command of this Python's environment and returns what it printed; ends the script if it fails."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("toast-onnx", path=beside) or sys.exit("install toast-onnx for this Python first")
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout if done.returncode == 0 else sys.exit(done.returncode)
