"""toast-onnx: structured pruning of exported Vision Transformers, graph in, graph out."""

from __future__ import annotations

__version__ = "0.1.0"
