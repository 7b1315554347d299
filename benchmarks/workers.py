"""What Ray's workers save: python benchmarks/workers.py MODEL IMAGES [--samples N] [--blocks 0,5,11] [--json]

`sensitivity`'s trials, measured by this process and then by one Ray worker a core, each with one thread; results have
to be equal to the last bit. Wall times are those of this machine, as busy as it is, so processor times stand beside
them: `ratio by cpu` is what one process took over what the driver and the busiest worker took one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toast_onnx.matching.study import study  # noqa: E402
from toast_onnx.model import load_model  # noqa: E402
from toast_onnx.planning.ratios import Ratios  # noqa: E402
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate  # noqa: E402
from toast_onnx_calibration.needs import everything  # noqa: E402
from toast_onnx_calibration.ray_workers import ray_executor  # noqa: E402
from toast_onnx_calibration.sensitivity_trials import trial_grid  # noqa: E402
from toast_onnx_calibration.work import open_work  # noqa: E402

PARTS = ["tokens", "qk", "vo", "fc1", "fc2", "fc1+fc2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--blocks", default="")
    parser.add_argument("--ratios", default="0.25,0.5,0.75")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    dense, settings = study(load_model(given.model)), Ratios()
    options = CalibrationOptions(samples=given.samples, threads=1)
    blocks = [int(word) for word in given.blocks.split(",") if word] or None
    grid = trial_grid(dense, settings, PARTS, [float(word) for word in given.ratios.split(",")], blocks)
    parts = tuple(dict.fromkeys(p for t in grid for p in t.kept))
    with tempfile.TemporaryDirectory(prefix="toast-workers-") as name:
        path = Path(name) / "statistics.npz"
        calibrate(dense, given.images, path, everything(dense, {"qk", "context", "hidden", "inputs"}), options)
        start, busy = time.perf_counter(), time.process_time()
        with open_work(dense, given.images, settings, parts, options, path) as work:
            opened = time.process_time() - busy
            alone = {trial.key: damage for trial, damage in work.damages(grid)}
        row: dict[str, Any] = {"trials": len(grid), "alone wall": time.perf_counter() - start}
        row |= {"alone cpu": time.process_time() - busy, "alone opening cpu": opened}
        with ray_executor("local") as executor:
            import ray

            start, busy = time.perf_counter(), time.process_time()
            with open_work(dense, given.images, settings, parts, options, path, executor=executor) as work:
                pool: Any = work.pool
                together = {trial.key: damage for trial, damage in work.damages(grid)}
                row |= {"ray wall": time.perf_counter() - start, "driver cpu": time.process_time() - busy}
                asked = [actor.__ray_call__.remote(lambda _: time.process_time()) for actor in pool._actors]
                row["workers cpu"] = ray.get(asked)
    assert together == alone
    # the driver opens the samples first, then the workers go on side by side
    row["ratio by cpu"] = row["alone cpu"] / (row["driver cpu"] + max(row["workers cpu"]))
    row["ratio by wall"] = row["alone wall"] / row["ray wall"]
    print(json.dumps(row, indent=1) if given.json else "\n".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
