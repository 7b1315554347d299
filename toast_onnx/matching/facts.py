"""What is known of every tensor once the inputs have concrete shapes: its shape, and its value where that is small.

Exporters spell shapes as arithmetic (Shape, Gather, Concat, ...). Instead of recognising spellings, the graph is walked
once with concrete input shapes: shape inference (ONNX's own, node by node) gives shapes, and small integer or constant
tensors are evaluated on the way. Weights are never touched here; constants of any size can be asked for later.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx.checker
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx.reference
import onnx.shape_inference

from toast_onnx.errors import ModelError
from toast_onnx.matching.contrib import contrib_shapes
from toast_onnx.matching.graph import FLOATS, ROWS, GraphView, attribute, is_standard
from toast_onnx.matching.operators import Effect, operators
from toast_onnx.model import reads
from toast_onnx.reasons import Kind

log = logging.getLogger(__name__)

_RANDOM = operators(Effect.DRAWS)
#: Attribute of a Constant node, without the s of its plural -> type of what it gives.
_CONSTANTS = {"value_float": np.float32, "value_int": np.int64, "value_string": object}
#: Largest tensor (elements) that is evaluated while walking; larger constants are evaluated on request.
SMALL = 4096


@dataclass(frozen=True)
class Fact:
    """Shape, element type and, where known, value of one tensor.

    Attributes:
        shape: concrete shape; None when it could not be inferred.
        elem_type: ONNX element type; 0 when unknown.
        value: the value at these input shapes, for small tensors that do not depend on the inputs' contents.
        constant: whether the value is made of weights alone, neither of contents nor of shapes of the inputs.
    """

    shape: tuple[int, ...] | None
    elem_type: int = 0
    value: np.ndarray | None = None
    constant: bool = False


class Contradiction(ModelError):
    """Shapes that do not fit a graph, and how many nodes were walked before that was seen."""

    def __init__(self, text: str, walked: int) -> None:
        super().__init__(text)
        self.walked = walked


class Facts:
    """Facts of all tensors of a graph at given input shapes."""

    def __init__(self, view: GraphView, shapes: Mapping[str, Sequence[int]], like: Facts | None = None) -> None:
        """Walk the graph.

        Args:
            view: the graph.
            shapes: concrete shape of every graph input that is not an initializer.
            like: of another graph that differs in few nodes or weights; where both are the same, nothing is inferred.

        Raises:
            Contradiction: the shapes contradict the graph.
        """
        self.view = view
        self._opsets = {o.domain: o.version for o in view.model.proto.opset_import}
        self._facts: dict[str, Fact] = {"": Fact(None)}
        for value in view.model.proto.graph.input:
            if value.name in shapes:
                self._facts[value.name] = Fact(tuple(shapes[value.name]), value.type.tensor_type.elem_type)
        for name, tensor in view.initializers.items():
            weight = tensor.doc_string != ROWS
            small = weight and _volume(tensor.dims) <= SMALL
            self._facts[name] = Fact(
                tuple(tensor.dims), tensor.data_type, view.model.array(tensor) if small else None, weight
            )
        for walked, node in enumerate(view.nodes):
            if like is not None and self._taken_over(node, like):
                continue
            try:
                self._walk(node)
            except ModelError as e:
                raise Contradiction(str(e), walked) from e

    def _taken_over(self, node: onnx.NodeProto, other: Facts) -> bool:
        """Whether the other graph has this node, too, and it reads the same there: then it makes the same, too."""
        if node.op_type == "If" or self._opsets != other._opsets:
            return False
        same = all(_equal(self._facts.get(name), other._facts.get(name)) for name in reads(node))
        if not same or node != other.view.producer_of(next(filter(None, node.output), "")):
            return False
        self._facts.update({name: other._facts[name] for name in node.output if name in other._facts})
        return True

    def trust(self, other: Facts) -> None:
        """Count as constants what has the same known value at other input shapes, and what is made of it.

        Exporters slice weights by extents of activations; where those never change, the slices are weights.
        """
        for node in self.view.nodes:
            inherited = all(self.is_constant(name) for name in node.input if name) and node.op_type not in _RANDOM
            for name in node.output:
                fact = self._facts.get(name)
                if fact is None or fact.constant or not name:
                    continue
                elsewhere = other.value(name)
                same = fact.value is not None and elsewhere is not None and np.array_equal(fact.value, elsewhere)
                if same or (inherited and node.input and fact.value is None):
                    self._facts[name] = replace(fact, constant=True)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Concrete shape of a tensor, None when unknown."""
        return self._facts.get(name, Fact(None)).shape

    def known_shape(self, name: str) -> tuple[int, ...]:
        """Concrete shape of a tensor.

        Raises:
            Decline: it is unknown.
        """
        shape = self.shape(name)
        if shape is None:
            raise Kind.SHAPE.decline("the shape of '{tensor}' cannot be inferred", tensor=name)
        return shape

    def elem_type(self, name: str) -> int:
        """ONNX element type of a tensor, 0 when unknown."""
        return self._facts.get(name, Fact(None)).elem_type

    def value(self, name: str) -> np.ndarray | None:
        """Value of a small tensor known at these shapes, else None."""
        return self._facts.get(name, Fact(None)).value

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is made of weights alone."""
        return bool(name) and self._facts.get(name, Fact(None)).constant

    def array(self, name: str) -> np.ndarray:
        """Value of a constant of any size, computed now (not kept).

        Raises:
            ModelError: an operator on the way cannot be evaluated here.
        """
        fact = self._facts[name]
        if name in self.view.model.arrays:  # which may have changed since the walk
            return self.view.model.arrays[name]
        if fact.value is not None:
            return fact.value
        if name in self.view.initializers:
            return self.view.model.array(self.view.initializers[name])
        node = self.view.producer_of(name)
        if node is None or not fact.constant:
            raise ModelError(f"the tensor '{name}' is not a constant")
        outputs = self.evaluate(node, [self.array(i) if i else None for i in node.input])
        return outputs[list(node.output).index(name)]

    def evaluate(self, node: onnx.NodeProto, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Run one operator in numpy (`onnx.reference`).

        Raises:
            ModelError: the operator has no reference implementation or fails on these inputs.
        """
        if node.op_type == "Constant":
            value = constant_value(node)
            if value is None:
                raise ModelError(f"the Constant node '{node.name or node.output[0]}' has no dense value")
            return [value]
        try:
            return evaluate_node(node, inputs, self._opsets)
        except Exception as e:  # the reference evaluator raises whatever numpy raises
            raise ModelError(
                f"the node '{node.name or node.output[0]}' ({node.op_type}) cannot be evaluated: {e}"
            ) from e

    def _walk(self, node: onnx.NodeProto) -> None:
        facts = [self._facts.get(name, Fact(None)) for name in node.input]
        constant = all(f.constant for f, name in zip(facts, node.input, strict=True) if name)
        if node.op_type == "Constant" and is_standard(node):
            (tensor,) = self.evaluate(node, [])
            elem = int(onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype))
            keep = tensor if tensor.size <= SMALL else None
            self._facts[node.output[0]] = Fact(tensor.shape, elem, keep, True)
            return
        if node.op_type == "Shape" and facts[0].shape is not None:
            start = attribute(node, "start", 0)
            end = attribute(node, "end", None)
            dims = np.asarray(facts[0].shape, np.int64)[start:end]
            self._facts[node.output[0]] = Fact(dims.shape, onnx.TensorProto.INT64, dims, facts[0].constant)
            return
        if node.op_type == "If" and facts[0].value is not None:
            self._walk_branch(node, bool(facts[0].value.reshape(())))
            return
        shapes = self._infer(node, facts)
        known = all(f.value is not None for f, name in zip(facts, node.input, strict=True) if name)
        outputs: list[np.ndarray] | None = None
        if known and is_standard(node) and all(s is not None and _volume(s) <= SMALL for s, _ in shapes):
            try:
                outputs = self.evaluate(node, [f.value for f in facts])
            except ModelError as e:
                log.debug("%s", e)
        for k, name in enumerate(node.output):
            if not name:
                continue
            shape, elem = shapes[k]
            value = None if outputs is None else np.asarray(outputs[k])
            if value is not None:
                shape = value.shape
            self._facts[name] = Fact(shape, elem, value, constant and node.op_type not in _RANDOM)

    def _walk_branch(self, node: onnx.NodeProto, taken: bool) -> None:
        """Facts of an If whose condition is known: those of the branch that is taken."""
        branch = attribute(node, "then_branch" if taken else "else_branch")
        assert isinstance(branch, onnx.GraphProto)
        for tensor in branch.initializer:
            value = onnx.numpy_helper.to_array(tensor) if _volume(tensor.dims) <= SMALL else None
            self._facts[tensor.name] = Fact(tuple(tensor.dims), tensor.data_type, value)
        for inner in branch.node:
            self._walk(inner)
        for name, result in zip(node.output, branch.output, strict=True):
            fact = self._facts.get(result.name, Fact(None))
            self._facts[name] = Fact(fact.shape, fact.elem_type, fact.value)

    def _infer(self, node: onnx.NodeProto, facts: Sequence[Fact]) -> list[tuple[tuple[int, ...] | None, int]]:
        """Shape and element type of every output of a node."""
        unknown: list[tuple[tuple[int, ...] | None, int]] = [(None, 0)] * len(node.output)
        if not is_standard(node):
            found = contrib_shapes(node, [f.shape for f in facts])
            elem = next((f.elem_type for f in facts if f.elem_type in FLOATS), 0)
            return [(s, elem) for s in found] if found else unknown
        given = {name: fact for fact, name in zip(facts, node.input, strict=True) if name}
        if any(fact.shape is None for fact in given.values()):
            return unknown
        if node.op_type == "GroupNormalization":  # since opset 21 a function body that only a whole model can infer
            return [(facts[0].shape, facts[0].elem_type)]
        types = {name: onnx.helper.make_tensor_type_proto(fact.elem_type, fact.shape) for name, fact in given.items()}
        data = {
            name: onnx.numpy_helper.from_array(np.asarray(fact.value, order="C"), name)
            for name, fact in given.items()
            if fact.value is not None and fact.value.dtype != object
        }
        try:
            schema = onnx.defs.get_schema(
                node.op_type, self._opsets[""] if "" in self._opsets else self._opsets["ai.onnx"]
            )
            inferred = onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                types,
                data,
                opset_imports=list(self.view.model.proto.opset_import),
                ir_version=self.view.model.proto.ir_version,
            )
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as e:
            raise self._misfit(node, str(e).strip().splitlines()[-1]) from e
        except onnx.defs.SchemaError:
            return unknown
        if not schema.has_type_and_shape_inference_function:
            # GreaterOrEqual of opset 12 and the like: only their bodies tell
            inferred = _infer_function(node, types, list(self.view.model.proto.opset_import))
        results = [_type_shape(inferred.get(name)) for name in node.output]
        if (reason := _overlooked(node, facts, results[0][0])) is not None:
            raise self._misfit(node, reason)
        return results

    def _misfit(self, node: onnx.NodeProto, reason: str) -> ModelError:
        return ModelError(
            f"{self.view.model.path}: the input shapes do not fit the graph at node "
            f"'{node.name or node.output[0]}' ({node.op_type}): {reason}; give the shapes with --shape"
        )


