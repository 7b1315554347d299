"""What is left to correct behind the pruned blocks before, block after block: means, last layers, then all weights.

Activations come from ONNX Runtime; only training needs PyTorch (`toast_onnx.finetune.local`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.errors import DataError, MatchError, ModelError
from toast_onnx.finetune.local import LocalResult, LocalSettings, relative_error, require_torch, split, train_block
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.class_token import class_token
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.norms import layer_scale
from toast_onnx.matching.piece import cut_piece
from toast_onnx.matching.span import Span, block_span
from toast_onnx.matching.study import Study
from toast_onnx.model import Model
from toast_onnx.proof.places import Place, masks, places, take_out
from toast_onnx.proof.twin import padded_twin
from toast_onnx.solving.refit import Lack, before_scale, refit
from toast_onnx.solving.weights import BlockWeights
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.sessions import run
from toast_onnx_calibration.stored import Samples, piece_session, store_samples, store_values, whole_session

Array = NDArray[Any]
Progress = Callable[[str], None]
"""Called with a block's name when it is done."""

#: Samples a step.
BATCH = 8


def refine_locally(
    study: Study,
    new: Mapping[int, BlockWeights],
    data: str | Path,
    options: CalibrationOptions | None = None,
    settings: LocalSettings | None = None,
    progress: Progress | None = None,
) -> tuple[dict[int, BlockWeights], tuple[LocalResult, ...]]:
    """Correct the new weights of every block in turn on samples: the mean of its output, then all weights by training.

    What does not lower the error of held-out samples is not kept.

    Args:
        study: the dense model.
        new: block number -> closed-form weights.
        data: as for `sources.open_source`.
        options: how samples are read and run.
        settings: how blocks are trained.
        progress: called after every block.

    Returns:
        The weights by block, of the same shapes, and what happened to each block.

    Raises:
        BackendError: PyTorch is not installed, and there are steps to train.
        DataError: the data cannot be read, or are too few.
    """
    options = options or CalibrationOptions()
    settings = settings or LocalSettings(class_weight=options.class_weight, seed=options.seed)
    if settings.steps:
        require_torch()
    with tempfile.TemporaryDirectory(prefix="toast-local-") as folder:
        work = _Work(study, new, data, options, settings, Path(folder))
        results = []
        for block in study.match.blocks:
            if block.index in new:
                results.append(work.block(block))
            if progress is not None:
                progress(block.name)
        return work.weights, tuple(results)


