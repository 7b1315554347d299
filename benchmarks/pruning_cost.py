"""What `prune --data` costs next to plain inference of the same images: python benchmarks/pruning_cost.py MODEL IMAGES

Both in turns, a process each, with the same threads, NumPy's included: a second one of these waits for work at
DeiT-T's size, and waiting counts as processor time. Processor seconds: of plain inference those of the runs alone and
those of its whole process, which reads and decodes the images as `prune` does; of `prune` those of the whole process,
with the same share of everything removed, an eighth of the images kept back, the proof and the agreement included. The
aim is three times plain inference and 20 s. What `prune` takes by the clock stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.installed import toast_onnx
from toast_onnx_cli.console import print_table

PLAIN = """
import json, sys, time
from pathlib import Path
from toast_onnx_calibration.feeds import batches
from toast_onnx_calibration.prepared import open_prepared, silent
from toast_onnx_calibration.sessions import make_session, model_inputs, run
model, images, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
session = make_session(model, threads=threads)
source, _ = open_prepared(model, images, model_inputs(session), None, threads=threads, note=silent)
seconds, count = 0.0, 0
for batch in batches(source, model_inputs(session), 16):
    started = time.process_time()
    run(session, batch.feeds)
    seconds += time.process_time() - started
    count += batch.valid
print(json.dumps([seconds, count]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an image model")
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("--ratio", type=float, default=0.35, help="of queries and keys, values, and hidden units")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(options.threads))
    runs, whole, pruning, clock, count = [], [], [], [], 0
    with tempfile.TemporaryDirectory(prefix="toast-cost-") as folder:
        ratios = Path(folder) / "ratios.yaml"
        attention = {"qk": options.ratio, "vo": options.ratio}
        ratios.write_text(json.dumps({"version": 1, "attention": attention, "ffn": {"fc2": options.ratio}}))
        words = [str(options.model), str(options.images), str(options.threads)]
        reading = ("--data", options.images, "--threads", str(options.threads), "--quiet")
        for _ in range(options.rounds):
            started = spent()
            plain = subprocess.run([sys.executable, "-c", PLAIN, *words], check=True, stdout=subprocess.PIPE, text=True)
            alone, count = json.loads(plain.stdout)
            runs.append(alone)
            whole.append(spent() - started)
            started, began = spent(), time.perf_counter()
            out = Path(folder) / "small.onnx"
            toast_onnx("prune", options.model, "--ratios", ratios, "-o", out, "--overwrite", *reading)
            pruning.append(spent() - started)
            clock.append(time.perf_counter() - began)
    inference, process, prune, elapsed = (float(np.median(each)) for each in (runs, whole, pruning, clock))
    rows = [
        ["inference, its runs", f"{inference:.1f}", f"{3 * inference + 20:.1f}"],
        ["inference, its process", f"{process:.1f}", f"{3 * process + 20:.1f}"],
        [f"prune --data ({elapsed:.1f} s by the clock)", f"{prune:.1f}", ""],
    ]
    title = f"{options.model.name}: {count} images, {options.ratio:g} of everything, median of {options.rounds}"
    print_table(("", "processor s", "three times that and 20"), rows, title=title)


def spent() -> float:
    """Processor seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
