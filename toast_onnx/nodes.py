"""The one writer of nodes: operators in the spelling of a graph's opset, whatever graph they go into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

#: "To the end" for a Slice.
END = np.iinfo(np.int64).max
#: Opset from which on a reduction's axes are an input.
_AXES_ARE_INPUT = {"ReduceSum": 13}


class NodeWriter(ABC):
    """Writes one node after another; a child says where nodes go and how they are called.

    Attributes:
        opset: version of the default operator set.
    """

    opset: int

    @abstractmethod
    def node(
        self, op: str, inputs: Sequence[str], what: str = "", outputs: int | Sequence[str] = 1, **attributes: Any
    ) -> list[str]:
        """Write a node; returns the names of what it makes.

        Args:
            op: its operator.
            inputs: what it reads.
            what: what to call it, the operator by default.
            outputs: how many tensors it makes, or their names.
            attributes: its attributes.
        """

    @abstractmethod
    def constant(self, value: Any, what: str = "", dtype: Any = None) -> str:
        """Write down a constant; returns its name."""

    def one(self, op: str, inputs: Sequence[str], what: str = "", **attributes: Any) -> str:
        """A node with one output; returns its name."""
        return self.node(op, inputs, what, **attributes)[0]

    def numbers(self, values: Sequence[int], what: str = "numbers") -> str:
        """An int64 constant."""
        return self.constant(values, what, np.int64)

    def reduce(self, op: str, x: str, axes: Sequence[int], *, keep: bool = False, what: str = "") -> str:
        """A reduction, `ReduceSum` and so on, over axes: an attribute or an input."""
        if self.opset >= _AXES_ARE_INPUT.get(op, 18):
            return self.one(op, [x, self.numbers(axes, "axes")], what, keepdims=int(keep))
        return self.one(op, [x], what, axes=list(axes), keepdims=int(keep))

    def unsqueeze(self, x: str, axes: Sequence[int], what: str = "") -> str:
        """New axes of extent 1."""
        if self.opset >= 13:
            return self.one("Unsqueeze", [x, self.numbers(axes, "axes")], what)
        return self.one("Unsqueeze", [x], what, axes=list(axes))

    def split(self, x: str, sizes: Sequence[int], axis: int, names: Sequence[str]) -> None:
        """Tensors of some names, so many elements of an axis each."""
        if self.opset >= 13:
            self.node("Split", [x, self.numbers(sizes, "sizes")], outputs=names, axis=axis)
        else:
            self.node("Split", [x], outputs=names, axis=axis, split=list(sizes))

    def slice(self, x: str, axis: int, start: int, stop: int = END, step: int = 1, what: str = "") -> str:
        """x[start:stop:step] along an axis."""
        operands = [self.numbers([v], "bounds") for v in (start, stop, axis, step)]
        return self.one("Slice", [x, *operands], what)

    def reshape(self, x: str, shape: Sequence[int], what: str = "", called: str = "shape") -> str:
        """Reshape; 0 copies an extent, -1 is what is left. `called` is the name of the constant."""
        return self.one("Reshape", [x, self.numbers(shape, called)], what)

    def gather(self, x: str, indices: Any, axis: int, called: str = "indices") -> str:
        """Some places of an axis. `called` is the name of the constant."""
        return self.one("Gather", [x, self.constant(indices, called, np.int64)], axis=axis)

    def cast(self, x: str, elem_type: int) -> str:
        """Cast to an element type."""
        return self.one("Cast", [x], to=elem_type)