def _equal(one: Fact | None, other: Fact | None) -> bool:
    """Whether two tensors' facts are the same."""
    if one is other or one is None or other is None:
        return one is other
    if (one.shape, one.elem_type, one.constant) != (other.shape, other.elem_type, other.constant):
        return False
    return one.value is other.value or np.array_equal(one.value, other.value)  # type: ignore[arg-type]


def _overlooked(node: onnx.NodeProto, facts: Sequence[Fact], made: tuple[int, ...] | None) -> str | None:
    """What is wrong with a node's shapes that inference does not see; None where nothing is."""
    given = facts[0].shape if facts else None
    if given is None or made is None:
        return None
    if node.op_type == "Reshape" and _volume(made) != _volume(given):
        return f"{list(given)} does not fill {list(made)}"
    if node.op_type == "Conv" and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET" and facts[1].shape is not None:
        kernel = facts[1].shape[2:]
        pads = np.asarray(attribute(node, "pads", [0] * 2 * len(kernel))).reshape(2, -1).sum(axis=0)
        if any(have + pad < size for have, pad, size in zip(given[2:], pads, kernel, strict=True)):
            return f"{list(given[2:])} is smaller than the kernel {list(kernel)}"
    return None


def reduced_axes(facts: Facts, node: onnx.NodeProto, rank: int) -> list[int] | None:
    """The axes that a reduction of a tensor of `rank` axes runs over, not negative; None where the input tells them."""
    given: object = attribute(node, "axes")
    if given is None and any(node.input[1:]):
        given = facts.value(node.input[1])
        if given is None:
            return None
    return list(range(rank)) if given is None else [int(a) % rank for a in np.asarray(given).reshape(-1)]


