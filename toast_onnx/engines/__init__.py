"""Engines from ONNX graphs: TensorRT and TensorRT-RTX builds, precision, shape profiles, benchmarks and checks.

The two TensorRT packages are imported when a build or a check asks for one, never before.
"""

from __future__ import annotations

from toast_onnx.engines.backend import EngineOptions, parse_compute_capabilities
from toast_onnx.engines.backends import BACKENDS, choose
from toast_onnx.engines.build import BuildRequest, build
from toast_onnx.engines.engine import ParserProblem, UnsupportedGraphError
from toast_onnx.engines.precision import PRECISIONS, convert_precision
from toast_onnx.engines.profiles import ShapeRange, build_profile, graph_inputs, parse_batch, parse_shapes
from toast_onnx.engines.record import read_record, record_path

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "BuildRequest",
    "EngineOptions",
    "ParserProblem",
    "ShapeRange",
    "UnsupportedGraphError",
    "build",
    "build_profile",
    "choose",
    "convert_precision",
    "graph_inputs",
    "parse_batch",
    "parse_compute_capabilities",
    "parse_shapes",
    "read_record",
    "record_path",
]
