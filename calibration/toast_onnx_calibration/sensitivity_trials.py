"""What breaks first: damage at the output when one part of one block is pruned, for every block, part and ratio.

Tokens merged behind the attention of one block count as a part of that block.

Results go to a file after every trial (`sensitivity_results`). A run that finds its own unfinished file goes on where
that one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from toast_onnx.choosing.at_once import blocks_at_once
from toast_onnx.choosing.blocks import Widths, solve_block
from toast_onnx.importance.statistics import Statistics
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, file_hash
from toast_onnx.planning.planned import selection_only
from toast_onnx.planning.ratios import Ratios, resolve
from toast_onnx.planning.search import Kept
from toast_onnx.planning.width_costs import TOKENS, Part, prunable_widths, width_step
from toast_onnx.planning.widths import kept_count
from toast_onnx.solving.weights import BlockWeights
from toast_onnx.threads import shared_work
from toast_onnx.tokens.nodes import Merge
from toast_onnx.tokens.points import TokenStudy, study_tokens
from toast_onnx.tokens.rewrite import write_merging
from toast_onnx_calibration.sensitivity_results import TRIAL_PARTS, Sensitivity, Trial, write_results
from toast_onnx_calibration.sensitivity_stream import Trials
from toast_onnx_calibration.statistics import CalibratedStatistics

Progress = Callable[[int, int, str, float | None], None]
"""Called with the trials done, their number, what was done last, and the seconds that are left where they are known."""


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
