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
        weights: broadcastable to a target: how much each element's error counts.
        held_out: fraction of the batches that only judge.

    Returns:
        The errors on held-out samples before and after, and what was kept: closed form, mean or refit.
    """
    end = piece.graph.output[0].name
    outputs, reads = _through(twin, piece, last, inputs)
    twin.stand(end, outputs)
    _, judges = split(len(inputs), held_out)
    before = _error(outputs[judges[0] :], targets[judges[0] :], weights)
    if last is None:
        return before, before, "closed form"
    weight, bias, strength = _fit(last, outputs, reads, targets, weights, judges)
    old = twin.change(piece, last.added(twin.view.model.arrays, weight, bias))
    found = [each for (each,) in twin.outputs(piece, inputs[judges[0] :])]
    after = _error(found, targets[judges[0] :], weights)
    if not after < before:
        twin.change(piece, old)
        return before, before, "closed form"
    step = last.step(old, twin.view.model.arrays)
    if _adds_up(step, [outputs[k] for k in judges], [reads[k] for k in judges], found):
        for k in range(len(outputs)):
            outputs[k] += _moved(step, reads[k], outputs[k].shape)
    else:
        twin.move(end, piece, inputs)
    return before, after, "mean" if math.isinf(strength) else "refit"


def _through(twin: Stream, piece: onnx.ModelProto, last: LastLayer | None, inputs: Array) -> tuple[Array, Array]:
    """A block's outputs, and the rows (batches, tokens, n) that its last layer reads, in files."""
    channels = np.zeros(0, np.int64) if last is None else last.channels
    inner = [last.reads] if last is not None and len(channels) else []
    shape = twin.facts.shape(inner[0] if inner else piece.graph.output[0].name) or ()
    path = twin.folder / f"{twin.name}-reads.npy"
    reads = scratch_rows(path, (len(inputs), math.prod(shape[:-1]), len(channels)))

    def outputs() -> Iterator[Array]:
        for k, (output, *inside) in enumerate(twin.outputs(piece, inputs, inner)):
            for x in inside:
                np.take(x.reshape(-1, x.shape[-1]), channels, axis=1, out=reads[k], mode="clip")
            yield output

    return store_values(twin.path, outputs(), len(inputs)), reads


def _fit(
    last: LastLayer, outputs: Array, reads: Array, targets: Array, weights: Array, judges: Sequence[int]
) -> tuple[Array, Array, float]:
    """What to add to the weight (n, m) and to the bias (m,), and at which strength, fitted on all but the judges."""
    counted = np.broadcast_to(weights, (*targets.shape[1:-1], 1)).reshape(-1)
    # Around a mean, single precision keeps what channels far from zero have in common.
    around = reads[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    sums: dict[bool, Lack] = {}
    for k, (output, x, target) in enumerate(zip(outputs, reads, targets, strict=True)):
        y = before_scale((target.astype(np.float64) - output).reshape(len(x), -1), last.gamma)
        found, judging = Lack.of(x - around, y, counted), k in judges
        sums[judging] = found if judging not in sums else sums[judging].merge(found)
    weight, bias, strength = refit(sums[False], sums[True])
    return weight, bias - around @ weight, strength


def _error(outputs: Sequence[Array] | Array, targets: Array, weights: Array) -> float:
    return float(np.mean([relative_error(o, t, weights) for o, t in zip(outputs, targets, strict=True)]))


def _moved(step: tuple[Array, Array], reads: Array, shape: tuple[int, ...]) -> Array:
    """What a change of the last layer adds to a batch of outputs of this shape."""
    weight, bias = step
    found: Array = (reads @ weight + bias).reshape(shape) if weight.size else np.broadcast_to(bias, shape)
    return found


def _adds_up(
    step: tuple[Array, Array], before: Sequence[Array], reads: Sequence[Array], after: Sequence[Array]
) -> bool:
    """Whether the block's outputs went where the change of its last layer alone takes them: nothing acts on the sum."""
    missed = made = 0.0
    for old, x, new in zip(before, reads, after, strict=True):
        change = new.astype(np.float64) - old
        missed += float(np.square(change - _moved(step, x, old.shape)).sum())
        made += float(np.square(change).sum())
    return missed <= EXACT**2 * made
