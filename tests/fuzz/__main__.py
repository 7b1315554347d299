"""The long form: `python -m tests.fuzz --minutes 30` damages files of every kind until the time is up."""

from __future__ import annotations

import argparse
import time
from collections import Counter

from tests.fuzz.worker import Worker


def main() -> int:
    """Print what became of the files; the exit status is 0 where all were refused or taken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the first file; the short form starts at 0")
    arguments = parser.parse_args()
    end, seed, memory = time.monotonic() + 60 * arguments.minutes, arguments.seed, 0
    worker = Worker()
    names = worker.names
    counts = {name: Counter[str]() for name in names}
    while time.monotonic() < end:
        for kind, name in enumerate(names):
            result, used = worker.use(kind, seed)
            memory = max(memory, used)
            if result not in ("refused", "taken"):
                print(f"{name} {seed}: {result}", flush=True)
            if result in ("hangs", "dies"):
                worker = Worker()
            counts[name][result if result in ("refused", "taken", "hangs", "dies") else "tracebacks"] += 1
        seed += 1
    kinds = ("refused", "taken", "tracebacks", "hangs", "dies")
    for name, count in counts.items():
        print(f"{name}: {count.total()} tried, " + ", ".join(f"{count[k]} {k}" for k in kinds))
    total = sum(counts.values(), Counter[str]())
    print(f"all: {total.total()} tried, " + ", ".join(f"{total[k]} {k}" for k in kinds))
    print(f"largest memory: {memory / 1e6:.0f} MB")
    return int(any(total[k] for k in kinds[2:]))


if __name__ == "__main__":
    raise SystemExit(main())
