"""Measuring a latency table: variants with one part at another width, or with tokens merged, timed against dense.

Latency does not depend on the values of weights, so variants keep whatever channels rank first by magnitude; no data
are read.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import ClassVar

import numpy as np

from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import BackendError, MatchError
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study
from toast_onnx.matching.study import study as study_of
from toast_onnx.model import Model, file_hash, load_model, model_files, save_model
from toast_onnx.planning.cost_table import CostTable, MergedTime, PartTimes, alike, table_widths
from toast_onnx.planning.merged_macs import MergedMacs
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import Ratios, parse_ratios
from toast_onnx.planning.schema import Align, plain
from toast_onnx.planning.search import Kept
from toast_onnx.planning.surface import within
from toast_onnx.planning.width_costs import TOKENS, Part, dense_widths, prunable_widths, width_cost, width_step
from toast_onnx.pruning import prune
from toast_onnx.tokens.points import study_tokens
from toast_onnx.tokens.schedule import exact_shares
from toast_onnx_calibration.executing import Executor, Find, Here, Report

#: Variants timed in turns with the dense model; all their sessions are open together.
GROUP = 4
#: Magnitudes alone: no statistics, no solving.
PLAIN = {
    "version": 1,
    "attention": {"select": "index", "score": "l2"},
    "ffn": {"score": "l2"},
    "align": 1,
    "compensation": {"kind": "none"},
}
#: Merged models that are timed: how far on the way from most merging to none, in multiply-accumulates.
MERGED_WAYS = (0.75, 0.5, 0.25, 0.05)
Timer = Callable[[Sequence[Path]], list[float]]
"""Latencies in milliseconds of some models, measured in turns; the first is the dense one."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Runtime:
    """What latencies are measured with.

    Attributes:
        timer: times model files.
        description: program, version, provider, threads, machine.
        batch: items in one call.
        again: makes the same on another machine; None where that is not to be had.
    """

    timer: Timer
    description: dict[str, str]
    batch: int
    again: Callable[[], Runtime] | None = None


