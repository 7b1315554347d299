"""A model run over all samples up to some tensor, whose values lie in a file: it goes on from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray

from toast_onnx.errors import MatchError
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.piece import cut_piece
from toast_onnx.runtime import expose
from toast_onnx_calibration.beside import Beside
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.sessions import run
from toast_onnx_calibration.stored import Samples, piece_session, store_values, whole_session

Array = NDArray[Any]


@dataclass
class Stream:
    """Where a model has got to.

    Attributes:
        name: of its files.
        view: the model, as float or half as it is; sessions run in float32.
        facts: of the view, at the samples' shapes.
        samples: what it runs on.
        options: how it runs.
        folder: for its files.
        beside: what blocks read beside the stream.
        tensor: up to where it ran; None at the samples.
        values: (batches, *shape) of that tensor.
        known: values of tensors that were kept when the model ran before.
    """

    name: str
    view: GraphView
    facts: Facts
    samples: Samples
    options: CalibrationOptions
    folder: Path
    beside: Beside
    tensor: str | None = None
    values: Array | None = None
    known: Mapping[str, Array] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the values lie."""
        return self.folder / f"{self.name}.npy"

    def advance(self, to: str) -> Array:
        """Values (batches, *shape) of a tensor: known, or from those at hand if they suffice, or from the samples."""
        if to in self.known:
            return self.stand(to, self.known[to])
        if to in self.samples.feeds:
            return self.stand(to, self.samples.feeds[to])
        if self.tensor == to and self.values is not None:
            return self.values
        if self.tensor is not None and self.values is not None:
            try:
                piece = cut_piece(self.view, self.facts, self.tensor, to, self.beside.tensors)
            except MatchError:
                pass
            else:
                return self.move(to, piece, self.values)
        session = whole_session(self.view.model, [to], self.options, self.folder)
        found = (run(session, feeds, [to])[to] for feeds in self.samples)
        return self.stand(to, store_values(self.path, found, self.samples.count))

    def move(self, to: str, piece: onnx.ModelProto, inputs: Array) -> Array:
        """Run a piece from its inputs, and go on from what it gives."""
        found = (each for (each,) in self.outputs(piece, inputs))
        return self.stand(to, store_values(self.path, found, self.samples.count))

    def stand(self, tensor: str, values: Array) -> Array:
        """Go on from these values of a tensor."""
        self.tensor, self.values = tensor, values
        return values

    def outputs(
        self, piece: onnx.ModelProto, inputs: Array, inner: Sequence[str] = (), first: int = 0
    ) -> Iterator[tuple[Array, ...]]:
        """What a piece of the model gives for each batch from the first one on, then the tensors inside it named."""
        (start, *beside), names = (each.name for each in piece.graph.input), [piece.graph.output[0].name, *inner]
        if inner:
            whole, piece = piece, onnx.ModelProto()
            piece.CopyFrom(whole)
            expose(piece, inner)
        draft = self.folder / f"{self.name}-piece.onnx"
        session = piece_session(piece, self.view.model.path, self.options, draft)
        for k in range(first, len(inputs)):
            found = run(session, {start: np.asarray(inputs[k]), **self.beside.feeds(beside, k)}, names)
            yield tuple(found[name] for name in names)

    def change(self, piece: onnx.ModelProto, values: Mapping[str, Array]) -> dict[str, Array]:
        """Give initializers new values, in the model and in a piece of it.

        Returns:
            The old values.
        """
        arrays = self.view.model.arrays
        old = {name: arrays[name] for name in values}
        for name, value in values.items():
            arrays[name] = value.astype(arrays[name].dtype)
        for tensor in piece.graph.initializer:
            if tensor.name in values:
                tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
        return old
