"""Accuracy of a model on labelled samples, or a metric of the user's over all outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError, DataError, ToastError, one_line
from toast_onnx_calibration.accuracy import Accuracy, added, label_ranks
from toast_onnx_calibration.executing import Executor, Find, Here, Report
from toast_onnx_calibration.executing_files import found_recipe, placed, placed_recipe, reading_files
from toast_onnx_calibration.feeds import Batch, batch_size, batches
from toast_onnx_calibration.images import ReadReport
from toast_onnx_calibration.labels import Labels, open_labels
from toast_onnx_calibration.prepared import Note, open_prepared, silent
from toast_onnx_calibration.sessions import ModelInput, fed_inputs, make_session, run
from toast_onnx_calibration.sources import Source, load_callable, shares_of

if TYPE_CHECKING:
    import onnxruntime as ort

Progress = Callable[[int, int | None], None]
"""Called with the samples done and, where it is known, the number of all."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: accuracy or the metric's values, and what they were measured on."""

    accuracy: Accuracy | None
    metrics: dict[str, float]
    source: Source
    provider: str
    batch: int
    labels: str | None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """One document for machines."""
        recipe = self.source.recipe
        return {
            "data": self.source.description,
            "fingerprint": self.source.fingerprint,
            "labels": self.labels,
            "preprocessing": recipe.model_dump(mode="json") if recipe else None,
            "provider": self.provider,
            "batch": self.batch,
            "accuracy": self.accuracy.to_json() if self.accuracy else None,
            "metrics": {k: v if math.isfinite(v) else None for k, v in self.metrics.items()} or None,
            "notes": list(self.notes),
        }


def evaluate(
    model: str | Path,
    data: str | Path,
    labels: str | Path | None = None,
    *,
    metric: str | None = None,
    preprocess: str | None = None,
    output: str | None = None,
    provider: str = "cpu",
    batch: int = 16,
    samples: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
    hold: int = 0,
    note: Note = silent,
    executor: Executor | None = None,
) -> Evaluation:
    """Measures a model: top-1 and top-5 against labels, or a metric `module:function` on all its outputs.

    Args:
        model: ONNX file.
        data: As for `sources.open_source`.
        labels: As for `labels.open_labels`; with a metric they are optional and handed to it.
        metric: As for `measure`.
        preprocess: As for `recipe_files.recipe_for`.
        output: Which output holds the class scores; None takes the first 2-D float one.
        provider: a key of `toast_onnx.providers.PROVIDERS`.
        batch: Samples a run, where the model leaves it free.
        samples: How many samples to draw by `seed`; None takes all.
        seed: For that draw.
        threads: Threads of ONNX Runtime and of image decoding; None is one a core.
        progress: Called after every batch.
        hold: From 2 on, only the samples that `calibrate` held back with the same draw.
        note: Told what the user should know before the model runs.
        executor: Who runs the model on parts of the samples; None for this process, which a metric needs.

    Raises:
        ToastError: Its children say what is wrong with the model, the data, the labels or an option.
    """
    function = load_callable(metric) if metric is not None else None
    session = make_session(model, provider, threads=threads)
    inputs = fed_inputs(Path(model), session)
    known = open_labels(labels, data) if function is None or labels is not None else None
    only = known.by_row.keys() if known else None
    for text in known.notes if known else ():
        note(text)
    source, notes = open_prepared(
        Path(model),
        data,
        inputs,
        preprocess,
        metadata=session.get_modelmeta().custom_metadata_map,
        samples=samples,
        seed=seed,
        threads=threads,
        only=only,
        hold=hold,
        held=hold > 1,
        note=note,
    )
    accuracy, values = None, {}
    if function is None:
        assert known is not None
        job = Classification(
            EvaluationOrder(
                Path(model).absolute(), placed(data), known, placed_recipe(Path(model), preprocess),
                output, provider, batch, samples, seed, threads, hold,
            ),
            session, inputs, source,
        )  # fmt: skip
        accuracy = classify_on(executor or Here(), job, progress)
    else:
        values = measure(session, inputs, source, function, known, batch=batch, progress=progress)
    notes += known.notes if known else ()
    notes += source.report.notes() if source.report else ()
    notes += _class_notes(accuracy, known) if accuracy and known else ()
    return Evaluation(
        accuracy=accuracy,
        metrics=values,
        source=source,
        provider=provider,
        batch=batch_size(inputs, batch),
        labels=known.description if known else None,
        notes=tuple(notes),
    )


