"""Engines measured with trtexec: engines take turns, rounds are compared pair by pair."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from toast_onnx.engines import trtexec
from toast_onnx.engines.blocknames import node_scopes
from toast_onnx.engines.ortbench import profile_for
from toast_onnx.engines.profiles import Shape, ShapeRange, graph_inputs
from toast_onnx.engines.record import read_record, record_path
from toast_onnx.engines.trtexec_report import (
    QueryTimes,
    parse_layers,
    parse_profile,
    parse_summary,
    parse_times,
    summarise,
    time_by_block,
)
from toast_onnx.errors import ConfigError
from toast_onnx.model import load_model


@dataclass(frozen=True)
class Target:
    """An engine or an ONNX file, and what is known of its inputs.

    Attributes:
        path: the file.
        profile: shape range of each dynamic input.
        scopes: ONNX node name to module path, for grouping layers by block.
        backend: the backend that built it.
    """

    path: Path
    profile: Mapping[str, ShapeRange]
    scopes: Mapping[str, str] = field(default_factory=dict)
    backend: str = "tensorrt"

    def shapes(self, batch: int) -> dict[str, Shape]:
        """Shape of each dynamic input at a batch size.

        Raises:
            ConfigError: the batch lies outside what the engine was built for.
        """
        for name, shapes in self.profile.items():
            if not shapes.min[0] <= batch <= shapes.max[0]:
                raise ConfigError(
                    f"{self.path} was built for batches {shapes.min[0]} to {shapes.max[0]} of '{name}', not {batch}; "
                    "choose --batch within or build it again"
                )
        return {name: (batch, *shapes.opt[1:]) for name, shapes in self.profile.items()}


def open_target(path: Path, batches: Sequence[int], shapes: Mapping[str, Shape] | None = None) -> Target:
    """Read what is known of an engine from the JSON beside it, or of an ONNX file from its graph.

    Args:
        path: an engine, or a file that ends in `.onnx`.
        batches: the batch sizes that will be measured.
        shapes: full shapes of inputs with open dimensions other than the batch, or of an engine without a JSON.

    Raises:
        ConfigError: an engine that has no JSON and no `shapes`, or a batch size it cannot take.
        ModelError: the file cannot be read.
    """
    if path.suffix == ".onnx":
        model = load_model(path)
        dynamic = [spec for spec in graph_inputs(model.proto) if spec.is_dynamic]
        return Target(path, profile_for(dynamic, batches, shapes), node_scopes(model.proto))
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; check the path of the engine")
    record = read_record(path)
    if record is None or record.profile is None:
        if not shapes:
            raise ConfigError(
                f"{path} has no {record_path(path).name} beside it; give its inputs with --shape NAME=AxBxC"
            )
        anything = {name: ShapeRange((1, *s[1:]), s, (max(batches), *s[1:])) for name, s in shapes.items()}
        return Target(path, anything)
    profile = {name: ShapeRange(entry.min, entry.opt, entry.max) for name, entry in record.profile.items()}
    source = Path(record.model or "")
    scopes = node_scopes(load_model(source).proto) if source.is_file() else {}
    return Target(path, profile, scopes, record.backend or "tensorrt")


def common_backend(targets: Sequence[Target]) -> str:
    """The backend whose program runs all targets.

    Raises:
        ConfigError: they were built by different backends.
    """
    backends = {t.backend for t in targets if t.path.suffix != ".onnx"} or {"tensorrt"}
    if len(backends) > 1:
        raise ConfigError(
            "the engines were built by tensorrt and by tensorrt-rtx, whose programs differ; measure them apart"
        )
    return backends.pop()


def plan(
    program: trtexec.Trtexec, targets: Sequence[Target], batches: Sequence[int], settings: trtexec.BenchSettings
) -> list[list[str]]:
    """The commands of one round, one for each batch size and target.

    Raises:
        ConfigError: a batch size that an engine was not built for.
    """
    return [
        trtexec.command(program, target.path, target.shapes(batch), settings, target.profile)
        for batch in batches
        for target in targets
    ]


def measure(
    program: trtexec.Trtexec,
    targets: Sequence[Target],
    batches: Sequence[int],
    settings: trtexec.BenchSettings,
    *,
    rounds: int = 3,
    layers: bool = False,
    after_run: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Run trtexec on every target in turns.

    Args:
        program: trtexec as `trtexec.ask` describes it.
        targets: the first is the baseline of the others.
        batches: batch sizes.
        settings: how to measure; export files are put in a folder of their own.
        rounds: how often each target runs at each batch size.
        layers: measure each layer too, in the first round, and add `blocks`: milliseconds by transformer block.
        after_run: called after every run, for progress.

    Returns:
        Figures for each batch size and target: those of `summarise` over all rounds' queries, `speedup` and
        `speedup_quartiles` over the rounds' pairs, and the `command` of the first round.

    Raises:
        BackendError: a run failed or reported nothing.
        ConfigError: a batch size that an engine was not built for.
    """
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="toast-onnx-") as name:
        for batch in batches:
            runs: list[list[_Run]] = [[] for _ in targets]
            for number in range(rounds):
                for target, done in zip(targets, runs, strict=True):
                    done.append(_run(program, target, batch, settings, Path(name), layers and number == 0))
                    after_run()
            results.extend(_combine(t, batch, own, runs[0]) for t, own in zip(targets, runs, strict=True))
    return results


@dataclass(frozen=True)
class _Run:
    times: QueryTimes
    qps: float
    blocks: dict[str, float]
    words: list[str]


def _run(
    program: trtexec.Trtexec, target: Target, batch: int, settings: trtexec.BenchSettings, folder: Path, layers: bool
) -> _Run:
    times, profile, info = (folder / f"{kind}.json" for kind in ("times", "profile", "layers"))
    for file in (times, profile, info):
        file.unlink(missing_ok=True)
    settings = replace(settings, times=times)
    if layers:
        settings = replace(settings, profile=profile, layers=info)
    words = trtexec.command(program, target.path, target.shapes(batch), settings, target.profile)
    text = trtexec.run(words)
    blocks = {}
    if layers:
        blocks = time_by_block(parse_profile(_text(profile)), parse_layers(_text(info)), target.scopes)
    return _Run(parse_times(_text(times)), parse_summary(text)["qps"], blocks, words)


def _text(path: Path) -> str:
    """A file's text; empty where trtexec wrote none, which the parsers report."""
    return path.read_text() if path.is_file() else ""


def _combine(target: Target, batch: int, own: Sequence[_Run], first: Sequence[_Run]) -> dict[str, Any]:
    queries = QueryTimes(
        **{f.name: np.concatenate([getattr(r.times, f.name) for r in own]) for f in fields(QueryTimes)}
    )
    medians = np.array([np.median(r.times.compute) for r in own])
    ratios = np.array([np.median(r.times.compute) for r in first]) / medians
    q1, middle, q3 = (float(v) for v in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return {
        **summarise(target.path, batch, queries, float(np.median([r.qps for r in own]))),
        "rounds": len(own),
        "spread": float((medians.max() - medians.min()) / np.median(medians)),
        "speedup": middle,
        "speedup_quartiles": [q1, q3],
        "blocks": own[0].blocks,
        "command": own[0].words,
    }
