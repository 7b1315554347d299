"""Appending nodes to a copy of a graph, whose results become its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from toast_onnx.model import Model
from toast_onnx.nodes import NodeWriter

PREFIX = "toast"


class GraphWriter(NodeWriter):
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

    def node(
        self, op: str, inputs: Sequence[str], what: str = "", outputs: int | Sequence[str] = 1, **attributes: Any
    ) -> list[str]:
        """Append a node; returns the names of what it makes."""
        self._count += 1
        name = f"{PREFIX}/{self._count}/{what or op}"
        made = [name, *(f"{name}/{k}" for k in range(1, outputs))] if isinstance(outputs, int) else list(outputs)
        self.proto.graph.node.append(onnx.helper.make_node(op, list(inputs), made, name=name, **attributes))
        return made

    def constant(self, value: Any, what: str = "", dtype: Any = None) -> str:
        """Name of an initializer with this value; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = f"{array.dtype.str}{array.shape}".encode() + array.tobytes()
        if key not in self._constants:
            name = f"{PREFIX}/constant/{len(self._constants)}"
            self.proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def scaled(self, x: str, factor: float) -> str:
        """`x` times a number; `x` itself where the number is one."""
        return x if factor == 1 else self.one("Mul", [x, self.constant(factor, dtype=np.float32)])

    def extent(self, x: str, axis: int) -> str:
        """Extent of an axis as a float, shape (1,)."""
        return self.cast(self.gather(self.one("Shape", [x]), [axis], 0), onnx.TensorProto.FLOAT)

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
