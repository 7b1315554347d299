"""ONNX Runtime as this project uses it: no words of its own on stderr, and no report of its use to anybody.

Whatever goes wrong in ONNX Runtime is an exception, and an exception is one line of ours. Its log would say the same in
colours before it, besides what concerns no user: drivers that this machine lacks, identifiers that it could not store.
The log is left alone while `toast_onnx` logs every detail.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from toast_onnx.threads import wished_threads

# Its severities: what it starts with, and the one that only a crash reaches.
_WARNING, _FATAL = 2, 4

logger = logging.getLogger(__name__)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Sends file descriptor 2 nowhere: libraries write there as they load, before their log can be set."""
    if logger.isEnabledFor(logging.DEBUG):
        yield
        return
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
if "onnxruntime" in sys.modules:
    import onnxruntime as ort
else:
    with _no_stderr():
        import onnxruntime as ort


def session_options(threads: int | None = None, *, timed: bool = False) -> Any:
    """`onnxruntime.SessionOptions` of a session that says nothing but what it raises.

    Args:
        threads: threads inside one operator; None or 0 leaves it to `OMP_NUM_THREADS`, as NumPy and PyTorch do, and
            to ONNX Runtime (one a core) where that is not set.
        timed: whether its runs are timed. Idle threads then wait in a loop, as they do in what users deploy; they would
            take the cores from NumPy, which works between runs (`benchmarks/pruning_cost.py --threads 2`).
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = wished_threads(threads) or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(timed)))
    options.log_severity_level = _WARNING if logger.isEnabledFor(logging.DEBUG) else _FATAL
    return options


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the log outside of sessions, where providers say why they cannot load."""
    if logger.isEnabledFor(logging.DEBUG):
        yield
        return
    ort.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_WARNING)


__all__ = ["ort", "quiet", "session_options"]
