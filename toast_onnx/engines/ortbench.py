"""Latency under ONNX Runtime, measured so that two models can be compared on a machine that does other things too.

Models take turns: A B A B ... Whatever slows the machine for a second then slows neighbours alike, and the ratio of a
pair stays what it is. Medians and quartiles are reported, never means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from toast_onnx.engines.profiles import InputSpec, Shape, ShapeRange
from toast_onnx.engines.providers import open_session
from toast_onnx.errors import BackendError, ConfigError, ModelError
from toast_onnx.matching.batches import held_batches
from toast_onnx.model import load_model
from toast_onnx.providers import known_provider
from toast_onnx.runtime import NUMPY_TYPES


@dataclass(frozen=True)
class Timing:
    """Latency of one model at one batch size.

    Attributes:
        model: the model's path as it was given.
        batch: items in one call.
        seconds: (rounds,) latency of each round, in order.
        baseline: (rounds,) latency of the first model in the same rounds.
    """

    model: str
    batch: int
    seconds: np.ndarray
    baseline: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Medians, quartiles, throughput, and the speed-up over the first model, pair by pair.

        `spread` is the distance between the quartiles over the median; `speedup` is the median of the rounds' ratios
        and `speedup_quartiles` their quartiles.
        """
        q1, median, q3 = (float(v) for v in np.quantile(self.seconds, (0.25, 0.5, 0.75)))
        ratios = np.quantile(self.baseline / self.seconds, (0.25, 0.5, 0.75))
        return {
            "model": self.model,
            "batch": self.batch,
            "rounds": len(self.seconds),
            "median_ms": median * 1e3,
            "min_ms": float(self.seconds.min()) * 1e3,
            "p90_ms": float(np.quantile(self.seconds, 0.9)) * 1e3,
            "spread": (q3 - q1) / median,
            "images_per_second": self.batch / median,
            "speedup": float(ratios[1]),
            "speedup_quartiles": [float(ratios[0]), float(ratios[2])],
        }


