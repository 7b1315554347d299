"""The long form: `python -m tests.fuzz --minutes 30` damages files of every kind until the time is up.

A process of its own uses them, so that one that hangs or dies is counted and replaced.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.targets import outcome, targets

#: Seconds after which a file counts as one that hangs.
PATIENCE = 20


def work(connection: Connection) -> None:
    """Use the damaged files that are asked for: (kind, seed) in, (result, largest memory in bytes) out."""
    with tempfile.TemporaryDirectory(prefix="toast-fuzz-") as name:
        folder = Path(name)
        found = targets(folder)
        connection.send([target.name for target in found])
        while (asked := connection.recv()) is not None:
            kind, seed = asked
            result = outcome(found[kind], folder, seed)
            connection.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


class Worker:
    """A process that uses damaged files."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.names: list[str] = self._connection.recv()

    def use(self, kind: int, seed: int) -> tuple[str, int]:
        """Result and largest memory so far; after `hangs` and `dies` the worker is of no more use."""
        self._connection.send((kind, seed))
        try:
            if not self._connection.poll(PATIENCE):
                self._process.kill()
                return "hangs", 0
            result, memory = self._connection.recv()
        except EOFError:
            return "dies", 0
        return result, memory


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
