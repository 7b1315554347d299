"""What new weights do to a model's output on samples, each trial run only from the first block that changes.

The dense model advances block by block; the values in front of the present block lie in a file and serve all trials of
that block. What lies behind the last changed block is one session for all of them, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError, DataError, MatchError
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, write_draft
from toast_onnx.runtime import expose
from toast_onnx.surgery.piece import cut_piece
from toast_onnx.surgery.precision import to_float32
from toast_onnx.surgery.span import Span, block_span
from toast_onnx.surgery.twin import padded_twin
from toast_onnx.surgery.weights import BlockWeights
from toast_onnx_calibration.agreement import Agreement
from toast_onnx_calibration.calibrate import CalibrationOptions
from toast_onnx_calibration.compare import is_classifier
from toast_onnx_calibration.feeds import batch_size, batches
from toast_onnx_calibration.labels import Labels
from toast_onnx_calibration.recipe_files import recipe_for
from toast_onnx_calibration.sessions import make_session, model_inputs, run
from toast_onnx_calibration.sources import open_source

if TYPE_CHECKING:
    import onnxruntime as ort

Array = NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """Full batches of samples of one shape, prepared once and kept in files.

    Attributes:
        feeds: input name -> (batches, *shape of one batch).
        rows: names of the samples, in order.
        description: one line on where they come from.
        fingerprint: hash of them.
        preprocessing: the recipe, None for ready tensors.
        notes: what the user should know.
    """

    feeds: dict[str, Array]
    rows: tuple[str, ...]
    description: str
    fingerprint: str
    preprocessing: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one batch by input name."""
        return {name: tuple(array.shape[1:]) for name, array in self.feeds.items()}

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for k in range(len(next(iter(self.feeds.values())))):
            yield {name: np.asarray(array[k]) for name, array in self.feeds.items()}


def read_samples(study: Study, data: str | Path, options: CalibrationOptions, folder: Path) -> Samples:
    """Prepare samples in batches that a graph cut at fixed shapes can take.

    Args:
        study: the model.
        data: as for `sources.open_source`.
        options: how samples are read; where the model leaves the batch free, it is the largest divisor of their number
            up to `options.batch`, so that none is left out.
        folder: for working files.

    Raises:
        DataError: the data cannot be read, or do not fill one batch.
    """
    inputs = model_inputs(_session(study.view.model, None, options, folder))
    choice = recipe_for(study.view.model.path, options.preprocess, inputs[0].shape if len(inputs) == 1 else None)
    source = open_source(
        data, inputs, choice.recipe, samples=options.samples, seed=options.seed, threads=options.threads
    )
    size = batch_size(inputs, _divisor(source.count, options.batch))
    feeds: dict[str, Array] = {}
    rows: list[str] = []
    left_out = count = 0
    for each in batches(source, inputs, size):
        if each.valid < size or any(a.shape != feeds[n].shape[1:] for n, a in each.feeds.items() if n in feeds):
            left_out += each.valid  # an incomplete batch, or one of another image size
            continue
        if not feeds:
            most = (source.count or sum(1 for _ in batches(source, inputs, 1))) // size
            for number, (name, array) in enumerate(each.feeds.items()):
                path = folder / f"input-{number}.npy"
                feeds[name] = np.lib.format.open_memmap(path, "w+", array.dtype, (most, *array.shape))
        for name, array in each.feeds.items():
            feeds[name][count] = array
        count += 1
        rows.extend(each.rows)
    if not count:
        raise DataError(f"{source.description}: fewer samples than the model's batch of {size}; give more")
    notes = list(choice.notes) if source.recipe else []
    notes += source.report.notes() if source.report else ()
    if left_out:
        notes.append(f"{left_out} samples are left out: they fill no batch of {size}, or differ in size")
    return Samples(
        {name: array[:count] for name, array in feeds.items()},
        tuple(rows),
        source.description,
        source.fingerprint,
        source.recipe.model_dump(mode="json") if source.recipe else None,
        tuple(notes),
    )


