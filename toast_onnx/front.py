"""The public library: `load` a model, `prune` it, look at both, save the result with its report.

What `toast_onnx.__all__` names. The classes add to those of the inner rooms what a person at a prompt or in a notebook
wants; every inner function takes them as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import toast_onnx.matching.study as matching_study
from toast_onnx import hub, pruning
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.files import write_bytes
from toast_onnx.importance.statistics import Statistics
from toast_onnx.model import load_model, scratch_folder, write_draft
from toast_onnx.planning.macs import graph_macs
from toast_onnx.planning.presets import read_ratios
from toast_onnx.planning.ratios import Ratios, parse_ratios
from toast_onnx.report.inspection import inspection, inspection_table
from toast_onnx.report.pruning import pruning_report, pruning_table, save_with_report
from toast_onnx.report.tables import Shown, Table


class HasRatios(Protocol):
    """What holds ratios, such as a plan."""

    @property
    def ratios(self) -> Ratios:
        """They."""
        ...


#: Ratios, a plan, a document of plain data, or the name of a file or preset.
AnyRatios = Ratios | HasRatios | Mapping[str, Any] | str | os.PathLike[str]


class Study(Shown, matching_study.Study):
    """A model looked at: its blocks, their widths, what can be pruned and why not. Shows itself as a table."""

    def report(self) -> dict[str, Any]:
        """What `toast-onnx inspect --json` prints."""
        return inspection(self)

    @property
    def table(self) -> Table:
        """What `toast-onnx inspect` prints."""
        return inspection_table(self.report())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all.

        Raises:
            ModelError: it cannot be written.
        """
        write_bytes(Path(path), (json.dumps(self.report(), indent=1) + "\n").encode())


@dataclass(frozen=True, repr=False, kw_only=True)
class Pruned(Shown, pruning.Pruned):
    """A pruned model, not yet written.

    Attributes:
        dense: the model it was made from.
        options: those of the run, for the report.
        source: where the statistics came from, for the report.
    """

    dense: matching_study.Study
    options: dict[str, Any]
    source: dict[str, Any]

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates at the shapes that the dense model's are counted at."""
        after = matching_study.study(self.model, self.dense.counted_shapes)
        return graph_macs(after.view, after.counted)

    @cached_property
    def _document(self) -> dict[str, Any]:
        with scratch_folder("toast-report-") as folder:
            draft = write_draft(self.model, folder, self.model.path.name)
            return pruning_report(self, self.dense, draft, self.options) | {"statistics": self.source}

    def report(self) -> dict[str, Any]:
        """The document that `save` writes beside the model."""
        return self._document

    @property
    def table(self) -> Table:
        """Widths and costs of every block, before and after."""
        return pruning_table(self._document)

    def save(self, path: str | os.PathLike[str], report: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Write graph and report; a model never appears without its report.

        Args:
            path: of the ONNX file.
            report: of the JSON report; None takes `path` with the suffix .json.

        Returns:
            The report.

        Raises:
            ModelError: one of them cannot be written.
        """
        out = Path(path)
        beside = out.with_suffix(".json") if report is None else Path(report)
        return save_with_report(self, self.dense, self.source, self.options, out, beside)


def load(path: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]] | None = None) -> Study:
    """Read a model and find its blocks.

    Args:
        path: of the ONNX file, or `hf:ORG/NAME[:FILE.onnx]`; external weights stay in their files until they are
            needed.
        shapes: input name -> concrete shape, where axes are symbolic.

    Raises:
        ModelError: it cannot be read, or a shape contradicts it.
    """
    name = hub.parse(os.fspath(path))
    found = matching_study.study(load_model(path if name is None else hub.fetch(name)), shapes)
    return Study(**{f.name: getattr(found, f.name) for f in fields(found)})


def prune(
    model: matching_study.Study | str | os.PathLike[str],
    ratios: AnyRatios,
    statistics: Statistics | pruning.Sequential | None = None,
    *,
    check: bool = True,
    skip_unprunable: bool = False,
    normalize: bool = False,
    seed: int = 0,
    progress: pruning.Progress = lambda _: None,
    refine: pruning.Refine | None = None,
    samples: Sequence[Mapping[str, np.ndarray]] = (),
    force_synthetic: bool = False,
    split_shared: bool = False,
    threads: int | None = None,
) -> Pruned:
    """Prune a model.

    Args:
        model: what `load` gave, or a file.
        ratios: what to remove and how.
        statistics: of activations, as `toast_onnx_calibration.calibrate` measures them; None makes them from weights.
        check: prove the result with the padded twin.
        skip_unprunable: leave parts alone that a ratio asks for but that cannot be pruned.
        normalize: write spelled-out norms as LayerNormalization operators (opset 17 and newer).
        seed: of the twin's inputs, of made-up tokens, and of the tokens that selection at run time samples.
        progress: called after every block and after the proof.
        refine: corrects the weights on samples.
        force_synthetic: without statistics, also prune parts that made-up tokens do not stand for (no norm in front).
        split_shared: give every place that shares its weights with others a copy of its own.
        samples: real inputs for the proof to run on besides made-up ones, as lists of name -> array.
        threads: that solve blocks; None takes `OMP_NUM_THREADS`, or one a core.

    Raises:
        ConfigError: the ratios do not fit the model.
        MatchError: a ratio asks for a part that cannot be pruned.
        ModelError: the model cannot be read, or weights of a block are NaN or infinite.
        TwinError: the proof failed.
    """
    dense = model if isinstance(model, matching_study.Study) else load(model)
    settings = _ratios(ratios)
    found = SyntheticStatistics(dense, seed) if statistics is None else statistics
    result = pruning.prune(
        dense,
        settings,
        found,
        check=check,
        skip_unprunable=skip_unprunable,
        normalize=normalize,
        seed=seed,
        progress=progress,
        refine=refine,
        samples=samples,
        force_synthetic=force_synthetic,
        split_shared=split_shared,
        threads=threads,
    )
    options = {
        "ratios": settings.to_document(),
        "seed": seed,
        "check": check,
        "skip_unprunable": skip_unprunable,
        "normalize": normalize,
    }
    describe = getattr(found, "to_document", None)  # measured statistics say more than where they come from
    source = {"source": found.source} if describe is None else describe()
    known = {f.name: getattr(result, f.name) for f in fields(result)}
    return Pruned(**known, dense=dense, options=options, source=source)


def _ratios(given: AnyRatios) -> Ratios:
    if isinstance(given, Ratios):
        return given
    if isinstance(given, (str, os.PathLike)):
        return read_ratios(os.fspath(given))
    if isinstance(given, Mapping):
        return parse_ratios(given)
    return given.ratios
