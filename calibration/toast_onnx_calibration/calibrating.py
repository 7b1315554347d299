"""Collecting activation statistics: the measuring graph run over samples, its sums written to statistics.npz."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.errors import ConfigError, DataError
from toast_onnx.importance.moments import Moments
from toast_onnx.matching.blocks import Attention, Branch
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, file_hash, scratch_folder
from toast_onnx.proof.twin import padded_twin
from toast_onnx.solving.weights import BlockWeights
from toast_onnx_calibration.chain import Link, Spool, chain, cut
from toast_onnx_calibration.executing_files import placed_recipe
from toast_onnx_calibration.feeds import Batch, batch_size, batches
from toast_onnx_calibration.gradients import BATCH, SAMPLES, measure_gradients
from toast_onnx_calibration.needs import GRADIENT, Wanted, everything, passes
from toast_onnx_calibration.prepared import Note, open_prepared, silent
from toast_onnx_calibration.recorded import Recording
from toast_onnx_calibration.room import check_room, drawn, spool_bytes
from toast_onnx_calibration.sessions import ModelInput, graph_inputs, held_inputs, model_inputs, model_session, run
from toast_onnx_calibration.sources import Source, shares_of
from toast_onnx_calibration.statistics_graph import MeasuringGraph, TokenSettings, measuring_graph
from toast_onnx_calibration.store import Header, Share, StatisticsWriter, per_head, write_statistics
from toast_onnx_calibration.store_checks import nearest_moments
from toast_onnx_calibration.sums import add_run
from toast_onnx_calibration.views import ViewedSource

if TYPE_CHECKING:
    import onnxruntime as ort

Array = NDArray[np.float64]
Progress = Callable[[int, int | None, str], None]
"""Called with the samples measured, their number over all passes where it is known, and a note."""

#: Memory for the statistics of one pass, in bytes; more blocks take more passes.
BUDGET = 200_000_000


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        preprocess: as for `recipe_files.recipe_for`.
        samples: how many to draw; None takes all.
        seed: of the draw of samples and of tokens.
        tokens: fraction of the tokens that goes into context, hidden and input moments.
        class_weight: of the class token, where the output is shown to read nothing else.
        provider: a key of `toast_onnx.providers.PROVIDERS`.
        batch: samples a run, where the model leaves it free.
        threads: of ONNX Runtime and of image decoding; None is one a core.
        budget: memory for the statistics of one pass, in bytes.
        hold: one of so many samples is held back, from 2 on; none otherwise.
        views: of each sample that are measured, too, in which the model sees other classes (`views.ViewedSource`).
        shard: (i, n): of n shards of the samples measure the i-th alone, from 1 on, and keep its sums in float64.
        note: told what the user should know of the samples before they are run.
    """

    preprocess: str | None = None
    samples: int | None = None
    seed: int = 0
    tokens: float = 1.0
    class_weight: float = 20.0
    provider: str = "cpu"
    batch: int = 16
    threads: int | None = None
    budget: int = BUDGET
    hold: int = 0
    views: int = 0
    shard: tuple[int, int] | None = None
    note: Note = silent

    def sent(self, model: Path) -> CalibrationOptions:
        """The same for a worker elsewhere: one thread unless more were asked for, a recipe's file by its whole path."""
        return replace(self, preprocess=placed_recipe(model, self.preprocess), threads=self.threads or 1, note=silent)


class ByOptions:
    """An order (`executing.Order`) whose workers keep to calibration options.

    Attributes:
        options: as they were sent.
    """

    options: CalibrationOptions

    @property
    def threads(self) -> int:
        """Of ONNX Runtime and of image decoding."""
        return self.options.threads or 1

    @property
    def provider(self) -> str:
        """Of ONNX Runtime."""
        return self.options.provider