class _Work:
    """The pass over the blocks: the dense model and the padded twin advance side by side."""

    def __init__(
        self,
        study: Study,
        new: Mapping[int, BlockWeights],
        data: str | Path,
        options: CalibrationOptions,
        settings: LocalSettings,
        folder: Path,
    ) -> None:
        self.study, self.weights, self.options = study, dict(new), options
        samples = _open(study, data, options, folder)
        self.settings = replace(settings, group=max(1, BATCH // samples.size))
        twin = GraphView(padded_twin(study.view, study.facts, study.match.blocks, new))
        self.dense = _Stream("dense", study.view, Facts(study.view, samples.shapes), samples, options, folder)
        self.twin = _Stream("twin", twin, Facts(twin, samples.shapes), samples, options, folder)
        selected = class_token(study.view, study.facts)
        self.class_tokens = None if selected is None else selected.tokens

    def block(self, block: Block) -> LocalResult:
        """Train one block; both streams are behind it afterwards."""
        new = self.weights[block.index]
        try:
            span = block_span(self.twin.view, self.twin.facts, block)
            inputs = self.twin.advance(span.start)
            targets = self.dense.advance(span.end)
            return self._train(block, new, span, inputs, targets)
        except (MatchError, ModelError) as e:  # other activations come in, or an operator is not known to PyTorch
            return LocalResult(block.index, note=str(e))

    def _train(self, block: Block, new: BlockWeights, span: Span, inputs: Array, targets: Array) -> LocalResult:
        view, facts, arrays = self.twin.view, self.twin.facts, self.twin.view.model.arrays
        proto = cut_piece(view, facts, span.start, span.end)
        parts = places(view, block, new)
        weights = self._token_weights(facts.shape(span.end) or ())
        before, after, kept = self._correct(block, span, parts, proto, inputs, targets, weights)
        if self.settings.steps:
            piece = Model(proto, view.model.path)
            found, error = train_block(piece, masks(parts, arrays), inputs, targets, weights, self.settings)
            if found:
                self._change(proto, found)
                after, kept = error, "trained"
        self.weights[block.index] = take_out(parts, arrays, new)
        self.twin.move(span.end, proto)
        return LocalResult(block.index, before, after, kept)

    def _correct(
        self,
        block: Block,
        span: Span,
        parts: Mapping[str, Place],
        proto: onnx.ModelProto,
        inputs: Array,
        targets: Array,
        weights: Array,
    ) -> tuple[float, float, str]:
        """Fit the block's last layer, or its bias alone, to what the block's output lacks.

        Returns:
            The errors on held-out samples before and after, and what was kept: closed form, mean or refit.
        """
        last, name = _last_layer(block), "fc2" if block.ffn is not None else "proj"
        bias = parts.get(f"{name}.bias")
        bias = None if last is None or targets.shape[-1] != last.out_features else bias
        place = parts.get(f"{name}.weight") if bias is not None and self._sees_all_tokens(last, targets) else None
        gamma = None if last is None else layer_scale(self.study.view, self.study.facts, last.output, last.out_features)
        before, fitted, judged = self._lacks(last, place, span, proto, inputs, targets, weights, gamma)
        if bias is None or fitted is None or judged is None:
            return before, before, "closed form"
        weight, shift, strength = refit(fitted, judged)
        arrays = self.twin.view.model.arrays
        new = {bias.tensor: bias.added(arrays[bias.tensor], shift)}
        if place is not None:
            shaped = weight.reshape(*np.shape(place.index), len(shift))
            new[place.tensor] = place.added(arrays[place.tensor], shaped)
        old = {tensor: arrays[tensor] for tensor in new}
        self._change(proto, new)
        _, judge = split(len(inputs), self.settings.held_out)
        outputs = self.twin.outputs(proto, inputs[judge[0] :])
        after = float(np.mean([relative_error(o, targets[k], weights) for k, o in zip(judge, outputs, strict=True)]))
        if after < before:
            return before, after, "mean" if math.isinf(strength) else "refit"
        self._change(proto, old)
        return before, before, "closed form"

    def _sees_all_tokens(self, last: Linear | None, targets: Array) -> bool:
        """Whether a layer reads one row for each of the block's outputs: not windows, say, in another order."""
        if last is None or last.channel_axis % targets[0].ndim != targets[0].ndim - 1:
            return False
        return (self.twin.facts.shape(last.input) or ())[:-1] == targets.shape[1:-1]

    def _lacks(
        self,
        last: Linear | None,
        place: Place | None,
        span: Span,
        proto: onnx.ModelProto,
        inputs: Array,
        targets: Array,
        weights: Array,
        gamma: Array | None,
    ) -> tuple[float, Lack | None, Lack | None]:
        """The error on held-out samples, and what the output lacks of the others and of those; None without any.

        Where only a bias is to be fitted (no `place`), nothing of what the layer reads is kept.
        """
        _, judge = split(len(inputs), self.settings.held_out)
        read: Iterator[Array | None] = repeat(None, len(inputs))
        if last is not None and place is not None:
            piece = cut_piece(self.twin.view, self.twin.facts, span.start, last.input)
            read = iter(self.twin.outputs(piece, inputs, "reads"))
        counted = np.broadcast_to(weights, (*targets.shape[1:-1], 1)).reshape(-1)
        fitted = judged = None
        errors = []
        for k, (output, x, target) in enumerate(zip(self.twin.outputs(proto, inputs), read, targets, strict=True)):
            if k in judge:
                errors.append(relative_error(output, target, weights))
            if last is None or last.out_features != targets.shape[-1]:
                continue
            y = before_scale((target.astype(np.float64) - output).reshape(-1, last.out_features), gamma)
            rows = np.zeros((len(y), 0))
            if x is not None and place is not None:
                rows = x.reshape(len(y), -1)[:, np.asarray(place.index).reshape(-1)]
            found = Lack.of(rows, y, counted)
            if k in judge:
                judged = found if judged is None else judged.merge(found)
            else:
                fitted = found if fitted is None else fitted.merge(found)
        return float(np.mean(errors)), fitted, judged

    def _change(self, proto: onnx.ModelProto, values: Mapping[str, Array]) -> None:
        """Give initializers new values, in the twin and in a piece of it."""
        arrays = self.twin.view.model.arrays
        for name, value in values.items():
            arrays[name] = value.astype(arrays[name].dtype)
        for tensor in proto.graph.initializer:
            if tensor.name in values:
                tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))

    def _token_weights(self, shape: tuple[int, ...]) -> Array:
        """How much the error of each token counts, broadcastable to an activation of this shape."""
        if self.class_tokens is None or len(shape) != 3 or shape[1] != self.class_tokens:
            return np.ones((1,) * len(shape), np.float32)
        weights = np.ones((1, shape[1], 1), np.float32)
        weights[:, 0] = self.settings.class_weight
        return weights


