"""Graphs that no runtime takes: refused for what is wrong with them, before anything is made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx.checker
import onnx.defs
import onnx.shape_inference

from toast_onnx.errors import ModelError, ToastError, one_line
from toast_onnx.external import all_tensors
from toast_onnx.ort import ort, session_options

_LATER = 8  # opsets that a runtime newer than this package of ONNX may know
_TYPES = frozenset(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}


def check_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Make sure of what everything else relies on: known types and opsets, and operands as operators have them.

    Raises:
        ModelError: what is wrong.
    """
    problem = next(_problems(proto), None)
    if problem is not None:
        raise ModelError(f"{path}: {problem}; export it again")


def _problems(proto: onnx.ModelProto) -> Iterator[str]:
    newest = onnx.defs.onnx_opset_version()
    opsets: dict[str, int] = {}
    for entry in proto.opset_import:
        default = entry.domain in ("", "ai.onnx")
        opsets["" if default else entry.domain] = entry.version
        if entry.version < 1 or (default and entry.version > newest + _LATER):
            yield f"opset {entry.version} of '{entry.domain}' is out of range, the newest known one is {newest}"
    for tensor in all_tensors(proto):
        if tensor.data_type not in _TYPES or any(extent < 0 for extent in tensor.dims):
            yield f"the weight '{tensor.name}' has type {tensor.data_type} and shape {list(tensor.dims)}"
    values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    for value in values:
        kind = value.type.tensor_type.elem_type
        if kind and kind not in _TYPES:
            yield f"'{value.name}' has the unknown element type {kind}"
    made = {i.name for i in proto.graph.input} | {t.name for t in proto.graph.initializer}
    for node in proto.graph.node:
        twice = next((name for name in node.output if name and name in made), None)
        if twice is not None:
            yield f"two nodes or inputs are called '{twice}'"
        made.update(node.output)
        yield from _operand_problems(node, opsets)


def _operand_problems(node: onnx.NodeProto, opsets: dict[str, int]) -> Iterable[str]:
    """Numbers of operands and results, and types of attributes, that the operator does not have."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    label = f"the node '{node.name or ', '.join(node.output)}' ({node.op_type})"
    if not any(node.output):
        yield f"{label} has no result"
    if domain not in opsets:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets[domain], domain)
    except onnx.defs.SchemaError:
        return  # another program's operator
    if not schema.min_input <= len(node.input) <= schema.max_input:
        yield f"{label} has {len(node.input)} operands"
    if not schema.min_output <= len(node.output) <= schema.max_output:
        yield f"{label} has {len(node.output)} results"
    for attribute in node.attribute:
        known = schema.attributes.get(attribute.name)
        if known is not None and attribute.type and not attribute.ref_attr_name and int(known.type) != attribute.type:  # type: ignore[call-overload]
            yield f"{label} has the attribute '{attribute.name}' of another type than the operator's"
    present = {attribute.name for attribute in node.attribute}
    for name, known in schema.attributes.items():
        if known.required and name not in present:
            yield f"{label} lacks the attribute '{name}'"


def why_refused(path: Path) -> str | None:
    """Why ONNX's checker or ONNX Runtime refuses a model file, one line; None where both take it."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as e:  # errors of several kinds, some of them from C++
        return f"ONNX's checker refuses the graph: {one_line(e)}"
    return why_not_loaded(path)


def why_not_loaded(path: Path) -> str | None:
    """Why ONNX Runtime refuses a model file, one line; None where it takes it."""
    options = session_options()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as e:  # its exceptions share no base class
        return f"ONNX Runtime does not load the graph: {one_line(e)}"
    return None


@contextlib.contextmanager
def blame_model(path: Path) -> Iterator[None]:
    """Where something unforeseen happens inside, and no runtime takes the model either, the model is at fault.

    Raises:
        ModelError: in place of what was raised, where the model is refused; anything else goes on as it is.
    """
    try:
        yield
    except (ToastError, MemoryError):
        raise
    except Exception as e:
        reason = why_refused(path) if path.is_file() else None
        if reason is None:
            raise
        raise ModelError(f"{path}: {reason}; export it again") from e