def _divisor(count: int | None, most: int) -> int:
    """The largest divisor of `count` in the upper half of 1..most, for full batches; else the most there are."""
    if count is None:
        return most
    most = max(1, min(most, count))
    return next((b for b in range(most, most // 2, -1) if count % b == 0), most)


def chosen_output(study: Study, name: str | None) -> str:
    """The output that damage is measured at: the one named, else the first class scores, else the first.

    Raises:
        ConfigError: the model has no such output.
    """
    names = [o.name for o in study.view.model.proto.graph.output]
    if name is not None and name not in names:
        raise ConfigError(f"the model has no output '{name}'; it has {', '.join(names)}")
    return name or next((n for n in names if is_classifier(study, n)), names[0])


class Trials:
    """Runs new weights on samples and holds the output against the dense model's."""

    def __init__(
        self,
        study: Study,
        samples: Samples,
        options: CalibrationOptions,
        folder: Path,
        output: str | None = None,
        labels: Labels | None = None,
    ) -> None:
        """Run the dense model once.

        Args:
            study: the dense model.
            samples: what to run it on.
            options: provider and threads.
            folder: for working files.
            output: where to measure, as for `chosen_output`.
            labels: class numbers, for top-1.

        Raises:
            ConfigError: there is no such output, or labels for one that is no class scores.
        """
        self.study, self.samples, self.options, self.folder = study, samples, options, folder
        self.output = chosen_output(study, output)
        self.classes = is_classifier(study, self.output)
        if labels is not None and not self.classes:
            raise ConfigError(f"labels need class scores, and the output '{self.output}' holds none; leave them out")
        self.facts = Facts(study.view, samples.shapes)
        self.labels = None if labels is None else np.array([labels.by_row.get(row, -1) for row in samples.rows])
        if self.labels is not None and (self.labels < 0).all():
            raise ConfigError(f"{labels.description if labels else ''}: labels none of the samples; give others")
        self._front: tuple[str, Array] | None = None
        self._tail: tuple[str, ort.InferenceSession] | None = None
        self._spans: dict[int, Span | None] = {}
        self.dense = self._store("dense", self._whole(study.view.model))

    def damage(self, new: Mapping[int, BlockWeights]) -> dict[str, float]:
        """Damage at the output of the model with these new weights.

        Ask in the order of the first changed block: going back starts again from the samples.

        Args:
            new: block number -> new weights, at least one.

        Returns:
            `kl` in nats and `top1_agreement` for class scores, `relative_error` for every output, `top1` with labels.
        """
        twin = GraphView(padded_twin(self.study.view, self.facts, self.study.match.blocks, new))
        first, last = (self._span(index) for index in (min(new), max(new)))
        if first is None or last is None:
            return self._judge(self._whole(twin.model))
        try:
            piece = cut_piece(twin, Facts(twin, self.samples.shapes), first.start, last.end)
            tail = self._behind(last.end)
            values = self._before(first.start)
        except MatchError:  # a second stream runs past the block
            return self._judge(self._whole(twin.model))
        session = self._open(piece, "trial")
        names = session.get_inputs()[0].name, session.get_outputs()[0].name
        outputs = (run(session, {names[0]: np.asarray(x)}, [names[1]])[names[1]] for x in values)
        if tail is None:
            return self._judge(outputs)
        return self._judge(run(tail, {last.end: y}, [self.output])[self.output] for y in outputs)

    def damage_metric(self, found: Mapping[str, float]) -> float:
        """The one number that adds up over blocks: KL in nats, else the squared relative error."""
        return found["kl"] if self.classes else found["relative_error"] ** 2

    def dense_top1(self) -> float | None:
        """Share of labelled samples that the dense model has right, None without labels."""
        return None if self.labels is None else self._top1(self.dense)

    def _judge(self, outputs: Iterator[Array]) -> dict[str, float]:
        agreement = Agreement(self.classes)
        kept = []
        for k, output in enumerate(outputs):
            agreement.add(self.dense[k], output)
            if self.labels is not None:
                kept.append(output)
        found = {name: float(value) for name, value in agreement.to_json().items() if name != "cosine"}
        return found if self.labels is None else found | {"top1": self._top1(kept)}

    def _top1(self, outputs: Any) -> float:
        assert self.labels is not None
        answers = np.concatenate([np.argmax(output, axis=-1).reshape(-1) for output in outputs])
        known = self.labels >= 0
        return float((answers == self.labels)[known].mean())

    def _span(self, index: int) -> Span | None:
        """From where to where a block runs, None where it is no function of one tensor."""
        if index not in self._spans:
            block: Block = self.study.match.blocks[index]
            try:
                self._spans[index] = block_span(self.study.view, self.facts, block)
            except MatchError:
                self._spans[index] = None
        return self._spans[index]

    def _before(self, tensor: str) -> Array:
        """Values (batches, *shape) of a tensor in the dense model: from those at hand where they suffice."""
        if self._front is not None and self._front[0] == tensor:
            return self._front[1]
        view = self.study.view
        outputs = None
        if self._front is not None:
            try:
                piece = cut_piece(view, self.facts, self._front[0], tensor)
            except MatchError:  # it lies further back
                pass
            else:
                session, start, values = self._open(piece, "advance"), *self._front
                outputs = (run(session, {start: np.asarray(x)}, [tensor])[tensor] for x in values)
        stored = self._store("front", self._whole(view.model, tensor) if outputs is None else outputs)
        self._front = (tensor, stored)
        return stored

    def _behind(self, tensor: str) -> ort.InferenceSession | None:
        """The dense model from a tensor to the output; None where that is the output."""
        if tensor == self.output:
            return None
        if self._tail is None or self._tail[0] != tensor:
            self._tail = None
            self._tail = (tensor, self._open(cut_piece(self.study.view, self.facts, tensor, self.output), "tail"))
        return self._tail[1]

    def _whole(self, model: Model, tensor: str | None = None) -> Iterator[Array]:
        """The output, or another tensor, of a whole model for every batch."""
        name = tensor or self.output
        session = _session(model, name, self.options, self.folder)
        return (run(session, feeds, [name])[name] for feeds in self.samples)

    def _open(self, piece: onnx.ModelProto, name: str) -> ort.InferenceSession:
        model = to_float32(Model(piece, self.study.view.model.path))
        path = write_draft(model, self.folder, f"{name}.onnx")
        return make_session(path, self.options.provider, threads=self.options.threads)

    def _store(self, name: str, found: Iterator[Array]) -> Array:
        """Values in a file; the old ones may still be read while the new ones are made."""
        first = next(found)
        path, draft = self.folder / f"{name}.npy", self.folder / f"{name}.draft.npy"
        count = len(next(iter(self.samples.feeds.values())))
        out = np.lib.format.open_memmap(draft, "w+", np.float32, (count, *first.shape))
        for k, values in enumerate(chain([first], found)):
            out[k] = values
        draft.replace(path)  # maps of the old file stay valid
        return out


def _session(model: Model, tensor: str | None, options: CalibrationOptions, folder: Path) -> ort.InferenceSession:
    """A session of a whole model in float32, with one tensor as its only output, or its own outputs."""
    path = write_draft(to_float32(model), folder, "model.onnx")
    proto = onnx.load(path, load_external_data=False)
    if tensor is not None:
        outputs = [o for o in proto.graph.output if o.name == tensor]
        del proto.graph.output[:]
        proto.graph.output.extend(outputs)
        expose(proto, [tensor])
    onnx.save(proto, path)
    return make_session(path, options.provider, threads=options.threads)
