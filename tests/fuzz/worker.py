"""Damaged files are used in a process of their own, so that one that hangs or dies is counted and replaced."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.targets import damaged, outcome, targets

#: Seconds of processor time after which a file counts as one that hangs, and by the clock: a machine may be busy, and
#: what waits for a pipe takes no time of the processor.
PATIENCE, WAITING = 20, 300


def work(connection: Connection, exports: Path | None) -> None:
    """Use the damaged files that are asked for: (kind, seed) in, (result, largest memory in bytes) out."""
    with tempfile.TemporaryDirectory(prefix="toast-fuzz-") as name:
        folder = Path(name)
        found = targets(folder, exports)
        connection.send([target.name for target in found])
        while (asked := connection.recv()) is not None:
            kind, seed = asked
            result = outcome(found[kind], folder, damaged(found[kind], seed))
            connection.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


class Worker:
    """A process that uses damaged files; of models in the folder `exports`, too."""

    def __init__(self, exports: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, exports), daemon=True)
        self._process.start()
        theirs.close()
        self.names: list[str] = self._connection.recv()

    def use(self, kind: int, seed: int) -> tuple[str, int]:
        """Result and largest memory so far; after `hangs` and `dies` the worker is of no more use."""
        self._connection.send((kind, seed))
        started, worked = time.monotonic(), self._worked()
        try:
            while not self._connection.poll(1):
                if time.monotonic() - started > WAITING or self._worked() - worked > PATIENCE:
                    self._process.kill()
                    return "hangs", 0
            result, memory = self._connection.recv()
        except EOFError:
            return "dies", 0
        return result, memory

    def close(self) -> None:
        """Let the process end."""
        self._connection.send(None)
        self._process.join()

    def _worked(self) -> float:
        """Processor time of the process so far, in seconds; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
