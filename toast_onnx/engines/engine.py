"""One TensorRT build: parse the ONNX file, set the configuration, run the builder, report what it refuses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from toast_onnx.engines.backend import Backend, EngineOptions, Progress, load
from toast_onnx.engines.cuda import gpu_name
from toast_onnx.engines.layers import LOG_START, Layer, count_fused_attention, layers_of_inspector, layers_of_log
from toast_onnx.errors import BackendError

logger = logging.getLogger(__name__)

#: Parser verdicts that say more about a node than the text beside them, which is often just `false`.
_REASONS = {
    "UNSUPPORTED_NODE": "this operator is not supported",
    "UNSUPPORTED_NODE_ATTR": "an attribute of it is not supported",
    "UNSUPPORTED_NODE_INPUT": "an input of it is not supported (it may have to be a constant)",
    "UNSUPPORTED_NODE_DATATYPE": "its data type is not supported",
    "UNSUPPORTED_NODE_DYNAMIC": "it is not supported with dynamic shapes",
    "UNSUPPORTED_NODE_SHAPE": "its shape is not supported",
    "UNSUPPORTED_GRAPH": "the graph is not supported",
    "INVALID_NODE": "the node is not valid ONNX",
    "INVALID_GRAPH": "the graph is not valid ONNX",
    "INVALID_VALUE": "a value in it is not valid",
}


@dataclass(frozen=True)
class ParserProblem:
    """One node TensorRT does not take."""

    node: str
    op: str
    reason: str


class UnsupportedGraphError(BackendError):
    """TensorRT's parser refuses nodes of the graph.

    Attributes:
        problems: every node it refused, in graph order.
    """

    def __init__(self, message: str, problems: Sequence[ParserProblem]) -> None:
        super().__init__(message)
        self.problems = list(problems)


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine, and what it is made of.

    Attributes:
        plan: its bytes.
        layers: its layers in order, of several architectures those with the fewest fused attentions; None where
            neither the inspector nor the builder says.
    """

    plan: bytes
    layers: tuple[Layer, ...] | None


def build_engine(
    backend: Backend, onnx_path: Path, options: EngineOptions, progress: Progress | None = None
) -> BuiltEngine:
    """Build a serialized engine.

    Args:
        backend: the package to build with.
        onnx_path: the model; external data is read from beside it.
        options: settings that `backend.check` has accepted.
        progress: told about the builder's phases.

    Returns:
        The engine and its layers.

    Raises:
        UnsupportedGraphError: the parser refuses nodes; the error lists them.
        ConfigError: a setting the package refuses.
        BackendError: the builder failed; the message carries TensorRT's own.
    """
    trt = load(backend)
    messages = _messages_of(trt)
    messages.errors.clear()
    messages.layers.clear()
    builder = trt.Builder(messages.logger)
    # TensorRT 11 and RTX have typed networks only; 10 has to be asked, or it would ignore the graph's 16-bit types.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages.logger)
    if not parser.parse_from_file(str(onnx_path)):
        raise _unsupported(parser, messages.errors)
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    _set_common(trt, config, options)
    backend.configure(trt, config, options)
    if options.profile:
        _add_profile(builder, config, options)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(f"{backend.name} {trt.__version__} could not build the engine: {_last(messages.errors)}")
    backend.finish(config, options)
    plan = bytes(engine)
    return BuiltEngine(plan, _layers(trt, messages, plan))


def _layers(trt: Any, messages: _Messages, plan: bytes) -> tuple[Layer, ...] | None:
    """What the inspector says of an engine; where it cannot be loaded, for want of a GPU, what the builder logged."""
    if gpu_name() is not None:
        loaded = trt.Runtime(messages.logger).deserialize_cuda_engine(plan)
        if loaded is not None:
            said = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
            return layers_of_inspector(str(said))
    lists = [layers for text in messages.layers if (layers := layers_of_log(text)) is not None]
    return min(lists, key=count_fused_attention, default=None)


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allow several kernels for a fused Attention node where no single one exists, such as in float32.

    Without this the build fails instead; where a fused kernel exists it is still taken.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer hands out the base class
            layer.attention.decomposable = True


def _set_common(trt: Any, config: Any, options: EngineOptions) -> None:
    # Names of the ONNX nodes inside each layer stay in the engine: `bench` groups layer times by block with them.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level


def _add_profile(builder: Any, config: Any, options: EngineOptions) -> None:
    profile = builder.create_optimization_profile()
    for name, shapes in options.profile.items():
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError("TensorRT refused the optimization profile; check the min, opt and max shapes")


def _unsupported(parser: Any, errors: Sequence[str]) -> BackendError:
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    problems = [ParserProblem(_node_name(e), str(e.node_operator()) or "?", _reason(e)) for e in found]
    if not problems:
        return BackendError(f"TensorRT could not read the graph: {_last(errors)}")
    listed = "; ".join(f"{p.node} ({p.op}): {p.reason}" for p in problems[:3])
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return UnsupportedGraphError(f"TensorRT does not take {len(problems)} node(s): {listed}{more}", problems)


def _node_name(error: Any) -> str:
    return str(error.node_name()) or f"node {error.node()}"


def _reason(error: Any) -> str:
    """The parser's text where it says something, else its error code in words."""
    code = str(error.code()).rpartition(".")[2]
    text = " ".join(str(error.desc()).split())
    said = _REASONS.get(code, code.lower().replace("_", " "))
    return said if text in ("", "false", "true") else f"{said}: {text}"


def _last(errors: Sequence[str]) -> str:
    return " ".join(errors[-1].split()) if errors else "it gave no reason; run again with --verbose"


class _Messages:
    """TensorRT's log: errors are kept for the exception, everything goes to Python's logging.

    A process has one TensorRT logger: the first given to any builder stays, so there is one of these for each module.
    """

    def __init__(self, trt: ModuleType) -> None:
        self.errors: list[str] = []
        self.layers: list[str] = []  # what the builder lists: one message an architecture
        severity = trt.ILogger.Severity
        levels = {
            severity.INTERNAL_ERROR: logging.DEBUG,  # raised as an exception, so not logged above debug
            severity.ERROR: logging.DEBUG,
            severity.WARNING: logging.WARNING,
            severity.INFO: logging.DEBUG,
            severity.VERBOSE: logging.DEBUG,
        }
        errors, kept = self.errors, self

        class Log(trt.ILogger):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity_given: Any, text: str) -> None:
                if severity_given in (severity.INTERNAL_ERROR, severity.ERROR):
                    errors.append(text)
                elif text.startswith(LOG_START):
                    kept.layers.append(text)
                logger.log(levels[severity_given], "%s", text)

        self.logger = Log()


@functools.cache
def _messages_of(trt: ModuleType) -> _Messages:
    return _Messages(trt)


def tensorrt_logger(trt: ModuleType) -> Any:
    """The logger every TensorRT object of this process is made with."""
    return _messages_of(trt).logger


def _monitor(trt: Any, progress: Progress) -> Any:
    """A TensorRT progress monitor that passes phases on."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, num_steps)
            progress(phase_name, parent_phase, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, steps = self.phases.get(phase_name, (None, step + 1))
            progress(phase_name, parent, min(step + 1, steps), steps)
            return True

        def phase_finish(self, phase_name: str) -> None:
            parent, steps = self.phases.pop(phase_name, (None, 1))
            progress(phase_name, parent, steps, steps)

    return Monitor()