def classify(
    session: ort.InferenceSession,
    inputs: list[ModelInput],
    source: Source,
    labels: Labels,
    *,
    output: str | None = None,
    batch: int = 16,
    progress: Progress | None = None,
) -> Accuracy:
    """Top-1 and top-5 of a classifier. Of equal scores the lower class number ranks first.

    Raises:
        DataError: No output holds class scores, a label is beyond their number, or a sample has no label.
    """
    name = classifier_output(session, output)
    samples = top1 = top5 = classes = not_finite = 0
    if progress is not None:
        progress(0, source.count)
    for batch_ in batches(source, inputs, batch):
        scores = batch_.trim(run(session, batch_.feeds, [name])[name])
        if scores.ndim != 2 or len(scores) != batch_.valid:
            raise DataError(f"the output '{name}' has shape {scores.shape}, not one row of class scores a sample")
        classes = scores.shape[1]
        truth = _truth(batch_, labels, classes, name)
        ranks = label_ranks(scores, truth)
        samples += batch_.valid
        top1 += int((ranks < 1).sum())
        top5 += int((ranks < 5).sum())
        not_finite += int((~np.isfinite(scores).all(axis=1)).sum())
        if progress is not None:
            progress(samples, source.count)
    return Accuracy(samples, top1, top5 if classes > 5 else None, name, classes, not_finite)


@dataclass(frozen=True)
class EvaluationOrder:
    """A classifier and labelled samples as they are sent to workers; the fields are the arguments of `evaluate`."""

    model: Path
    data: str
    labels: Labels
    preprocess: str | None
    output: str | None
    provider: str
    batch: int
    samples: int | None
    seed: int
    given_threads: int | None
    hold: int
    solver: ClassVar[str] = "cpu"

    @property
    def files(self) -> tuple[tuple[Path, ...], ...]:
        """The model, and where a recipe may stand."""
        return reading_files(self.model, self.preprocess)

    @property
    def threads(self) -> int:
        """Of ONNX Runtime and of image decoding."""
        return self.given_threads or 1

    @contextmanager
    def open(self, find: Find, _folder: Path) -> Iterator[Classification]:
        """Model and samples in a process of their own."""
        model = find(self.model)
        session = make_session(model, self.provider, threads=self.threads)
        inputs = fed_inputs(model, session)
        source, _ = open_prepared(
            model,
            self.data,
            inputs,
            found_recipe(self.preprocess, find),
            metadata=session.get_modelmeta().custom_metadata_map,
            samples=self.samples,
            seed=self.seed,
            threads=self.threads,
            only=self.labels.by_row.keys(),
            hold=self.hold,
            held=self.hold > 1,
            note=silent,
        )
        yield Classification(self, session, inputs, source)


@dataclass(frozen=True)
class Classification:
    """Top-1 and top-5 of parts of the samples.

    Attributes:
        asked: what was asked for.
        session: of the model.
        inputs: that it needs.
        source: all samples.
    """

    asked: EvaluationOrder
    session: ort.InferenceSession
    inputs: list[ModelInput]
    source: Source

    def do(self, task: tuple[int, int] | None, report: Report) -> tuple[Accuracy, ReadReport | None]:
        """Classify the samples from a number up to another, or all; and what was met on the way."""
        source = self.source if task is None else self.source.part(*task)
        found = classify(
            self.session,
            self.inputs,
            source,
            self.asked.labels,
            output=self.asked.output,
            batch=self.asked.batch,
            progress=lambda done, _total: report(done),
        )
        return found, source.report

    def order(self) -> EvaluationOrder:
        """What another process opens the same from."""
        return self.asked


#: Parts of the samples that every worker does one after another, so that all are busy to the end.
PARTS = 4


def classify_on(executor: Executor, job: Classification, progress: Progress | None = None) -> Accuracy:
    """As `classify`, with the samples divided among workers; what they met is added to the source's report.

    Args:
        executor: who classifies.
        job: the model and all samples.
        progress: called as the work goes on.

    Raises:
        ToastError: as for `classify`.
    """
    source, count = job.source, job.source.count
    with executor.open(job) as pool:
        if pool.workers == 1:
            ((_, (whole, _)),) = pool.do([None], None if progress is None else lambda done: progress(done, count))
            return cast(Accuracy, whole)
        tasks = shares_of(source, batch_size(job.inputs, job.asked.batch), PARTS * pool.workers)
        count = tasks[-1][1]
        if progress is not None:
            progress(0, count)
        results = dict(pool.do(tasks, None if progress is None else lambda done: progress(done, count)))
    ordered = [results[number] for number in range(len(tasks))]
    if source.report is not None:
        source.report.corrupt = [each for _, met in ordered if met is not None for each in met.corrupt]
        source.report.read = sum(met.read for _, met in ordered if met is not None)
    return added([found for found, _ in ordered])