def _last_layer(block: Block) -> Linear | None:
    """The layer that ends a block's last branch."""
    if block.ffn is not None:
        return block.ffn.fc2
    proj = None if block.attention is None else block.attention.proj
    return None if proj is None else proj.linear


def _open(study: Study, data: str | Path, options: CalibrationOptions, folder: Path) -> Samples:
    """Read the samples.

    Raises:
        DataError: there are fewer than two batches.
    """
    samples = store_samples(
        study, data, options, folder, lambda count: BATCH if count is None else max(1, min(BATCH, count // 4))
    )
    if samples.count < 2:
        raise DataError(
            f"{samples.source.description}: blocks are corrected on some batches and judged on others: "
            "give more samples"
        )
    return samples


@dataclass
class _Stream:
    """A model run over all samples up to some tensor, whose values lie in a file."""

    name: str
    view: GraphView
    facts: Facts
    samples: Samples
    options: CalibrationOptions
    folder: Path
    tensor: str | None = None
    values: Array | None = None

    def advance(self, to: str) -> Array:
        """Values (batches, *shape) of a tensor: from those at hand if nothing else is needed, else from the samples."""
        if self.tensor == to and self.values is not None:
            return self.values
        if self.tensor is not None:
            try:
                piece = cut_piece(self.view, self.facts, self.tensor, to)
            except MatchError:
                pass
            else:
                return self.move(to, piece)
        session = whole_session(self.view.model, [to], self.options, self.folder)
        return self._store(to, (run(session, feeds, [to])[to] for feeds in self.samples))

    def move(self, to: str, piece: onnx.ModelProto) -> Array:
        """Run a piece that starts at the values at hand, and keep what it gives instead of them."""
        assert self.values is not None
        return self._store(to, self.outputs(piece, self.values))

    def outputs(self, piece: onnx.ModelProto, inputs: Array, draft_name: str = "piece") -> Iterator[Array]:
        """What a piece of the model gives for each batch of its input."""
        draft = self.folder / f"{self.name}-{draft_name}.onnx"
        session = piece_session(piece, self.view.model.path, self.options, draft)
        start, end = piece.graph.input[0].name, piece.graph.output[0].name
        return (run(session, {start: np.asarray(x)}, [end])[end] for x in inputs)

    def _store(self, tensor: str, found: Iterator[Array]) -> Array:
        values = store_values(self.folder / f"{self.name}.npy", found, self.samples.count)
        self.tensor, self.values = tensor, values
        return values
