"""What is left to correct behind the pruned blocks before, block after block: means, last layers, then all weights.

Activations come from ONNX Runtime; only training needs PyTorch (`toast_onnx.finetune.local`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import DataError, MatchError, ModelError
from toast_onnx.finetune.local import LocalResult, LocalSettings, require_torch, split, train_block
from toast_onnx.finetune.views import Views
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
from toast_onnx.solving.weights import BlockWeights
from toast_onnx_calibration.beside import Beside
from toast_onnx_calibration.calibrating import CalibrationOptions, first_samples
from toast_onnx_calibration.recorded import Recording
from toast_onnx_calibration.refitting import LastLayer, correct
from toast_onnx_calibration.room import check_room, drawn, refining_bytes
from toast_onnx_calibration.sessions import graph_inputs
from toast_onnx_calibration.shared_views import with_views
from toast_onnx_calibration.stored import Samples, store_samples
from toast_onnx_calibration.streams import Stream
from toast_onnx_calibration.views import classifiers

Array = NDArray[Any]
Progress = Callable[[str], None]
"""Called with what was done."""

#: Samples a step.
BATCH = 8


def refine_locally(
    study: Study,
    new: Mapping[int, BlockWeights],
    data: str | Path,
    options: CalibrationOptions | None = None,
    settings: LocalSettings | None = None,
    progress: Progress | None = None,
    recording: Recording | None = None,
) -> tuple[dict[int, BlockWeights], tuple[LocalResult, ...]]:
    """Correct the new weights of every block in turn on samples: the mean of its output, then all weights by training.

    What does not lower the error of held-out samples is not kept.

    With views (`LocalSettings.views`) there are two passes: the first one, without training, gives the pruned model
    that views are made with, the second one corrects on samples and views.

    Args:
        study: the dense model.
        new: block number -> closed-form weights.
        data: as for `sources.open_source`.
        options: how samples are read and run.
        settings: how blocks are trained.
        progress: called `refining_steps` times.
        recording: what the dense model's blocks gave when their statistics were measured; it is of use where the same
            samples come again, and empty afterwards.

    Returns:
        The weights by block, of the same shapes, and what happened to each block.

    Raises:
        BackendError: PyTorch is not installed, and there are steps to train or views to make.
        DataError: the data cannot be read, or are too few.
        ConfigError: working files do not fit on the disk; or the model has no classes that views could show.
        ModelError: views are asked for, and an operator of the model has no counterpart in PyTorch.
    """
    options = options or CalibrationOptions()
    settings = settings or LocalSettings(class_weight=options.class_weight, seed=options.seed)
    if settings.steps:
        require_torch()
    progress = progress or (lambda _: None)
    classes = shared_classes(study, data, options) if settings.views else []
    count = drawn(data, options.samples)
    if count is not None:
        # samples lie there twice: alone, and behind their views
        check_room(refining_bytes(study, new.keys(), count * (2 + settings.views if settings.views else 1)))
    with tempfile.TemporaryDirectory(prefix="toast-local-") as name:
        folder = Path(name)
        samples = _open(study, data, options, folder)
        if settings.views:
            pruned = _refitted(study, new, samples, options, settings, recording, progress)
            fit, judges = split(samples.count, settings.held_out)
            models, done = [study.view.model, pruned], _Share(len(study.match.blocks), progress)
            samples = with_views(models, classes, samples, len(fit), settings.views, settings.seed, folder, done)
            settings = replace(settings, held_out=len(judges) / samples.count)
        work = _Work(study, new, samples, options, settings, folder, recording)
        results = work.blocks("training" if settings.steps else "refitting", progress)
        if recording is not None:
            recording.forget()
        return work.weights, results


def _refitted(
    study: Study,
    new: Mapping[int, BlockWeights],
    samples: Samples,
    options: CalibrationOptions,
    settings: LocalSettings,
    recording: Recording | None,
    progress: Progress,
) -> Model:
    """The pruned model, padded to the dense one's shapes, once its last layers are fitted."""
    with tempfile.TemporaryDirectory(prefix="toast-refit-") as folder:
        work = _Work(study, new, samples, options, replace(settings, steps=0), Path(folder), recording)
        work.blocks("refitting", progress)
    if recording is not None:
        recording.forget()
    return work.twin.view.model


def refining_steps(study: Study, settings: LocalSettings) -> int:
    """How often `refine_locally` calls back."""
    return len(study.match.blocks) * (3 if settings.views else 1)


def shared_classes(study: Study, data: str | Path, options: CalibrationOptions) -> list[str]:
    """The outputs that hold classes, which views can show; tried on the first samples, before any long work.

    Args:
        study: the dense model.
        data: as for `sources.open_source`.
        options: how samples are read.

    Raises:
        BackendError: PyTorch is not installed.
        ConfigError: there are no classes, or no pixels to change.
        DataError: the data cannot be read, or no gradient leads from the classes to them.
        ModelError: an operator of the model has no counterpart in PyTorch.
    """
    found = classifiers(study, graph_inputs(study.source), "compensation.views")
    views = Views([study.view.model], found)
    for feeds in first_samples(study, data, options):
        views.towards(feeds, range(len(next(iter(feeds.values())))))
    return found


class _Share:
    """Turns a share of the views that is made into steps of a progress bar."""

    def __init__(self, steps: int, progress: Progress) -> None:
        self._steps, self._progress, self._said = steps, progress, 0

    def __call__(self, share: float) -> None:
        while self._said + 1 <= share * self._steps:
            self._said += 1
            self._progress("making views")