def calibrate(
    study: Study,
    data: str | Path,
    out: Path,
    wanted: Wanted | None = None,
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
    behind: Mapping[int, BlockWeights] | None = None,
    recording: Recording | None = None,
) -> Header:
    """Measure a model's activations on samples and write the statistics.

    Args:
        study: the model.
        data: as for `sources.open_source`.
        out: the statistics file.
        wanted: block number -> parts to measure; None takes what the defaults of pruning need.
        options: how to calibrate.
        progress: called after every batch.
        behind: block number -> new weights to measure with in place of the model's own.
        recording: what keeps the outputs of blocks, where one pass runs the whole dense model on the samples alone.

    Returns:
        What the statistics come from.

    Raises:
        ToastError: its children say what is wrong with the data, an option, or the model.
    """
    options = options or CalibrationOptions()
    wanted = everything(study) if wanted is None else wanted
    # what lies behind new weights is measured at once: the twin wants the whole graph
    sums_wanted = {index: parts - {GRADIENT} for index, parts in wanted.items()}
    groups = [sums_wanted] if behind else passes(study, sums_wanted, options.budget)
    settings = TokenSettings(options.tokens, options.class_weight, options.seed)
    notes: list[str] = []
    links = chain(study, _watched(study, groups, settings))
    weighted, source, share = False, None, None
    if len(groups) > 1 or behind or options.views or options.shard:
        recording = None
    recorded = () if recording is None else recording.begin(drawn(data, options.samples))
    first = options.shard is None or options.shard[0] == 1
    sizes: list[tuple[float, int]] = []
    with write_statistics(out, exact=options.shard is not None) as writer, scratch_folder("toast-passes-") as folder:
        if steered := [index for index, parts in sorted(wanted.items()) if GRADIENT in parts and first]:
            # first, as it may lack PyTorch or meet an operator that this does not have
            few = _few(study, data, options)
            for name, value in measure_gradients(study, steered, few, options.class_weight, options.seed).items():
                writer.array(name, value)
        spool = Spool(folder)
        for number, (group, link) in enumerate(zip(groups, links, strict=True)):
            graph = measuring_graph(study, group, settings)
            measured = [*dict.fromkeys(graph.outputs.values()), *recorded]
            session = _session(graph, measured, study, behind or {}, options, link, spool.inputs(link.takes))
            if source is None:
                inputs = held_inputs(study, model_inputs(session))
                source, found = open_measured(study, data, inputs, options)
                if options.shard is not None:
                    source, share = shard_of(source, options.shard, whole_batch(inputs, options))
                if source.count is not None:
                    check_room(spool_bytes(study, links, source.count))
                notes += found
                runs = _runs(source, inputs, options.batch, sizes)
            else:
                runs = (Run(spool.read(k, link.takes), *size) for k, size in enumerate(sizes))
            total = None if source.count is None else source.count * len(groups)
            which = f"pass {number + 1} of {len(groups)} over the samples" if len(groups) > 1 else ""
            say = _counter(progress, number * (source.count or 0), total, which)
            sums = accumulate(session, graph, link, runs, spool, source.description, say, recording)
            del session
            write_group(writer, study, group, sums)
            notes += graph.notes
            weighted |= graph.class_token
        assert source is not None
        if recording is not None:
            recording.end(source.fingerprint)
        notes += source.report.notes() if source.report else ()
        header = Header(
            model=study.view.model.path.name,
            model_sha256=file_hash(study.view.model.path),
            data=source.description,
            fingerprints=(source.fingerprint,),
            preprocessing=source.recipe.model_dump(mode="json") if source.recipe else None,
            samples=sum(valid for _, valid in sizes),
            seed=options.seed,
            tokens=options.tokens,
            class_weight=options.class_weight if weighted else 1.0,
            parts={str(index): sorted(parts) for index, parts in sorted(wanted.items())},
            notes=tuple(dict.fromkeys(notes)),
            share=share,
        )
        writer.header(header)
    return header


def shard_of(source: Source, shard: tuple[int, int], batch: int) -> tuple[Source, Share]:
    """The i-th of n shards of samples, in whole batches: together the shards run just what one run runs.

    Args:
        source: all samples.
        shard: (i, n), i from 1 on.
        batch: samples a run.

    Raises:
        ConfigError: there are fewer batches than shards, or nobody knows how many.
    """
    number, of = shard
    parts = shares_of(source, batch, of)
    if of > len(parts):
        runs = len(parts)
        raise ConfigError(
            f"{source.description}: {runs} batches of {batch} make no {of} shards; divide them into {runs} at most, or "
            "lower --batch"
        )
    return source.part(*parts[number - 1]), Share(of, (number,), source.description, source.fingerprint)


def whole_batch(inputs: Sequence[ModelInput], options: CalibrationOptions) -> int:
    """Samples and views in runs of which none is cut, nor a sample from its views."""
    return lcm(batch_size(inputs, options.batch), 1 + options.views)


