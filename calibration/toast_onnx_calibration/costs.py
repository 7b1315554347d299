"""Measuring a latency table: variants of the model with one part at another width, timed against the dense model.

Latency does not depend on the values of weights, so variants keep whatever channels rank first by magnitude; no data
are read.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import BackendError, MatchError
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, file_hash, save_model
from toast_onnx.planning.cost_table import CostTable, PartTimes, alike, table_widths
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.planning.schema import Align
from toast_onnx.planning.search import Kept
from toast_onnx.planning.width_costs import Part, dense_widths, prunable_widths, width_cost, width_step
from toast_onnx.pruning import prune

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
    """

    timer: Timer
    description: dict[str, str]
    batch: int


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
    return Runtime(timer, described, batch)


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
    return Runtime(timer, described, batch)


def measure_costs(
    study: Study,
    runtime: Runtime,
    parts: Sequence[Part] = ("heads", "qk", "vo", "fc2"),
    align: Align | None = None,
    most: int = 24,
    progress: Progress | None = None,
) -> CostTable:
    """Time the model at every width of every part, blocks of the same shape changed together.

    Args:
        study: the dense model.
        runtime: what to measure with.
        parts: what a plan may prune.
        align: the multiples that widths are.
        most: widths a part at most; more are thinned out evenly.
        progress: called after every group of variants.

    Raises:
        MatchError: there is nothing to prune, or the alignment leaves no smaller width.
    """
    steps = align or Align()
    blocks = study.match.blocks
    groups = alike(blocks, {b.index: width_cost(study.view, study.counted, b, "macs") for b in blocks})
    wanted: list[tuple[tuple[int, ...], Part, int]] = []
    for members in groups:
        for part, dense in prunable_widths(blocks[members[0]]).items():
            if part in parts:
                step = width_step(blocks[members[0]], part, steps)
                wanted += [(members, part, kept) for kept in table_widths(dense, step, most)]
    if not wanted:
        raise MatchError(no_smaller_width(blocks, parts, steps) or "a table needs at least one width a part")
    times: dict[tuple[tuple[int, ...], Part], dict[int, float]] = {}
    baselines: list[float] = []
    done = 0
    with tempfile.TemporaryDirectory(prefix="toast-costs-") as name:
        for batch in _groups(wanted):
            paths = [study.view.model.path]
            for members, part, kept in batch:
                path = Path(name) / f"{len(paths)}.onnx"
                save_model(variant(study, {index: {part: kept} for index in members}), path, check=False)
                paths.append(path)
            base, *others = runtime.timer(paths)
            baselines.append(base)
            for (members, part, kept), milliseconds in zip(batch, others, strict=True):
                # As a share of the dense model in the same rounds: the machine's speed drifts between groups.
                times.setdefault((members, part), {})[kept] = milliseconds / base
            done += len(batch)
            if progress is not None:
                progress(done, len(wanted), f"{batch[-1][1]} {batch[-1][2]}")
    typical = median(baselines)
    path = study.view.model.path
    entries = tuple(
        PartTimes(
            blocks=members,
            part=part,
            dense=prunable_widths(blocks[members[0]])[part],
            milliseconds={kept: share * typical for kept, share in sorted(shares.items())},
        )
        for (members, part), shares in times.items()
    )
    return CostTable(
        model=path.name,
        model_sha256=file_hash(path),
        runtime=runtime.description,
        batch=runtime.batch,
        dense_milliseconds=typical,
        parts=entries,
    )


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


def variant(study: Study, kept: Kept) -> Model:
    """The model at some kept counts, with weights that are good for timing only."""
    dense = [dense_widths(block) for block in study.match.blocks]
    ratios = planned_ratios(parse_ratios(PLAIN), kept, dense)
    return prune(study, ratios, SyntheticStatistics(study), check=False).model


def _groups(wanted: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(wanted), GROUP):
        yield list(wanted[start : start + GROUP])