def slice_operands(facts: Facts, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends, axes and steps (n,) of a Slice, those filled in that it leaves out; all but the axes are copies."""
    given = [facts.value(n) if n else None for n in node.input[1:]]
    values = [None if v is None else np.array(v).reshape(-1) for v in (*given, None, None)[:4]]
    starts, ends, axes, steps = values
    assert starts is not None
    assert ends is not None
    return (
        starts,
        ends,
        np.arange(starts.size) if axes is None else axes,
        np.ones(starts.size, np.int64) if steps is None else steps,
    )


def evaluate_node(
    node: onnx.NodeProto, inputs: Sequence[np.ndarray | None], opsets: Mapping[str, int]
) -> list[np.ndarray]:
    """Run one operator with `onnx.reference` on numpy arrays; None stands for an absent optional input."""
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    del bare.input[:], bare.output[:]
    bare.input.extend("" if v is None else f"i{k}" for k, v in enumerate(inputs))
    bare.output.extend(f"o{k}" if name else "" for k, name in enumerate(node.output))
    feeds = {f"i{k}": np.asarray(v) for k, v in enumerate(inputs) if v is not None}
    if node.op_type == "CumSum":  # dynamo writes the axis as a vector of one, which ONNX Runtime takes, too
        feeds["i1"] = feeds["i1"].reshape(())
    graph = onnx.helper.make_graph(
        [bare],
        "one",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), None)
            for n, v in feeds.items()
        ],
        [onnx.helper.make_value_info(n, onnx.TypeProto()) for n in bare.output if n],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in opsets.items()])
    with np.errstate(all="ignore"):  # log(0), or NaN as an integer, is the graph's own arithmetic
        results = iter(onnx.reference.ReferenceEvaluator(model).run(None, feeds))
    return [np.asarray(next(results)) if name else np.empty(0) for name in bare.output]


def _infer_function(
    node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto], opsets: Sequence[onnx.OperatorSetIdProto]
) -> dict[str, onnx.TypeProto]:
    """Output types of an operator that is defined as a function of others and has no inference of its own."""
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_value_info(name, proto) for name, proto in types.items()],
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name],
    )
    model = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph, opset_imports=opsets))
    return {o.name: o.type for o in model.graph.output if o.type.HasField("tensor_type")}


def constant_value(node: onnx.NodeProto) -> np.ndarray | None:
    """What a Constant node gives; None where that is sparse."""
    for a in node.attribute:
        value = onnx.helper.get_attribute_value(a)
        if a.name == "value":
            return onnx.numpy_helper.to_array(value)
        kind = _CONSTANTS.get(a.name.removesuffix("s"))
        if kind is not None:
            return np.asarray(value, kind)
    return None


def _volume(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _type_shape(type_proto: onnx.TypeProto | None) -> tuple[tuple[int, ...] | None, int]:
    if type_proto is None or not type_proto.HasField("tensor_type"):
        return None, 0
    tensor = type_proto.tensor_type
    if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return None, tensor.elem_type
    return tuple(d.dim_value for d in tensor.shape.dim), tensor.elem_type


@dataclass(frozen=True)
class Probe:
    """A graph and what is known of it at two sizes.

    Attributes:
        view: the graph.
        facts: facts at the probed shapes: two or more batch items and tokens.
        other: facts at other sizes of every dynamic axis; differences mark what is dynamic.
    """

    view: GraphView
    facts: Facts
    other: Facts