def pass_links(study: Study, wanted: Wanted, options: CalibrationOptions) -> list[Link]:
    """Where the passes that measure something hand over to each other."""
    settings = TokenSettings(options.tokens, options.class_weight, options.seed)
    groups = passes(study, {index: parts - {GRADIENT} for index, parts in wanted.items()}, options.budget)
    return chain(study, _watched(study, groups, settings))


def _watched(study: Study, groups: Sequence[Wanted], settings: TokenSettings) -> list[Collection[str]]:
    """For every pass the activations that it measures, where there are several."""
    return [measuring_graph(study, group, settings).watched for group in groups] if len(groups) > 1 else [()]


def _few(study: Study, data: str | Path, options: CalibrationOptions) -> Iterator[dict[str, NDArray[Any]]]:
    """The samples that gradients are taken of."""
    inputs = held_inputs(study, graph_inputs(study.source))
    count = SAMPLES if options.samples is None else min(options.samples, SAMPLES)
    source, _ = open_samples(study, data, inputs, replace(options, samples=count, note=silent))
    return (batch.feeds for batch in batches(source, inputs, min(BATCH, options.batch)))


@dataclass(frozen=True)
class Run:
    """What a session is fed once.

    Attributes:
        feeds: arrays by input name.
        factor: of its sums: negative where samples that only filled a batch are taken out again.
        valid: how many samples it measures for the first time.
        rows: their names, where they are read off the source.
    """

    feeds: dict[str, Any]
    factor: float
    valid: int
    rows: tuple[str, ...] = ()


def accumulate(
    session: ort.InferenceSession,
    graph: MeasuringGraph,
    link: Link,
    runs: Iterable[Run],
    spool: Spool,
    description: str,
    say: Callable[[int], None],
    recording: Recording | None = None,
) -> dict[str, Array]:
    """Feed a measuring graph all runs of a pass.

    Args:
        session: of the graph.
        graph: the measuring graph.
        link: where the pass starts and ends.
        runs: what to feed.
        spool: where activations for later passes go.
        description: of the samples, for messages.
        say: called with the number of samples measured so far.
        recording: what keeps outputs of blocks.

    Returns:
        The sums by key in float64.

    Raises:
        DataError: a sum is not finite.
    """
    sums: dict[str, Array] = {}
    given = {value.name for value in session.get_inputs()}
    measured, left = list(dict.fromkeys(graph.outputs.values())), [n for n in link.leaves if n not in link.takes]
    samples = 0
    say(0)
    for number, each in enumerate(runs):
        recorded = () if recording is None else recording.tensors
        found = run(session, {n: a for n, a in each.feeds.items() if n in given}, [*measured, *left, *recorded])
        if recording is not None:
            recording.add(each.rows, found)
        spool.keep(number, {name: found.pop(name) for name in left})
        spool.forget(number, (name for name in link.takes if name not in link.leaves))
        add_run(sums, graph.outputs, found, each.factor)
        samples += each.valid
        if each.valid:
            say(samples)
    bad = sorted({key.split(".")[0] for key, value in sums.items() if not np.isfinite(value).all()}, key=int)
    if bad:
        raise DataError(
            f"the activations of block {bad[0]} hold NaN or infinity on {description}: check the preprocessing, "
            "or calibrate a float32 export of the model"
        )
    return sums


def write_group(
    writer: StatisticsWriter, study: Study, group: Mapping[int, frozenset[str]], sums: dict[str, Array]
) -> None:
    """Write the sums of a pass: heads taken apart, contexts head-major."""
    for index in sorted(group):
        attention = study.match.blocks[index].attention
        mine = {k.split(".", 1)[1]: v for k, v in sums.items() if k.split(".", 1)[0] == str(index)}
        branches = {} if attention is None else {"qq": attention.q, "kk": attention.k}
        for part, branch in branches.items():
            if attention is not None and branch is not None and f"{part}.gram" in mine:
                writer.array(f"{index}.{part}.gram", _by_head(attention, part, branch, mine[f"{part}.gram"]))
                writer.array(f"{index}.{part}.count", mine[f"{part}.count"].reshape(()))
        for part in ("context", "hidden", "inputs"):
            if f"{part}.gram" in mine:
                total, gram = mine[f"{part}.total"], mine[f"{part}.gram"]
                if part == "context" and attention is not None and attention.proj is not None:
                    order = attention.proj.layout.channels.reshape(-1)
                    total, gram = total[order], gram[np.ix_(order, order)]
                writer.moments(f"{index}.{part}", Moments(float(mine[f"{part}.count"][0]), total, (gram + gram.T) / 2))
        for part in ("fc1", "fc2"):
            for quantity in ("magnitude", "images", "attention"):
                if f"{part}.{quantity}" in mine:
                    writer.array(f"{index}.{part}.{quantity}", mine[f"{part}.{quantity}"])


