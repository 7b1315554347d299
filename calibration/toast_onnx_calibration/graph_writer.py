"""Appending nodes to a copy of a graph: fresh names, constants, reductions in the spelling of the graph's opset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from toast_onnx.model import Model

PREFIX = "toast"


class GraphWriter:
    """A copy of a model that grows measuring nodes and, in the end, has only their results as outputs.

    Weights in files of their own stay there: the copy refers to them as the model does.
    """

    def __init__(self, model: Model) -> None:
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model.proto)
        self.opset = model.opset
        self._outputs: dict[str, str] = {}
        self._constants: dict[bytes, str] = {}
        self._count = 0

    def emit(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        self._count += 1
        name = f"{PREFIX}/{self._count}/{op}"
        self.proto.graph.node.append(onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Name of an initializer with this value; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = f"{array.dtype.str}{array.shape}".encode() + array.tobytes()
        if key not in self._constants:
            name = f"{PREFIX}/constant/{len(self._constants)}"
            self.proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def reduce(self, op: str, x: str, axes: Sequence[int], *, keep: bool = False) -> str:
        """`ReduceSum`, `ReduceMean` or `ReduceMax` over axes (attribute or input, as the opset has it)."""
        keepdims = int(keep)
        if self.opset >= (13 if op == "ReduceSum" else 18):
            return self.emit(op, [x, self.constant(list(axes))], keepdims=keepdims)
        return self.emit(op, [x], axes=list(axes), keepdims=keepdims)

    def unsqueeze(self, x: str, axes: Sequence[int]) -> str:
        """`Unsqueeze` in the opset's spelling."""
        if self.opset >= 13:
            return self.emit("Unsqueeze", [x, self.constant(list(axes))])
        return self.emit("Unsqueeze", [x], axes=list(axes))

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """`Reshape` to a constant shape (0 copies an extent, -1 is what is left)."""
        return self.emit("Reshape", [x, self.constant(list(shape))])

    def gather(self, x: str, indices: Any, axis: int) -> str:
        """`Gather` of constant indices along an axis."""
        return self.emit("Gather", [x, self.constant(indices)], axis=axis)

    def scaled(self, x: str, factor: float) -> str:
        """`x` times a number; `x` itself where the number is one."""
        return x if factor == 1 else self.emit("Mul", [x, self.constant(factor, np.float32)])

    def extent(self, x: str, axis: int) -> str:
        """Extent of an axis as a float, shape (1,)."""
        return self.emit("Cast", [self.gather(self.emit("Shape", [x]), [axis], 0)], to=onnx.TensorProto.FLOAT)

    def output(self, name: str, x: str) -> None:
        """Make a tensor an output under the given name."""
        self._outputs[name] = x

    def finish(self) -> tuple[onnx.ModelProto, dict[str, str]]:
        """The model with nothing but the collected outputs, and their tensors by the names given to `output`."""
        del self.proto.graph.output[:]
        tensors = dict.fromkeys(self._outputs.values())
        self.proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
        del self.proto.graph.value_info[:]
        return self.proto, self._outputs