class _Work:
    """The pass over the blocks: the dense model and the padded twin advance side by side."""

    def __init__(
        self,
        study: Study,
        new: Mapping[int, BlockWeights],
        samples: Samples,
        options: CalibrationOptions,
        settings: LocalSettings,
        folder: Path,
        recording: Recording | None,
    ) -> None:
        self.study, self.weights, self.options = study, dict(new), options
        self.settings = replace(settings, group=max(1, BATCH // samples.size))
        twin = GraphView(padded_twin(study.view, study.facts, study.match.blocks, new))
        known = {} if recording is None else recording.of(samples.rows, samples.size, samples.source.fingerprint)
        facts = Facts(study.view, samples.shapes)
        self.beside = Beside(study, samples, options, folder)
        self.dense = Stream("dense", study.view, facts, samples, options, folder, self.beside, known=known)
        self.twin = Stream("twin", twin, Facts(twin, samples.shapes), samples, options, folder, self.beside)
        selected = class_token(study.view, study.facts)
        self.class_tokens = None if selected is None else selected.tokens

    def blocks(self, doing: str, progress: Progress) -> tuple[LocalResult, ...]:
        """Correct all blocks that have new weights."""
        results = []
        for block in self.study.match.blocks:
            if block.index in self.weights:
                results.append(self.block(block))
            progress(f"{doing} {block.name}")
        return tuple(results)

    def block(self, block: Block) -> LocalResult:
        """Train one block; both streams are behind it afterwards."""
        new = self.weights[block.index]
        if (others := self._sharing(block.index)) is not None:
            return LocalResult(block.index, note=f"block {block.index} ({block.name}) shares weights with {others}")
        try:
            span = block_span(self.study.view, self.dense.facts, block)
            inputs = self.twin.advance(span.start)
            targets = self.dense.advance(span.end)
            return self._train(block, new, span, inputs, targets)
        except (MatchError, ModelError) as e:  # another stream comes in, or a piece does not run alone
            return LocalResult(block.index, note=str(e))

    def _sharing(self, index: int) -> str | None:
        """The other blocks that have the very same new weights; corrected one by one, they would no longer."""
        parts = {id(part) for part in self._parts(index)}
        same = [k for k in self.weights if k != index and parts & {id(part) for part in self._parts(k)}]
        return ", ".join(map(str, same)) or None

    def _parts(self, index: int) -> list[object]:
        weights = self.weights[index]
        return [part for part in (weights.attention, weights.ffn) if part is not None]

    def _train(self, block: Block, new: BlockWeights, span: Span, inputs: Array, targets: Array) -> LocalResult:
        twin, arrays = self.twin, self.twin.view.model.arrays
        piece = cut_piece(twin.view, twin.facts, span.start, span.end, span.beside)
        parts = places(twin.view, block, new)
        weights = self._token_weights(block, span.end, len(targets))
        last = self._fitted(block, parts, targets)
        before, after, kept = correct(twin, piece, last, inputs, targets, weights, self.settings.held_out)
        note = None
        if self.settings.steps:
            whole, further = Model(piece, twin.view.model.path), [each.name for each in piece.graph.input[1:]]
            beside = partial(self.beside.feeds, further)
            try:
                found, error = train_block(whole, masks(parts, arrays), inputs, targets, weights, self.settings, beside)
            except ModelError as e:  # an operator is not known to PyTorch
                found, error, note = {}, after, str(e)
            if found:
                twin.change(piece, found)
                twin.move(span.end, piece, inputs)
                after, kept = error, "trained"
        self.weights[block.index] = take_out(parts, arrays, new)
        return LocalResult(block.index, before, after, kept, note)

    def _fitted(self, block: Block, parts: Mapping[str, Place], targets: Array) -> LastLayer | None:
        """What of a block's last layer can be fitted to what the block's output lacks."""
        last, name = _last_layer(block), "fc2" if block.ffn is not None else "proj"
        bias = parts.get(f"{name}.bias")
        if last is None or bias is None or targets.shape[-1] != last.out_features:
            return None
        weight = parts.get(f"{name}.weight") if self._sees_all_tokens(last, targets) else None
        gamma = layer_scale(self.study.view, self.study.facts, last.output, last.out_features)
        return LastLayer(last.input, bias, weight, gamma)

    def _sees_all_tokens(self, last: Linear, targets: Array) -> bool:
        """Whether a layer reads one row for each of the block's outputs: not windows, say, in another order."""
        if last.channel_axis % targets[0].ndim != targets[0].ndim - 1:
            return False
        return (self.twin.facts.shape(last.input) or ())[:-1] == targets.shape[1:-1]

    def _token_weights(self, block: Block, end: str, count: int) -> Array:
        """How much the error of each token counts, (count, *broadcastable to a batch of a block's output)."""
        shape = self.twin.facts.shape(end) or ()
        weights = np.ones((1,) * len(shape), np.float32)
        if self.class_tokens is not None and len(shape) == 3 and shape[1] == self.class_tokens:
            weights = np.ones((1, shape[1], 1), np.float32)
            weights[:, 0] = self.settings.class_weight
        seen = self.beside.token_weights(block, end, shape)
        return np.broadcast_to(weights, (count, *weights.shape)) if seen is None else weights * seen


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