def measure(
    session: ort.InferenceSession,
    inputs: list[ModelInput],
    source: Source,
    metric: Callable[..., Any],
    labels: Labels | None = None,
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Hands every output to a function of the user's and returns what it found.

    The function is called once with one argument, an iterator of `Result`, which it must exhaust; it returns a number
    or a mapping of names to numbers. The model runs as the iterator advances, so nothing piles up in memory::

        def mean_confidence(results):
            total = count = 0
            for result in results:
                total += result.outputs["scores"].max(axis=-1).sum()
                count += len(result.rows)
            return {"mean_confidence": total / count}

    Raises:
        ConfigError: The function fails, stops early, or returns something else.
    """
    name = getattr(metric, "__name__", str(metric))
    finished = False

    def results() -> Iterator[Result]:
        nonlocal finished
        done = 0
        if progress is not None:
            progress(0, source.count)
        for batch_ in batches(source, inputs, batch):
            outputs = {key: batch_.trim(value) for key, value in run(session, batch_.feeds).items()}
            feeds = {key: batch_.trim(value) for key, value in batch_.feeds.items()}
            known = tuple(labels.by_row.get(row) for row in batch_.rows) if labels else None
            yield Result(outputs, feeds, batch_.rows, known)
            done += batch_.valid
            if progress is not None:
                progress(done, source.count)
        finished = True

    try:
        value = metric(results())
    except ToastError:
        raise
    except Exception as error:  # somebody else's code
        raise ConfigError(f"the metric {name} failed with {type(error).__name__}: {one_line(error)}") from error
    if not finished:
        raise ConfigError(f"the metric {name} stopped before the last batch: loop over all results")
    named = value if isinstance(value, Mapping) else {name: value}
    try:
        return {str(key): float(number) for key, number in named.items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the metric {name} must return a number or a mapping of names to numbers") from error


@dataclass(frozen=True)
class Result:
    """One batch as a metric sees it, padding removed.

    Attributes:
        outputs: Every output of the model by name, as ONNX Runtime gave it.
        inputs: What was fed, by input name.
        rows: The samples' names: relative file paths, or row numbers as strings.
        labels: Their class numbers where labels were given, else None.
    """

    outputs: dict[str, NDArray[Any]]
    inputs: dict[str, NDArray[Any]]
    rows: tuple[str, ...]
    labels: tuple[int | None, ...] | None


def classifier_output(session: ort.InferenceSession, name: str | None = None) -> str:
    """The output with class scores: the one asked for, or the first that is 2-D and float.

    Raises:
        DataError: There is no such output; lists those there are.
    """
    outputs = session.get_outputs()
    listed = ", ".join(f"{o.name} {o.type}{list(o.shape)}" for o in outputs)
    if name is not None:
        if name not in {o.name for o in outputs}:
            raise DataError(f"the model has no output '{name}': it has {listed}")
        return name
    for each in outputs:
        if each.type in ("tensor(float)", "tensor(float16)", "tensor(double)") and len(each.shape) == 2:
            return str(each.name)
    raise DataError(f"no output is 2-D and float, as class scores are: name one, or give a metric; there are {listed}")


def _truth(batch: Batch, labels: Labels, classes: int, output: str) -> NDArray[np.int64]:
    missing = [row for row in batch.rows if row not in labels.by_row]
    if missing:
        raise DataError(f"{labels.description}: no label for sample {missing[0]}")
    truth = np.array([labels.by_row[row] for row in batch.rows], np.int64)
    if int(truth.max()) >= classes:
        raise DataError(
            f"{labels.description}: label {int(truth.max())} ({batch.rows[int(truth.argmax())]}) is beyond the "
            f"{classes} classes of the output '{output}', which count from 0"
        )
    return truth


def _class_notes(accuracy: Accuracy, labels: Labels) -> tuple[str, ...]:
    notes = []
    if labels.classes and len(labels.classes) != accuracy.classes:
        notes.append(
            f"{len(labels.classes)} folders, but the model has {accuracy.classes} classes: the sorted folder names "
            f"were taken as classes 0 to {len(labels.classes) - 1}, which may not be what they mean to the model"
        )
    if accuracy.not_finite:
        notes.append(f"the scores of {accuracy.not_finite} samples hold NaN or infinity; they count as wrong")
    return tuple(notes)
