"""What new weights do to a model's output on samples, each trial run only from the first block that changes.

The dense model advances block by block; the values in front of the present block lie in a file and serve all trials of
that block. What lies behind the last changed block is one session for all of them, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError, DataError, MatchError
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.piece import cut_piece
from toast_onnx.matching.span import Span, span_of
from toast_onnx.matching.study import Study
from toast_onnx.model import Model
from toast_onnx.proof.twin import padded_twin
from toast_onnx.solving.weights import BlockWeights
from toast_onnx_calibration.agreement import Agreement
from toast_onnx_calibration.beside import Beside
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.comparing import is_classifier
from toast_onnx_calibration.labels import Labels
from toast_onnx_calibration.sessions import run
from toast_onnx_calibration.stored import Samples, piece_session, store_samples, store_values, whole_session

if TYPE_CHECKING:
    import onnxruntime as ort

Array = NDArray[Any]


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
    samples = store_samples(study, data, options, folder, lambda count: _divisor(count, options.batch))
    if not samples.count:
        raise DataError(
            f"{samples.source.description}: fewer samples than the model's batch of {samples.size}; give more"
        )
    return samples


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
    """Runs new weights on samples and holds the output against the dense model's.

    Attributes:
        running: seconds that were spent in the runtime.
    """

    def __init__(
        self,
        study: Study,
        samples: Samples,
        options: CalibrationOptions,
        folder: Path,
        output: str | None = None,
        labels: Labels | None = None,
        dense: Array | None = None,
    ) -> None:
        """Run the dense model once.

        Args:
            study: the dense model.
            samples: what to run it on.
            options: provider and threads.
            folder: for working files.
            output: where to measure, as for `chosen_output`.
            labels: class numbers, for top-1.
            dense: (batches, *shape) outputs of the dense model, where they are known.

        Raises:
            ConfigError: there is no such output, or labels for one that is no class scores.
        """
        self.study, self.samples, self.options, self.folder = study, samples, options, folder
        self._known = labels
        self.output = chosen_output(study, output)
        self.classes = is_classifier(study, self.output)
        if labels is not None and not self.classes:
            raise ConfigError(f"labels need class scores, and the output '{self.output}' holds none; leave them out")
        self.facts = Facts(study.view, samples.shapes)
        self.beside = Beside(study, samples, options, folder)
        self.labels = None if labels is None else np.array([labels.by_row.get(row, -1) for row in samples.rows])
        if self.labels is not None and (self.labels < 0).all():
            raise ConfigError(f"{labels.description if labels else ''}: labels none of the samples; give others")
        self.running = 0.0
        self._front: tuple[int, Array] | None = None
        self._tail: tuple[str, ort.InferenceSession] | None = None
        self._spans: dict[int, Span | None] = {}
        if dense is None:
            dense = store_values(folder / "dense.npy", self._whole(study.view.model), samples.count)
        self.dense = dense
        self._counts = self.beside.output_tokens(self.output, dense.shape[1:])

    def on_first(self, count: int | None) -> Trials:
        """The same on the first so many samples, in whole batches; itself where those are all, or None is given."""
        few = self.samples if count is None else self.samples.first(count)
        if few.count == self.samples.count:
            return self
        folder = self.folder / "first"
        folder.mkdir(exist_ok=True)
        labels = None
        if self._known is not None and any(row in self._known.by_row for row in few.rows):
            labels = self._known
        return Trials(self.study, few, self.options, folder, self.output, labels, self.dense[: few.count])

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
            facts = Facts(twin, self.samples.shapes, like=self.facts)
            piece = cut_piece(twin, facts, first.start, last.end, self.beside.tensors)
            tail = self._behind(last.end)
            values = self._before(min(new))
        except MatchError:  # a second stream runs past the block
            return self._judge(self._whole(twin.model))
        session = self._open(piece, "trial")
        outputs = self._from(session, first.start, values, last.end)
        return self._judge(outputs if tail is None else self._from(tail, last.end, outputs, self.output))

    def damage_of(self, model: Model, batches: int | None = None) -> dict[str, float]:
        """Damage at the output of another graph with the same inputs and outputs.

        Args:
            model: the graph.
            batches: judge by the first so many batches of samples only; None takes all.
        """
        return self._judge(islice(self._whole(model), batches))

    def dense_top1(self) -> float | None:
        """Share of labelled samples that the dense model has right, None without labels."""
        return None if self.labels is None else self._top1(self.dense)

    def _judge(self, outputs: Iterator[Array]) -> dict[str, float]:
        agreement = Agreement(self.classes)
        kept = []
        for k, output in enumerate(outputs):
            agreement.add(self.dense[k], output, None if self._counts is None else self._counts[k])
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
            self._spans[index] = span_of(self.study.view, self.facts, self.study.match.blocks[index])
        return self._spans[index]

    def _before(self, index: int) -> Array:
        """Values (batches, *shape) of what a block reads in the dense model: from those at hand where they suffice.

        They come by way of what every earlier block reads, so that they are the same whatever was asked for before.
        """
        if self._front is None or self._front[0] > index:
            self._front = None
        for block in range(0 if self._front is None else self._front[0] + 1, index + 1):
            span = self._span(block)
            if span is not None:
                found = self._onwards(span.start)
                self._front = block, store_values(self.folder / "front.npy", found, self.samples.count)
        assert self._front is not None
        return self._front[1]

    def _onwards(self, tensor: str) -> Iterator[Array]:
        """Values of a tensor, computed from those at hand; from the samples where it does not hang on those alone."""
        view = self.study.view
        if tensor in self.samples.feeds:
            return iter(self.samples.feeds[tensor])
        if self._front is None:
            return self._whole(view.model, tensor)
        span, values = self._span(self._front[0]), self._front[1]
        assert span is not None
        if span.start == tensor:
            return iter(values)
        try:
            piece = cut_piece(view, self.facts, span.start, tensor, self.beside.tensors)
        except MatchError:  # it lies further back, or in another tower
            return self._whole(view.model, tensor)
        return self._from(self._open(piece, "advance"), span.start, values, tensor)

    def _behind(self, tensor: str) -> ort.InferenceSession | None:
        """The dense model from a tensor to the output; None where that is the output."""
        if tensor == self.output:
            return None
        if self._tail is None or self._tail[0] != tensor:
            self._tail = None
            piece = cut_piece(self.study.view, self.facts, tensor, self.output, self.beside.tensors)
            self._tail = (tensor, self._open(piece, "tail"))
        return self._tail[1]

    def _whole(self, model: Model, tensor: str | None = None) -> Iterator[Array]:
        """The output, or another tensor, of a whole model for every batch."""
        name = tensor or self.output
        session = whole_session(model, [name], self.options, self.folder)
        return (self._run(session, feeds, name) for feeds in self.samples)

    def _from(self, session: ort.InferenceSession, start: str, values: Iterable[Array], end: str) -> Iterator[Array]:
        """What a piece of the model makes of every batch of its first input."""
        further = [each.name for each in session.get_inputs() if each.name != start]
        for k, x in enumerate(values):
            yield self._run(session, {start: x, **self.beside.feeds(further, k)}, end)

    def _run(self, session: ort.InferenceSession, feeds: Mapping[str, Array], output: str) -> Array:
        """One output of one batch; the seconds are added to `running`."""
        start = time.perf_counter()
        found = run(session, {name: np.asarray(array) for name, array in feeds.items()}, [output])[output]
        self.running += time.perf_counter() - start
        return found

    def start_of(self, index: int) -> str | None:
        """What a block reads; None where it is no function of one tensor."""
        span = self._span(index)
        return None if span is None else span.start

    def _open(self, piece: onnx.ModelProto, name: str) -> ort.InferenceSession:
        return piece_session(piece, self.study.view.model.path, self.options, self.folder / f"{name}.onnx")
