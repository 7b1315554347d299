"""The errors toast-onnx raises on purpose; every message says what to do next."""

from __future__ import annotations


class ToastError(Exception):
    """Base of every expected failure. The command line prints it as one `Error:` line and exits with status 1."""


class ModelError(ToastError):
    """A model file cannot be read, checked or written."""


class ConfigError(ToastError):
    """A ratios file, recipe or option has a wrong key, value or shape."""


class MatchError(ToastError):
    """A part of the graph that was asked for cannot be pruned; the message carries the reason."""


class TwinError(ToastError):
    """The rewritten graph and its padded twin disagree, so the result must not be used."""


class DataError(ToastError):
    """Calibration or evaluation data cannot be read, or does not fit the model."""


class BackendError(ToastError):
    """A runtime (ONNX Runtime, TensorRT, trtexec, PyTorch) is missing or failed."""


class BudgetError(ConfigError):
    """No widths reach a budget."""


def one_line(error: Exception, limit: int = 300) -> str:
    """An exception's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."