def _by_head(attention: Attention, part: str, branch: Branch, gram: Array) -> Array:
    """(heads, d, d) moments of queries or keys, of the layer's own output whatever scale was put behind it."""
    once = part == "kk" and attention.qk_groups is not None and attention.core.kind != "matmul"
    moments = per_head(gram, branch.layout.num_heads if once else attention.num_heads)
    if once:  # a fused node reads keys once for all queries that meet them
        moments = moments[attention.qk_groups]
    return nearest_moments(moments) / (1.0 if attention.cosine else branch.walk.scale**2)


def _runs(source: Source, inputs: Sequence[ModelInput], batch: int, sizes: list[tuple[float, int]]) -> Iterator[Run]:
    """The samples in batches; notes factor and number of samples of every run in `sizes`."""
    for each in batches(source, inputs, batch):
        runs = [Run(each.feeds, 1.0, each.valid, each.rows)]
        if each.padding:  # the repeated last sample, measured alone, is taken out again
            runs.append(Run(_repeated(each), -each.padding / (each.valid + each.padding), 0))
        for found in runs:
            sizes.append((found.factor, found.valid))
            yield found


def _counter(progress: Progress | None, done: int, total: int | None, which: str) -> Callable[[int], None]:
    """Tells the progress of a pass that starts when `done` samples were measured in earlier ones."""
    return lambda samples: None if progress is None else progress(done + samples, total, which)


def _repeated(batch: Batch) -> dict[str, Any]:
    size = batch.valid + batch.padding
    return {name: np.repeat(array[-1:], size, axis=0) for name, array in batch.feeds.items()}


def _session(
    graph: MeasuringGraph,
    measured: Sequence[str],
    study: Study,
    behind: Mapping[int, BlockWeights],
    options: CalibrationOptions,
    link: Link,
    taken: Mapping[str, onnx.ValueInfoProto],
) -> ort.InferenceSession:
    """A session of a measuring graph that gives some tensors; the graph is emptied, as the session has all of it."""
    measuring = Model(graph.proto, study.view.model.path, dict(study.view.model.arrays))
    if behind:  # what measures lies behind the model's nodes, which keep their positions
        measuring = padded_twin(GraphView(measuring), study.facts, study.match.blocks, behind)
    else:
        cut(measuring.proto, link, measured, taken)
    try:
        return model_session(measuring, options.provider, threads=options.threads)
    finally:
        graph.proto.Clear()


def first_samples(study: Study, data: str | Path, options: CalibrationOptions) -> list[dict[str, NDArray[Any]]]:
    """The first few samples, one set of inputs, for a proof to run on.

    Args:
        study: the model.
        data: as for `sources.open_source`.
        options: how to read them.

    Raises:
        ToastError: its children say what is wrong with the data or an option.
    """
    inputs = held_inputs(study, graph_inputs(study.source))
    source, _ = open_samples(study, data, inputs, options)
    return [batch.feeds for batch in islice(batches(source, inputs, 2), 1)]


def open_samples(
    study: Study, data: str | Path, inputs: list[ModelInput], options: CalibrationOptions
) -> tuple[Source, list[str]]:
    """The samples as the options ask for them, and what the user should know of their preprocessing.

    Raises:
        DataError: the data cannot be read.
        ConfigError: the recipe is none.
    """
    model = study.source
    return open_prepared(
        model.path,
        data,
        inputs,
        options.preprocess,
        metadata={entry.key: entry.value for entry in model.proto.metadata_props},
        samples=options.samples,
        seed=options.seed,
        threads=options.threads,
        hold=options.hold,
        note=options.note,
    )


def open_measured(
    study: Study, data: str | Path, inputs: list[ModelInput], options: CalibrationOptions
) -> tuple[Source, list[str]]:
    """As `open_samples`, with the views that statistics are measured on, too.

    Raises:
        DataError: as there.
        ConfigError: as there; or the model has no classes that views could show.
    """
    source, notes = open_samples(study, data, inputs, options)
    return ViewedSource(source, study, inputs, options.views, options.seed) if options.views else source, notes
