"""An ONNX graph as a list of steps: attributes decoded, constants read, shape arithmetic told from tensor work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from toast_onnx.errors import ModelError
from toast_onnx.finetune.host import HOST, LIMIT
from toast_onnx.finetune.ops import OPS, Node, Operator
from toast_onnx.matching.facts import constant_value
from toast_onnx.model import Model, in_order


@dataclass(frozen=True)
class Step:
    """One node to execute.

    Attributes:
        node: the operator.
        operator: its PyTorch implementation; None for `If`, `Shape` and what runs on the host alone.
        host: whether it runs on numpy arrays, because all its inputs are known from shapes alone.
        last: tensors that nothing reads after this step.
    """

    node: Node
    operator: Operator | None
    host: bool
    last: tuple[str, ...] = ()


@dataclass
class Plan:
    """A graph ready to be executed.

    Attributes:
        inputs: names of the inputs that are fed.
        outputs: names of the outputs.
        steps: the nodes in order.
        constants: initializers and Constant nodes' values.
        host: names of the tensors that are numpy arrays at run time.
        kinds: name of an output -> ONNX element type, where the graph says.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: list[Step]
    constants: dict[str, np.ndarray[Any, Any]]
    host: set[str] = field(default_factory=set)
    kinds: dict[str, int] = field(default_factory=dict)

    def readers(self) -> Iterator[tuple[str, int, Step]]:
        """(tensor, input position, step) of every reading, those of subgraphs included."""
        for step in self.steps:
            for slot, name in enumerate(step.node.inputs):
                if name:
                    yield name, slot, step
            for value in step.node.attributes.values():
                if isinstance(value, Plan):
                    yield from value.readers()


def make_plan(model: Model) -> Plan:
    """Read a model into a plan.

    Raises:
        ModelError: operators without a PyTorch counterpart (all are named).
    """
    graph = model.proto.graph
    constants = {t.name: np.asarray(model.array(t)) for t in graph.initializer}
    opsets = {o.domain: o.version for o in model.proto.opset_import}
    inputs = tuple(i.name for i in graph.input if i.name not in constants)
    missing: dict[str, str] = {}
    plan = _plan(graph, opsets, constants, set(), inputs, missing)
    if missing:
        listed = ", ".join(f"{op} (first at '{label}')" for op, label in missing.items())
        raise ModelError(
            f"{model.path}: no PyTorch counterpart for: {listed}; fine-tune the model before that export step"
        )
    return plan


def _plan(
    graph: onnx.GraphProto,
    opsets: dict[str, int],
    constants: dict[str, np.ndarray[Any, Any]],
    host: set[str],
    inputs: tuple[str, ...],
    missing: dict[str, str],
) -> Plan:
    # What may be read on the host: integers, truth values and single numbers.
    host |= {name for name, value in constants.items() if _is_small(value)}
    plan = Plan(inputs, tuple(o.name for o in graph.output), [], constants, host)
    plan.kinds = {o.name: o.type.tensor_type.elem_type for o in graph.output}
    for proto in (graph.node[i] for i in in_order(graph.node)):  # half-precision converters append casts at the end
        if proto.op_type == "Constant" and proto.domain in ("", "ai.onnx"):
            value = constant_value(proto)
            if value is None or value.dtype == object:
                label = proto.name or proto.output[0]
                raise ModelError(f"the Constant node '{label}' has no numeric value; export the model again")
            constants[proto.output[0]] = value
            if _is_small(value):
                host.add(proto.output[0])
            continue
        node = _node(proto, opsets, host, missing)
        on_host = node.op in ("Shape", "Size") or (
            node.op in HOST and bool(node.inputs) and all(name in host for name in node.inputs if name)
        )
        operator = OPS.get(node.op)
        if operator is None and not on_host and node.op not in ("If", "Size"):
            missing.setdefault(node.op, node.label)
        if on_host:
            host.update(name for name in node.outputs if name)
        plan.steps.append(Step(node, operator, on_host))
    _mark_last(plan)
    return plan


def _is_small(value: np.ndarray[Any, Any]) -> bool:
    return value.size == 1 or (value.dtype.kind in "biu" and value.size <= LIMIT)


def _mark_last(plan: Plan) -> None:
    """Note after which step a computed tensor is not read any more."""
    seen = set(plan.outputs)
    made = {name for step in plan.steps for name in step.node.outputs if name}
    for i in range(len(plan.steps) - 1, -1, -1):
        step = plan.steps[i]
        here = Plan((), (), [step], {})
        reads = {name for name, _, _ in here.readers()} | _inner_outputs(step)
        last = tuple(sorted((reads | set(step.node.outputs)) & made - seen))
        seen |= reads
        plan.steps[i] = Step(step.node, step.operator, step.host, last)


def _inner_outputs(step: Step) -> set[str]:
    return {name for value in step.node.attributes.values() if isinstance(value, Plan) for name in value.outputs}


def _node(proto: onnx.NodeProto, opsets: dict[str, int], host: set[str], missing: dict[str, str]) -> Node:
    standard = proto.domain in ("", "ai.onnx")
    attributes = {a.name: _attribute(a, opsets, host, missing) for a in proto.attribute}
    return Node(
        proto.op_type if standard else f"{proto.domain}/{proto.op_type}",
        proto.name or next(iter(proto.output), ""),
        tuple(proto.input),
        tuple(proto.output),
        attributes,
        opsets.get("", opsets.get("ai.onnx", 1)) if standard else opsets.get(proto.domain, 1),
    )


def _attribute(a: onnx.AttributeProto, opsets: dict[str, int], host: set[str], missing: dict[str, str]) -> Any:
    if a.type == onnx.AttributeProto.GRAPH:
        inner = {t.name: onnx.numpy_helper.to_array(t) for t in a.g.initializer}
        return _plan(a.g, opsets, inner, set(host), (), missing)
    value = onnx.helper.get_attribute_value(a)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return list(value) if a.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value
