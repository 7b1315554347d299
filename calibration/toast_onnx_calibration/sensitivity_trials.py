"""What breaks first: damage at the output when one part of one block is pruned, for every block, part and ratio.

Tokens merged behind the attention of one block count as a part of that block.

Results go to a file after every trial. A run that finds its own unfinished file goes on where that one stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from toast_onnx.choosing.at_once import blocks_at_once
from toast_onnx.choosing.blocks import Widths, solve_block
from toast_onnx.errors import ConfigError, DataError
from toast_onnx.files import write_bytes
from toast_onnx.importance.statistics import Statistics
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, file_hash
from toast_onnx.planning.planned import selection_only
from toast_onnx.planning.ratios import Ratios, resolve
from toast_onnx.planning.search import Kept
from toast_onnx.planning.strict_json import read_json
from toast_onnx.planning.width_costs import TOKENS, Part, prunable_widths, width_step
from toast_onnx.planning.widths import kept_count
from toast_onnx.report.tables import Shown, Side, Table
from toast_onnx.solving.weights import BlockWeights
from toast_onnx.threads import shared_work
from toast_onnx.tokens.nodes import Merge
from toast_onnx.tokens.points import TokenStudy, study_tokens
from toast_onnx.tokens.rewrite import write_merging
from toast_onnx_calibration.sensitivity_stream import Trials
from toast_onnx_calibration.statistics import CalibratedStatistics

FORMAT = "toast-onnx/sensitivity/1"
#: What a trial may prune: tokens, one part, or both sides of the feed-forward network.
TRIAL_PARTS: dict[str, tuple[str, ...]] = {
    TOKENS: (TOKENS,),
    "heads": ("heads",),
    "qk": ("qk",),
    "vo": ("vo",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
    "fc1+fc2": ("fc1", "fc2"),
}
Progress = Callable[[int, int, str, float | None], None]
"""Called with the trials done, their number, what was done last, and the seconds that are left where they are known."""


@dataclass(frozen=True)
class Trial:
    """One part of one block pruned, all else dense.

    Attributes:
        block: number of the block.
        part: a key of `TRIAL_PARTS`.
        ratio: fraction removed that was asked for.
        kept: part -> kept count.
        damage: measure -> value, as `Trials.damage` gives them; empty before it is measured.
    """

    block: int
    part: str
    ratio: float
    kept: dict[str, int]
    damage: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, str, tuple[tuple[str, int], ...]]:
        """What makes two trials the same: two ratios may keep the same counts."""
        return self.block, self.part, tuple(sorted(self.kept.items()))


@dataclass(repr=False)
class Sensitivity(Shown):
    """Trials measured on one model, one set of samples and one way of pruning.

    Attributes:
        identity: model, data, statistics, settings and output; results of different ones do not mix.
        metric: the measure that adds up over blocks, `kl` or `relative_error` (squared, it adds up).
        dense_top1: top-1 of the dense model, None without labels.
        trials: what was measured.
    """

    identity: dict[str, Any]
    metric: str
    dense_top1: float | None = None
    trials: list[Trial] = field(default_factory=list)

    def to_document(self) -> dict[str, Any]:
        """Plain data, as the file holds it."""
        return {
            "format": FORMAT,
            **self.identity,
            "metric": self.metric,
            "dense_top1": self.dense_top1,
            "trials": [asdict(t) for t in sorted(self.trials, key=_order)],
        }

    def report(self) -> dict[str, Any]:
        """Plain data, as the file holds it."""
        return self.to_document()

    def save(self, path: str | Path) -> None:
        """Write the results whole or not at all.

        Raises:
            ModelError: they cannot be written.
        """
        write_results(self, Path(path))

    @property
    def table(self) -> Table:
        """Damage of every part of every block by fraction removed."""
        columns = sorted({t.ratio for t in self.trials})
        rows = []
        for block, part in dict.fromkeys((t.block, t.part) for t in sorted(self.trials, key=lambda t: t.block)):
            cells = {t.ratio: t.damage[self.metric] for t in self.trials if (t.block, t.part) == (block, part)}
            rows.append([str(block), part, *(f"{cells[r]:.3g}" if r in cells else "" for r in columns)])
        what = "KL in nats" if self.metric == "kl" else "relative error"
        samples = self.identity["trial_samples"]
        sides: list[Side] = ["right", "left", *(["right"] * len(columns))]  # type: ignore[list-item]
        title = f"{what} at the output by fraction removed, {samples} samples"
        return Table(title, ["block", "part", *(f"{r:g}" for r in columns)], rows, sides)

    def measured(self, block: int, part: Part) -> dict[int, float]:
        """Kept count -> damage that adds up, of the trials of one part."""
        power = 1 if self.metric == "kl" else 2
        return {
            t.kept[part]: t.damage[self.metric] ** power for t in self.trials if t.block == block and t.part == part
        }


def trial_grid(
    study: Study, settings: Ratios, parts: Sequence[str], ratios: Sequence[float], blocks: Iterable[int] | None = None
) -> list[Trial]:
    """The trials of a study, block by block; ratios that keep everything or repeat a count are left out.

    Args:
        study: the model.
        settings: alignment.
        parts: keys of `TRIAL_PARTS`.
        ratios: fractions removed.
        blocks: numbers of blocks; None takes all.
    """
    wanted = None if blocks is None else set(blocks)
    tokens = study_tokens(study) if TOKENS in parts else None
    found: dict[Any, Trial] = {}
    for block in study.match.blocks:
        if wanted is not None and block.index not in wanted:
            continue
        widths = prunable_widths(block)
        for part in parts:
            for ratio in sorted(ratios):
                if part == TOKENS:
                    assert tokens is not None
                    kept = _tokens_left(tokens, block.index, ratio)
                else:
                    kept = _widths_left(block, TRIAL_PARTS[part], widths, ratio, settings)
                if kept:
                    trial = Trial(block.index, part, ratio, kept)
                    found.setdefault(trial.key, trial)
    return list(found.values())


def _widths_left(
    block: Block, parts: Sequence[str], widths: Mapping[Part, int], ratio: float, settings: Ratios
) -> dict[str, int]:
    """Part -> kept count; empty where a part cannot be pruned, or nothing goes at this ratio."""
    known = {p: width for p, width in widths.items() if p in parts}
    kept = {p: kept_count(w, Decimal(repr(ratio)), width_step(block, p, settings.align)) for p, w in known.items()}
    smaller = len(known) == len(parts) and any(kept[p] < known[p] for p in kept)
    return {str(p): count for p, count in kept.items()} if smaller else {}


def _tokens_left(tokens: TokenStudy, block: int, ratio: float) -> dict[str, int]:
    """Tokens left behind a block where it alone merges, at most half of those that may; empty where it cannot."""
    point = tokens.points[block]
    if point.reason is not None:
        return {}
    sequence = tokens.sequences[point.sequence]
    most = Merge(sequence.count, 0, sequence.front, sequence.back).sources
    removed = min(round(ratio * sequence.count), most)
    return {TOKENS: sequence.count - removed} if removed else {}


def merged_alone(study: Study, settings: Ratios, block: int, left: int) -> Model:
    """The model with tokens merged behind one block and nothing else changed.

    Args:
        study: the model.
        settings: metric, and whether unread tokens are dropped.
        block: number of the block.
        left: tokens behind it.
    """
    tokens = study_tokens(study)
    gone = tokens.sequences[tokens.points[block].sequence].count - left
    return merged(study, settings, {block: gone})


def merged(study: Study, settings: Ratios, removed: Mapping[int, int]) -> Model:
    """The model with tokens merged and nothing else changed.

    Args:
        study: the model.
        settings: metric, and whether unread tokens are dropped.
        removed: block number -> tokens merged away behind its attention.
    """
    return write_merging(study, study_tokens(study), removed, settings.tokens.metric, settings.tokens.unread)[0]


class Solver:
    """New weights for kept counts, with one selection and compensation."""

    def __init__(self, study: Study, settings: Ratios, statistics: Statistics, threads: int | None = None) -> None:
        blocks = study.match.blocks
        self.study, self.ratios, self.statistics, self.threads = study, settings, statistics, threads
        self.settings = resolve(settings, [b.name for b in blocks], [b.node_names for b in blocks])

    def weights(self, kept: Kept) -> dict[int, BlockWeights]:
        """Block number -> new weights, for the blocks that change."""

        def solve(item: tuple[int, dict[Part, int]]) -> tuple[int, BlockWeights | None]:
            index, widths = item
            block = self.study.match.blocks[index]
            dense = prunable_widths(block)
            smaller = Widths(**{part: count for part, count in widths.items() if count < dense[part]})
            return index, solve_block(self.study, block, smaller, self.settings[index], self.ratios, self.statistics)

        solved = shared_work(solve, sorted(kept.items()), self.threads, blocks_at_once(self.study))
        return {index: new for index, new in solved if new is not None}


def identity_of(
    study: Study, trials: Trials, samples: int, settings: Ratios, statistics: CalibratedStatistics | None
) -> dict[str, Any]:
    """What results belong to.

    Args:
        study: the model.
        trials: what runs them.
        samples: how many there are, of which trials may run the first ones.
        settings: how parts are pruned.
        statistics: of the dense model; None where only tokens are merged.
    """
    path = study.view.model.path
    stated = {} if statistics is None else statistics.to_document()
    measured = {k: v for k, v in stated.items() if k not in ("source", "data", "notes")}
    source = trials.samples.source
    document = selection_only(settings).to_document()
    document["attention"]["tie"] = False  # one part is tried at a time
    for key in ("steps", "views"):  # nothing is trained
        del document["compensation"][key]
    return {
        "model": {"file": path.name, "sha256": file_hash(path)},
        "data": {
            "source": source.description,
            "fingerprint": source.fingerprint,
            "preprocessing": source.recipe.model_dump(mode="json") if source.recipe else None,
            "samples": samples,
        },
        "trial_samples": len(trials.samples.rows),
        "statistics": measured,
        "settings": {key: document[key] for key in ("attention", "ffn", "align", "compensation")}
        | ({"blocks": document["blocks"]} if document.get("blocks") else {}),
        "output": trials.output,
    }


def missing(grid: Sequence[Trial], found: Sensitivity) -> list[Trial]:
    """The trials of a grid that were not measured yet, in the order of their blocks."""
    done = {t.key for t in found.trials}
    return [t for t in sorted(grid, key=lambda t: t.block) if t.key not in done]


Damages = Callable[[Sequence[Trial]], Iterable[tuple[Trial, dict[str, float]]]]
"""Measures trials; every trial with its damage, in whatever order they are done."""


def in_turn(damage: Callable[[Trial], dict[str, float]]) -> Damages:
    """Measures trials one after another."""
    return lambda trials: ((trial, damage(trial)) for trial in trials)


def measure(
    damages: Damages,
    grid: Sequence[Trial],
    found: Sensitivity,
    path: Path | None = None,
    progress: Progress | None = None,
    remaining: Callable[[list[Trial]], float | None] = lambda _: None,
) -> Sensitivity:
    """Measure what is missing of a grid.

    Args:
        damages: makes what trials say and measures it.
        grid: what to measure.
        found: results so far; the new ones are added.
        path: file that is written after every trial; None writes none.
        progress: called after every trial.
        remaining: seconds that trials will take.
    """
    left = missing(grid, found)
    ahead = {trial.key: trial for trial in left}
    for number, (trial, damage) in enumerate(damages(left), start=1):
        found.trials.append(replace(trial, damage=damage))
        if path is not None:
            write_results(found, path)
        if progress is not None:
            del ahead[trial.key]
            note = f"block {trial.block} {trial.part} {trial.ratio:g}"
            progress(number, len(left), note, remaining(list(ahead.values())))
    return found


def write_results(found: Sensitivity, path: Path) -> None:
    """Write results whole or not at all."""
    write_bytes(path, (json.dumps(found.to_document(), indent=1) + "\n").encode())


def resume(path: Path | None, identity: dict[str, Any], metric: str, dense_top1: float | None) -> Sensitivity:
    """Results of an earlier run of the same work, or none yet.

    Args:
        path: file of results; may be missing.
        identity: of the present run.
        metric: of the present run.
        dense_top1: of the present run.

    Raises:
        ConfigError: the file's results are of another model, other data or other settings.
        DataError: the file is damaged, or no results file.
    """
    fresh = Sensitivity(json.loads(json.dumps(identity)), metric, dense_top1)
    if path is None or not path.exists():
        return fresh
    document = read_results(path)
    document["trial_samples"] = _tried(document)
    for key, value in fresh.identity.items():
        if _comparable(document.get(key)) != _comparable(value):
            raise ConfigError(f"{path}: {_difference(key, document.get(key), value)}")
    if document["metric"] != metric or (document["dense_top1"] is None) != (dense_top1 is None):
        raise ConfigError(f"{path}: its results were measured with other labels; remove the file or choose another")
    return Sensitivity(fresh.identity, metric, dense_top1, [Trial(**t) for t in document["trials"]])


def _difference(key: str, found: object, now: object) -> str:
    """What keeps a file of results from being gone on with, and what to do."""
    if key == "trial_samples":
        what = f"its trials ran on {found} samples each, and these would run on {now}"
        what += f"; plan with --trial-samples {found}"
    else:
        what = f"its results were measured with another {key}; give the same again"
    return f"{what}, remove the file, or name another one"


def known(path: Path | None) -> Sensitivity:
    """The trials that a file of results holds, whatever they were measured on; none where there is no file.

    Raises:
        DataError: the file is damaged, or no results file.
    """
    if path is None or not path.exists():
        return Sensitivity({}, "kl")
    document = read_results(path)
    return Sensitivity({}, document["metric"], None, [Trial(**t) for t in document["trials"]])


def trial_samples_of(path: Path | None) -> int | None:
    """How many samples the trials of a file of results ran on; None where there is no file.

    Raises:
        DataError: as for `known`.
    """
    return None if path is None or not path.exists() else _tried(read_results(path))


def _tried(document: Mapping[str, Any]) -> int | None:
    """How many samples its trials ran on: all of them in files that do not say."""
    found: int | None = document.get("trial_samples", document.get("data", {}).get("samples"))
    return found


class _Trial(BaseModel):
    """A trial as it stands in a file of results."""

    model_config = ConfigDict(strict=True, extra="forbid")

    block: Annotated[int, Field(ge=0)]
    part: str
    ratio: Annotated[float, Field(ge=0, lt=1)]
    kept: dict[str, int]
    damage: dict[str, float]

    @field_validator("part")
    @classmethod
    def _known(cls, part: str) -> str:
        if part not in TRIAL_PARTS:
            raise ValueError(f"is none of {', '.join(TRIAL_PARTS)}")
        return part


class _Data(BaseModel):
    """What is read again of the samples of a file of results."""

    model_config = ConfigDict(extra="ignore")

    samples: Annotated[int, Field(ge=1)] = 1


class _Results(BaseModel):
    """What is read again of a file of results."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    data: _Data = Field(default_factory=_Data)
    trial_samples: Annotated[int, Field(ge=1)] = 1
    metric: str
    dense_top1: float | None
    trials: list[_Trial]


def read_results(path: Path) -> dict[str, Any]:
    """The document of a results file.

    Raises:
        DataError: it is missing, damaged, or of another format.
    """
    document = read_json(path, DataError, "it holds no sensitivity results; remove it and measure again")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path}: is no file of sensitivity results; give one that `toast-onnx sensitivity` wrote")
    try:
        _Results.model_validate(document)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where}: {first['msg']}; remove it and measure again") from e
    return document


def _order(trial: Trial) -> tuple[int, int, float]:
    return trial.block, list(TRIAL_PARTS).index(trial.part), trial.ratio


def _comparable(value: Any) -> Any:
    """A part of the identity without what may differ between equal runs: names of files and folders."""
    return {k: v for k, v in value.items() if k not in ("file", "source")} if isinstance(value, dict) else value
