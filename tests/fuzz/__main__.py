"""The long form: `python -m tests.fuzz --minutes 30` damages files of every kind until the time is up."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.worker import Worker
from tests.zoo import Case, Unavailable, export

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits_vit.onnx"
#: Families of the zoo whose exports are damaged, and by which exporter.
EXPORTS = {"timm-vit": "dynamo-23", "hf-dinov2": "torchscript-17", "hf-swin": "torchscript-17"}
GOOD = ("refused", "taken")
KINDS = (*GOOD, "tracebacks", "hangs", "dies", "different")


def main() -> int:
    """Print what became of the files; the exit status is 0 where all were refused or taken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the first file; the short form starts at 0")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="toast-fuzz-exports-") as folder:
        return fuzz(arguments.seed, 60 * arguments.minutes, real_exports(Path(folder)))


def real_exports(folder: Path) -> Path:
    """The folder, with models that exporters wrote: the example, and of the zoo what can be exported here."""
    shutil.copy(EXAMPLE, folder)
    for family, exporter in EXPORTS.items():
        with contextlib.suppress(Unavailable):
            shutil.copy(export(Case(family, exporter)), folder / f"{family}.onnx")
    return folder


def fuzz(seed: int, seconds: float, exports: Path) -> int:
    """Damage files until the time is up; 1 where one of them was neither refused nor taken."""
    end, memory = time.monotonic() + seconds, 0
    worker = Worker(exports)
    names = worker.names
    counts = {name: Counter[str]() for name in names}
    while time.monotonic() < end:
        for kind, name in enumerate(names):
            result, used = worker.use(kind, seed)
            memory = max(memory, used)
            if result not in GOOD:
                print(f"{name} {seed}: {result}", flush=True)
            if result in ("hangs", "dies"):
                worker = Worker(exports)
            if result.startswith("AssertionError: different outputs"):
                result = "different"
            counts[name][result if result in KINDS else "tracebacks"] += 1
        seed += 1
    worker.close()
    for name, count in counts.items():
        print(f"{name}: {count.total()} tried, " + ", ".join(f"{count[k]} {k}" for k in KINDS))
    total = sum(counts.values(), Counter[str]())
    print(f"all: {total.total()} tried, " + ", ".join(f"{total[k]} {k}" for k in KINDS))
    print(f"largest memory: {memory / 1e6:.0f} MB")
    return int(any(total[k] for k in KINDS if k not in GOOD))


if __name__ == "__main__":
    raise SystemExit(main())