def interleave(
    runs: Sequence[Callable[[], object]],
    *,
    warmup: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Time callables in turns: every round calls each of them once, in order.

    Args:
        runs: what to time; a call returns when its work is done.
        warmup: untimed rounds first.
        rounds: timed rounds.
        clock: seconds, monotonic.
        after_round: called after each round, warm-up included.

    Returns:
        (len(runs), rounds) seconds.
    """
    seconds = np.empty((len(runs), rounds))
    for number in range(-warmup, rounds):
        for index, run in enumerate(runs):
            started = clock()
            run()
            if number >= 0:
                seconds[index, number] = clock() - started
        after_round()
    return seconds


def session_inputs(session: Any) -> list[InputSpec]:
    """The inputs of an ONNX Runtime session, so that `.ort` files need no ONNX graph.

    Raises:
        BackendError: an input of a type that cannot be made up.
    """
    specs = []
    for value in session.get_inputs():
        if value.type not in NUMPY_TYPES:
            raise BackendError(f"input '{value.name}' has type {value.type}, which bench cannot make up")
        dims = tuple(d if isinstance(d, int) and d > 0 else None for d in value.shape)
        symbols = tuple(str(d) if d else "?" for d in value.shape)
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(NUMPY_TYPES[value.type]))
        specs.append(InputSpec(value.name, dims, symbols, elem_type))
    return specs


def shapes_at(inputs: Sequence[InputSpec], batch: int, shapes: Mapping[str, Shape] | None = None) -> dict[str, Shape]:
    """Shape of every input at a batch size.

    Args:
        inputs: the graph's inputs.
        batch: size of an open first dimension.
        shapes: full shapes of inputs with further open dimensions; their first entry gives way to the batch.

    Raises:
        ConfigError: a fixed batch that differs, or an open dimension that nothing gives a size.
    """
    result: dict[str, Shape] = {}
    for spec in inputs:
        given = (shapes or {}).get(spec.name)
        if spec.dims and spec.dims[0] is not None and spec.dims[0] != batch:
            raise ConfigError(
                f"input '{spec.name}' has a fixed batch of {spec.dims[0]}; use --batch {spec.dims[0]} or export the "
                "model with a dynamic batch"
            )
        if given is not None and len(given) != len(spec.dims):
            raise ConfigError(f"shape of input '{spec.name}' has {len(given)} dimensions, not {len(spec.dims)}")
        sizes = [batch if axis == 0 else size for axis, size in enumerate(spec.dims)]
        if given is not None:
            sizes = [given[axis] if size is None else size for axis, size in enumerate(sizes)]
        if None in sizes:
            raise ConfigError(
                f"input '{spec.name}' ({spec.describe()}) has open dimensions; give --shape {spec.name}=AxBxC"
            )
        result[spec.name] = tuple(size for size in sizes if size is not None)
    return result


def made_up_feeds(inputs: Sequence[InputSpec], shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays to feed: standard normal for floats; ones for integers and booleans, valid as ids and as masks."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in inputs:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(spec.elem_type)
        shape = shapes[spec.name]
        floats = np.issubdtype(dtype, np.floating)
        feeds[spec.name] = (rng.standard_normal(shape) if floats else np.ones(shape)).astype(dtype)
    return feeds


def benchmark(
    models: Sequence[Path],
    batches: Sequence[int],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    warmup: int = 5,
    rounds: int = 30,
    shapes: Mapping[str, Shape] | None = None,
    after_round: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """Latency of models under ONNX Runtime, in turns, from host memory to host memory.

    Args:
        models: the first is the baseline of the others.
        batches: batch sizes, measured one after another.
        provider: see `open_session`.
        threads: threads inside one operator.
        warmup: untimed rounds at each batch size.
        rounds: timed rounds at each batch size.
        shapes: full shapes of inputs with open dimensions other than the batch.
        after_round: called after every round, for progress.

    Returns:
        One timing for each batch size and model.

    Raises:
        BackendError: the provider does not work here, or a model does not run.
        ModelError: a model does not load.
        ConfigError: an unknown provider, or a batch size or shape a model cannot take.
    """
    sessions = []
    one_engine = known_provider(provider).shape_prefix is not None
    for path in models:
        inputs = session_inputs(open_session(path, "cpu", 1)) if one_engine else None
        profile = None if inputs is None else profile_for(inputs, batches, shapes)
        sessions.append(open_session(path, provider, threads, profile))
    specs = [session_inputs(session) for session in sessions]
    results: list[Timing] = []
    for batch in batches:
        feeds = [made_up_feeds(spec, shapes_at(spec, batch, shapes)) for spec in specs]
        runs = [_runner(s, f, p) for s, f, p in zip(sessions, feeds, models, strict=True)]
        seconds = interleave(runs, warmup=warmup, rounds=rounds, after_round=after_round)
        results.extend(Timing(str(p), batch, seconds[i], seconds[0]) for i, p in enumerate(models))
    return results


def profile_for(
    inputs: Sequence[InputSpec], batches: Sequence[int], shapes: Mapping[str, Shape] | None
) -> dict[str, ShapeRange]:
    """Shape range of every input for runs at these batch sizes, best at the largest; as for `shapes_at`."""
    low, high = (shapes_at(inputs, pick(batches), shapes) for pick in (min, max))
    return {spec.name: ShapeRange(low[spec.name], high[spec.name], high[spec.name]) for spec in inputs}


def _runner(session: Any, feeds: dict[str, np.ndarray], path: Path) -> Callable[[], object]:
    def run() -> object:
        try:
            return session.run(None, feeds)
        except Exception as e:
            said = f"ONNX Runtime could not run {path}: {' '.join(str(e).split())[:300]}"
            raise BackendError(said + _held_inside(path)) from e

    return run


def _held_inside(path: Path) -> str:
    """What to do where a graph holds a batch that it declares as symbolic; nothing to say elsewhere."""
    try:
        held = held_batches(load_model(path))
    except ModelError:
        return ""
    size = next(iter(held.values()), None)
    return "" if size is None else f"; the graph holds a batch of {size} inside: use --batch {size}"
