"""What calibration costs next to plain inference of the same images: python benchmarks/calibration_cost.py MODEL

Both run in turns in the same process with the same batches and threads, on images that are ready as an array; reading
and decoding images, which both would pay alike, is left out, so the ratio is an upper bound on what users see.
Calibration is what `toast-onnx calibrate` does by default: sessions made, statistics of attention and hidden units
measured, the file written. Plain inference makes its session, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx_calibration.calibrating import BUDGET, CalibrationOptions, calibrate
from toast_onnx_calibration.needs import everything, passes
from toast_onnx_calibration.sessions import make_session, model_inputs, run
from toast_onnx_cli.console import print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a vision model with one input of fixed height and width")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, default=BUDGET / 1e9, help="GB for the statistics of one pass")
    options = parser.parse_args()

    look = study(load_model(options.model))
    (wanted,) = model_inputs(make_session(options.model, threads=options.threads))
    shape = (options.samples, *(int(d or 1) for d in wanted.shape[1:]))
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    settings = CalibrationOptions(batch=options.batch, threads=options.threads, budget=int(options.memory * 1e9))

    with tempfile.TemporaryDirectory(prefix="toast-cost-") as name:
        data, out = Path(name) / "images.npy", Path(name) / "statistics.npz"
        np.save(data, images)

        def infer() -> None:
            plain = make_session(options.model, threads=options.threads)
            for start in range(0, options.samples, options.batch):
                run(plain, {wanted.name: images[start : start + options.batch]})

        def measure() -> None:
            calibrate(look, data, out, None, settings)

        seconds: dict[Callable[[], None], list[float]] = {infer: [], measure: []}
        for number in range(options.rounds + 1):  # the first round warms up
            for work, times in seconds.items():
                started = time.perf_counter()
                work()
                if number:
                    times.append(time.perf_counter() - started)
    inference, calibration = (float(np.median(t)) for t in seconds.values())
    rows = [
        ["inference", f"{inference:.2f}", f"{options.samples / inference:.1f}", "1.00"],
        ["calibration", f"{calibration:.2f}", f"{options.samples / calibration:.1f}", f"{calibration / inference:.2f}"],
    ]
    count = len(passes(look, everything(look), settings.budget))
    title = f"{options.model.name}: {options.samples} images, batch {options.batch}, {count} pass(es)"
    print_table(("", "seconds", "images/s", "times inference"), rows, title=title)


if __name__ == "__main__":
    main()
