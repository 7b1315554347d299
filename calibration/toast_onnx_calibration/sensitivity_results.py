"""Results of sensitivity trials, and the file they are kept in: what it belongs to, and what is read of it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from toast_onnx.errors import ConfigError, DataError
from toast_onnx.files import write_bytes
from toast_onnx.planning.settings import first_problem
from toast_onnx.planning.strict_json import read_json
from toast_onnx.planning.width_costs import TOKENS, Part
from toast_onnx.report.tables import Shown, Side, Table

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
        where, what = first_problem(e)
        raise DataError(f"{path}: {where}: {what}; remove it and measure again") from e
    return document


def _order(trial: Trial) -> tuple[int, int, float]:
    return trial.block, list(TRIAL_PARTS).index(trial.part), trial.ratio


def _comparable(value: Any) -> Any:
    """A part of the identity without what may differ between equal runs: names of files and folders."""
    return {k: v for k, v in value.items() if k not in ("file", "source")} if isinstance(value, dict) else value
