"""A block's last layer fitted once more to what the block's output lacks; the values behind the block follow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.finetune.local import relative_error, split
from toast_onnx.proof.places import Place
from toast_onnx.solving.refit import Lack, before_scale, refit
from toast_onnx_calibration.room import spare
from toast_onnx_calibration.stored import scratch_rows, store_values
from toast_onnx_calibration.streams import Stream

Array = NDArray[Any]

#: How far, as a share of a change, the outputs may be from where the change of the last layer alone would take them.
EXACT = 1e-3


@dataclass(frozen=True)
class LastLayer:
    """What of a block's last layer can be fitted.

    Attributes:
        reads: the tensor it reads.
        bias: its place in the twin.
        weight: its place in the twin, (n, m); None where the bias alone can be fitted.
        gamma: layer scale behind it (m,), None where there is none.
    """

    reads: str
    bias: Place
    weight: Place | None
    gamma: Array | None

    @property
    def channels(self) -> Array:
        """Which of the channels it reads carry something, (n,)."""
        return np.zeros(0, np.int64) if self.weight is None else np.asarray(self.weight.index).reshape(-1)

    def added(self, arrays: Mapping[str, Array], weight: Array, bias: Array) -> dict[str, Array]:
        """New values of its initializers, with something added to the weight (n, m) and to the bias (m,)."""
        new = {self.bias.tensor: self.bias.added(arrays[self.bias.tensor], bias)}
        if self.weight is not None:
            shaped = weight.reshape(*np.shape(self.weight.index), len(bias))
            new[self.weight.tensor] = self.weight.added(arrays[self.weight.tensor], shaped)
        return new

    def step(self, old: Mapping[str, Array], new: Mapping[str, Array]) -> tuple[Array, Array]:
        """What a change of its initializers adds to the residual stream: x @ weight (n, m) + bias (m,), float32."""
        bias = self.bias.read(new).astype(np.float64) - self.bias.read(old)
        weight = np.zeros((0, len(bias)))
        if self.weight is not None:
            weight = (self.weight.read(new).astype(np.float64) - self.weight.read(old)).reshape(-1, len(bias))
        gamma = 1.0 if self.gamma is None else self.gamma
        return (weight * gamma).astype(np.float32), (bias * gamma).astype(np.float32)


def correct(
    twin: Stream,
    piece: onnx.ModelProto,
    last: LastLayer | None,
    inputs: Array,
    targets: Array,
    weights: Array,
    held_out: float,
) -> tuple[float, float, str]:
    """Fit a block's last layer, or its bias alone; the twin stands behind the block afterwards.

    Args:
        twin: it stands in front of the block, at `inputs`.
        piece: the block, as a piece of the twin.
        last: what can be fitted; None where there is nothing.
        inputs: (batches, *shape of the piece's input).
        targets: (batches, *shape of its output) in the dense model.
        weights: (batches, *broadcastable to a target): how much each element's error counts.
        held_out: fraction of the batches that only judge.

    Returns:
        The errors on held-out samples before and after, and what was kept: closed form, mean or refit.
    """
    end = piece.graph.output[0].name
    _, judges = split(len(inputs), held_out)
    gathered = _Gathered(twin, last, targets, weights, judges)
    outputs = twin.stand(end, store_values(twin.path, gathered.run(piece, inputs), len(inputs)))
    before = float(np.mean(gathered.errors))
    if last is None:
        return before, before, "closed form"
    weight, bias, strength = refit(gathered.sums[False], gathered.sums[True])
    arrays = twin.view.model.arrays
    old = twin.change(piece, last.added(arrays, weight, bias - gathered.around @ weight))
    move = _Move(*last.step(old, arrays))
    errors = []
    for k, (new,) in zip(judges, twin.outputs(piece, inputs, first=judges[0]), strict=True):
        errors.append(relative_error(new, targets[k], weights[k]))
        if gathered.reads is not None:
            move.see(outputs[k], gathered.reads[k], new)
    after = float(np.mean(errors))
    if not after < before:
        twin.change(piece, old)
        return before, before, "closed form"
    if gathered.reads is not None and move.explains:
        for k in range(len(outputs)):
            outputs[k] += move.of(gathered.reads[k], outputs[k].shape)
    else:
        twin.move(end, piece, inputs)
    return before, after, "mean" if math.isinf(strength) else "refit"


class _Gathered:
    """What one run of a block tells of its last layer.

    Attributes:
        errors: of the block's outputs on the batches that judge.
        sums: what the output lacks of the batches to fit (False) and of those that judge (True).
        around: what was taken off the rows that the layer reads, (n,).
        reads: these rows (batches, tokens, n), in a file; None where they would need too much of the disk.
    """

    def __init__(
        self, twin: Stream, last: LastLayer | None, targets: Array, weights: Array, judges: Sequence[int]
    ) -> None:
        self._twin, self._last, self._targets, self._weights, self._judges = twin, last, targets, weights, judges
        self.errors: list[float] = []
        self.sums: dict[bool, Lack] = {}
        self.channels = np.zeros(0, np.int64) if last is None else last.channels
        self.around: Array = np.zeros(len(self.channels), np.float32)
        self.reads: Array | None = None

    def run(self, piece: onnx.ModelProto, inputs: Array) -> Iterator[Array]:
        """The block's outputs, batch after batch; all of them have to be taken."""
        inner = [self._last.reads] if self._last is not None and len(self.channels) else []
        for k, (output, *inside) in enumerate(self._twin.outputs(piece, inputs, inner)):
            if k in self._judges:
                self.errors.append(relative_error(output, self._targets[k], self._weights[k]))
            if self._last is not None:
                rows = math.prod(output.shape[:-1])
                x = np.zeros((rows, 0), np.float32)
                if inside:
                    x = np.take(inside[0].reshape(rows, -1), self.channels, axis=1)
                self._take(k, output, x, self._last)
            yield output

    def _take(self, k: int, output: Array, x: Array, last: LastLayer) -> None:
        if k == 0:
            # Around a mean, single precision keeps what channels far from zero have in common.
            self.around = x.mean(axis=0, dtype=np.float64).astype(np.float32)
            shape = (len(self._targets), *x.shape)
            if spare(math.prod(shape) * x.itemsize, self._twin.folder):
                self.reads = scratch_rows(self._twin.folder / f"{self._twin.name}-reads.npy", shape)
        if self.reads is not None:
            self.reads[k] = x
        y = before_scale((self._targets[k].astype(np.float64) - output).reshape(len(x), -1), last.gamma)
        counted = np.broadcast_to(self._weights[k], (*output.shape[:-1], 1)).reshape(-1)
        found, judging = Lack.of(x - self.around, y, counted), k in self._judges
        self.sums[judging] = self.sums[judging].merge(found) if judging in self.sums else found


@dataclass
class _Move:
    """What a change of the last layer adds to the block's outputs, where nothing acts on the sum.

    Attributes:
        weight: (n, m).
        bias: (m,).
        missed: squared difference from how outputs that were run again changed.
        made: sum of squares of that change.
    """

    weight: Array
    bias: Array
    missed: float = 0.0
    made: float = 0.0

    def of(self, reads: Array, shape: tuple[int, ...]) -> Array:
        """For a batch of outputs of this shape, from the rows (tokens, n) that the layer reads."""
        weight, bias = self.weight, self.bias
        found: Array = (reads @ weight + bias).reshape(shape) if weight.size else np.broadcast_to(bias, shape)
        return found

    def see(self, old: Array, reads: Array, new: Array) -> None:
        """Count a batch of outputs that was run again."""
        change = new.astype(np.float64) - old
        self.missed += float(np.square(change - self.of(reads, old.shape)).sum())
        self.made += float(np.square(change).sum())

    @property
    def explains(self) -> bool:
        """Whether the outputs that were run again went where this takes them."""
        return self.missed <= EXACT**2 * self.made