def onnxruntime_runtime(
    batch: int = 1,
    threads: int | None = None,
    provider: str = "cpu",
    rounds: int = 15,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Runtime:
    """Latency under ONNX Runtime on this machine.

    Args:
        batch: items in one call.
        threads: threads inside one operator; None is one a core.
        provider: as for `toast-onnx bench`.
        rounds: timed rounds.
        shapes: full shapes of inputs with open axes other than the batch.
    """
    from toast_onnx.engines.ortbench import benchmark
    from toast_onnx.ort import ort

    def timer(models: Sequence[Path]) -> list[float]:
        timings = benchmark(models, [batch], provider=provider, threads=threads, warmup=2, rounds=rounds, shapes=shapes)
        dense = float(timings[0].summary()["median_ms"])
        return [dense, *(dense / t.summary()["speedup"] for t in timings[1:])]

    described = {
        "program": "onnxruntime",
        "version": ort.__version__,
        "provider": provider,
        "threads": str(threads or "one a core"),
        "machine": platform.processor() or platform.machine(),
    }
    again = partial(onnxruntime_runtime, batch, threads, provider, rounds, shapes)
    return Runtime(timer, described, batch, again)


def trtexec_runtime(
    batch: int = 1,
    path: str | None = None,
    rounds: int = 3,
    duration: float = 3.0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Runtime:
    """Latency of engines that trtexec builds from the models; needs trtexec and a GPU.

    Args:
        batch: items in one call.
        path: of trtexec; PATH and NVIDIA's usual places otherwise.
        rounds: runs of each model.
        duration: seconds a run.
        shapes: full shapes of inputs with open axes other than the batch.

    Raises:
        BackendError: trtexec is not here.
    """
    from toast_onnx.engines import cuda, trtbench, trtexec

    found = trtexec.find_trtexec("tensorrt", path)
    if found is None:
        raise BackendError("trtexec was not found; give --trtexec PATH, or measure with --runtime onnxruntime")
    program = trtexec.ask(found)
    settings = trtexec.BenchSettings(duration=duration)

    def timer(models: Sequence[Path]) -> list[float]:
        targets = [trtbench.open_target(model, [batch], shapes) for model in models]
        results = trtbench.measure(program, targets, [batch], settings, rounds=rounds)
        dense = float(results[0]["median_ms"])
        return [dense, *(dense / float(r["speedup"]) for r in results[1:])]

    described = {
        "program": "trtexec",
        "version": ".".join(map(str, program.version)),
        "provider": "tensorrt",
        "machine": cuda.gpu_name() or "unknown GPU",
    }
    return Runtime(timer, described, batch, partial(trtexec_runtime, batch, path, rounds, duration, shapes))


@dataclass(frozen=True)
class TimingOrder:
    """Timing as it is sent to machines.

    Attributes:
        model: file of the dense model.
        given: the concrete shapes that were asked for.
        runtime: makes what latencies are measured with.
        provider: as for `toast-onnx bench`.
    """

    model: Path
    given: Mapping[str, Sequence[int]]
    runtime: Callable[[], Runtime]
    provider: str
    threads: ClassVar[int] = 0
    solver: ClassVar[str] = "cpu"

    @property
    def files(self) -> tuple[tuple[Path, ...], ...]:
        """The model."""
        return (tuple(model_files(self.model)),)

    @contextmanager
    def open(self, find: Find, _folder: Path) -> Iterator[Timing]:
        """The same on a machine of its own."""
        yield Timing(study_of(load_model(find(self.model)), self.given), self.runtime())


@dataclass(frozen=True)
class Timing:
    """Variants timed in turns with the dense model.

    Attributes:
        study: the dense model.
        runtime: what to measure with.
    """

    study: Study
    runtime: Runtime

    def do(self, task: Sequence[_Width | _Merged], _report: Report) -> tuple[dict[str, str], list[float]]:
        """What was measured with, and the latencies of the dense model and of some variants."""
        with tempfile.TemporaryDirectory(prefix="toast-costs-") as name:
            paths = [self.study.view.model.path]
            for each in task:
                path = Path(name) / f"{len(paths)}.onnx"
                save_model(each.model(self.study), path, check=False)
                paths.append(path)
            return self.runtime.description, self.runtime.timer(paths)

    def order(self) -> TimingOrder:
        """What another machine opens the same from."""
        assert self.runtime.again is not None
        path = self.study.view.model.path.absolute()
        return TimingOrder(path, self.study.given, self.runtime.again, self.runtime.description["provider"])


def measure_costs(
    study: Study,
    runtime: Runtime,
    parts: Sequence[str] = (TOKENS, "heads", "qk", "vo", "fc2"),
    align: Align | None = None,
    most: int = 24,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> CostTable:
    """Time the model at every width of every part, blocks of the same shape changed together, and with tokens merged.

    Args:
        study: the dense model.
        runtime: what to measure with.
        parts: what a plan may prune: tokens, heads, qk, vo, fc1, fc2.
        align: the multiples that widths are.
        most: widths a part at most; more are thinned out evenly.
        progress: called after every group of variants.
        executor: whose machines time, each alone and all of the same kind; None for this process.

    Raises:
        BackendError: machines differ.
        MatchError: there is nothing to prune, or the alignment leaves no smaller width.
    """
    steps = align or Align()
    blocks = study.match.blocks
    groups = alike(blocks, {b.index: width_cost(study.view, study.counted, b, "macs") for b in blocks})
    wanted: list[_Width | _Merged] = []
    for members in groups:
        for part, dense in prunable_widths(blocks[members[0]]).items():
            if part in parts:
                step = width_step(blocks[members[0]], part, steps)
                wanted += [_Width(members, part, kept) for kept in table_widths(dense, step, most)]
    if TOKENS in parts:
        wanted += _merged_variants(study)
    if not wanted:
        raise MatchError(no_smaller_width(blocks, parts, steps) or "a table needs at least one width a part")
    times: dict[_Width | _Merged, float] = {}
    baselines: list[float] = []
    groups_of = list(_groups(wanted))
    with (executor or Here()).open(Timing(study, runtime)) as pool:
        for number, (described, (base, *others)) in pool.do(groups_of):
            batch = groups_of[number]
            if described != runtime.description:
                raise BackendError(
                    f"times on {described} cannot be held against those on {runtime.description}; time on machines of "
                    "one kind"
                )
            baselines.append(base)
            # As a share of the dense model in the same rounds: the machine's speed drifts between groups.
            times |= {each: milliseconds / base for each, milliseconds in zip(batch, others, strict=True)}
            if progress is not None:
                progress(len(times), len(wanted), batch[-1].label)
    times = {each: times[each] for each in wanted}  # in one order, whichever was done first
    typical = median(baselines)
    path = study.view.model.path
    return CostTable(
        model=path.name,
        model_sha256=file_hash(path),
        runtime=runtime.description,
        batch=runtime.batch,
        dense_milliseconds=typical,
        parts=_part_times(blocks, {w: share * typical for w, share in times.items() if isinstance(w, _Width)}),
        merged=tuple(
            MergedTime(removed=dict(w.removed), macs_share=w.macs_share, milliseconds=share * typical)
            for w, share in times.items()
            if isinstance(w, _Merged)
        ),
    )


@dataclass(frozen=True)
class _Width:
    """One part of a group of blocks at one kept count."""

    blocks: tuple[int, ...]
    part: Part
    kept: int

    @property
    def label(self) -> str:
        return f"{self.part} {self.kept}"

    def model(self, study: Study) -> Model:
        return variant(study, {index: {self.part: self.kept} for index in self.blocks})


@dataclass(frozen=True)
class _Merged:
    """Tokens merged behind some blocks."""

    removed: tuple[tuple[int, int], ...]
    macs_share: float

    @property
    def label(self) -> str:
        return f"tokens, {self.macs_share:.2f} of the MACs"

    def model(self, study: Study) -> Model:
        return variant(study, {}, dict(self.removed))


def _part_times(blocks: Sequence[Block], times: Mapping[_Width, float]) -> tuple[PartTimes, ...]:
    """Milliseconds by group of blocks, part and width."""
    found: dict[tuple[tuple[int, ...], Part], dict[int, float]] = {}
    for width, milliseconds in times.items():
        found.setdefault((width.blocks, width.part), {})[width.kept] = milliseconds
    return tuple(
        PartTimes(
            blocks=members,
            part=part,
            dense=prunable_widths(blocks[members[0]])[part],
            milliseconds=dict(sorted(known.items())),
        )
        for (members, part), known in found.items()
    )


def _merged_variants(study: Study) -> list[_Merged]:
    """Models with an equal share of the tokens gone at every merge, from little to much."""
    tokens = study_tokens(study)
    if not tokens.mergeable:
        return []
    macs = MergedMacs(study, tokens, "auto")
    if not macs.blocks:
        return []
    found: dict[float, _Merged] = {}
    for way in MERGED_WAYS:
        aim = macs.least + way * (1 - macs.least)
        shares = within(np.full(len(macs.blocks), 0.05), lambda x: macs.smooth(x) / macs.dense, aim)
        if shares is not None and (removed := macs.whole(shares)):
            share = macs.total(removed) / macs.dense
            found[share] = _Merged(tuple(sorted(removed.items())), share)
    return list(found.values()) if len(found) > 1 else []


def no_smaller_width(blocks: Sequence[Block], parts: Sequence[str], align: Align) -> str | None:
    """Why no part of any block has a width below its dense one; None where one has.

    Args:
        blocks: of the dense model.
        parts: heads, qk, vo, fc1, fc2: what may shrink.
        align: the multiples that widths are.
    """
    present = {
        (part, width, width_step(block, part, align))
        for block in blocks
        for part, width in prunable_widths(block).items()
        if part in parts
    }
    if not present:
        return f"no block has a prunable part among {', '.join(parts)}; see `toast-onnx inspect` for the reasons"
    if any(step < width for _, width, step in present):
        return None
    found = ", ".join(f"{part} is {width} wide in steps of {step}" for part, width, step in sorted(present))
    return f"the alignment leaves no width below the dense ones ({found}); lower it"


def variant(
    study: Study, kept: Kept, removed: Mapping[int, int] | None = None, settings: Ratios | None = None
) -> Model:
    """The model at some kept counts, with weights that are good for timing only.

    Args:
        study: the dense model.
        kept: block number -> part -> kept count.
        removed: block number -> tokens merged away behind its attention.
        settings: whose way of merging tokens is taken; None for the default.
    """
    dense = [dense_widths(block) for block in study.match.blocks]
    merge = exact_shares(study_tokens(study), removed) if removed else ()
    tokens = {} if settings is None else {"tokens": plain(settings.tokens, given_only=True)}
    ratios = planned_ratios(parse_ratios(PLAIN | tokens), kept, dense, merge)
    return prune(study, ratios, SyntheticStatistics(study), check=False).model


def _groups(wanted: Sequence[_Width | _Merged]) -> Iterator[list[_Width | _Merged]]:
    for start in range(0, len(wanted), GROUP):
        yield list(wanted[start : start + GROUP])
