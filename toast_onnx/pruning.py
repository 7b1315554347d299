"""Pruning a model from end to end: study, choose, rewrite, prove."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from toast_onnx.choosing.blocks import Widths, plan_widths, solve_block
from toast_onnx.errors import ConfigError, MatchError, ModelError
from toast_onnx.finetune.local import LocalResult
from toast_onnx.importance.statistics import Statistics
from toast_onnx.matching.searched import searched
from toast_onnx.matching.study import Shapes, Study, input_shapes
from toast_onnx.matching.study import study as study_model
from toast_onnx.model import Model
from toast_onnx.planning.ratios import BlockRatios, Ratios, resolve
from toast_onnx.proof.decisions import follow_decisions
from toast_onnx.proof.twin import TwinResult, compare_with_twin, padded_twin
from toast_onnx.rewriting.norms import normalize_layer_norms
from toast_onnx.rewriting.rewrite import rewritten
from toast_onnx.selection.plan import Selection, plan_selections, settled_widths, static_widths
from toast_onnx.selection.rewrite import Chosen, select_at_run_time
from toast_onnx.selection.twin import check_scores, masked_twin
from toast_onnx.solving.weights import BlockWeights
from toast_onnx.tokens.points import study_tokens
from toast_onnx.tokens.rewrite import WrittenMerge, write_merging
from toast_onnx.tokens.schedule import removed_counts
from toast_onnx.tokens.twin import MergeProof, prove_merging

#: Called after each unit of work with what was done.
Progress = Callable[[str], None]
#: Corrects closed-form weights, by block number, on samples; made by `toast_onnx_calibration.local`.
Refine = Callable[[Mapping[int, BlockWeights]], tuple[dict[int, BlockWeights], tuple[LocalResult, ...]]]


@runtime_checkable
class Sequential(Protocol):
    """Statistics for `compensation: {statistics: sequential}`, made by `toast_onnx_calibration.sequential`."""

    @property
    def source(self) -> str:
        """Where the statistics come from, for the report."""
        ...

    def behind(self, block: int, weights: Mapping[int, BlockWeights]) -> Statistics:
        """Statistics of a block, measured with the new weights of the blocks before it."""
        ...


@dataclass(frozen=True)
class Pruned:
    """Result of pruning, not yet written.

    Attributes:
        model: the rewritten model.
        weights: block number -> new weights, for the blocks that changed.
        widths: kept counts of every block.
        ratios: settings of every block.
        twin: outcome of the proof, None when it was not asked for.
        statistics: where the statistics came from.
        local: what correction on samples did to each block, empty where there was none.
        selections: what the graph selects while it runs, empty where every network is static.
        normalized: number of spelled-out norms that became LayerNormalization operators.
        merges: where tokens are merged or dropped, empty where they are left alone.
        merging: outcome of the proof of merging, None without merges or when it was not asked for.
    """

    model: Model
    weights: dict[int, BlockWeights]
    widths: tuple[Widths, ...]
    ratios: tuple[BlockRatios, ...]
    twin: TwinResult | None
    statistics: str
    local: tuple[LocalResult, ...] = ()
    selections: tuple[Selection, ...] = ()
    normalized: int = 0
    merges: tuple[WrittenMerge, ...] = ()
    merging: MergeProof | None = None


def prune(
    study: Study,
    ratios: Ratios,
    statistics: Statistics | Sequential,
    *,
    check: bool = True,
    skip_unprunable: bool = False,
    normalize: bool = False,
    seed: int = 0,
    progress: Progress = lambda _: None,
    refine: Refine | None = None,
) -> Pruned:
    """Prune a studied model.

    Args:
        study: the model and its blocks.
        ratios: what to remove and how.
        statistics: activation statistics for the solvers; `Sequential` where the ratios ask for that.
        check: prove the result with the padded twin.
        skip_unprunable: leave parts alone that a ratio asks for but that cannot be pruned.
        normalize: write spelled-out norms as LayerNormalization operators (opset 17 and newer).
        seed: seed of the twin's inputs, and of the tokens that selection at run time samples.
        progress: called after every block and after the proof.
        refine: corrects the weights on samples; called for `compensation: local`, which needs it, and `ridge`.

    Raises:
        ConfigError: the ratios do not fit the model.
        MatchError: a ratio asks for a part that cannot be pruned.
        ModelError: weights of a block are NaN or infinite.
        TwinError: the proof failed.
    """
    blocks = study.match.blocks
    if not blocks:
        raise ModelError(f"{study.view.model.path}: no transformer block was found: {_why_none(study)}")
    settings = resolve(ratios, [b.name for b in blocks], [b.node_names for b in blocks])
    local = ratios.compensation.kind == "local"
    if local and refine is None:
        raise ConfigError(
            "compensation: local trains blocks on calibration samples: give them with --data, or choose kind: ridge"
        )
    if ratios.compensation.statistics == "sequential" and not isinstance(statistics, Sequential):
        raise ConfigError(
            "compensation.statistics: sequential measures every block behind the pruned ones: give samples with "
            "--data, or use one-shot"
        )
    widths = tuple(plan_widths(b, s, ratios, skip_unprunable) for b, s in zip(blocks, settings, strict=True))
    selections = plan_selections(study, settings, widths, ratios, seed, skip_unprunable)
    widths = settled_widths(settings, widths, selections)
    if local and selections:
        raise ConfigError(
            "compensation: local trains weights, which mode: runtime chooses anew for every batch; use ridge"
        )
    weights: dict[int, BlockWeights] = {}
    for block, whole, setting in zip(blocks, widths, settings, strict=True):
        width = static_widths(whole, setting)
        if width == Widths():
            progress(block.name)
            continue
        found = statistics.behind(block.index, weights) if isinstance(statistics, Sequential) else statistics
        new = solve_block(study, block, width, setting, ratios, found)
        if new is not None:
            weights[block.index] = new
        progress(block.name)
    trained: tuple[LocalResult, ...] = ()
    # Means are matched in the weights' own graph, which does not select: with selections there is nothing to match.
    if refine is not None and weights and not selections and ratios.compensation.kind in ("local", "ridge"):
        weights, trained = refine(weights)
    model = rewritten(study, weights) if weights or selections else study.source
    model, chosen = select_at_run_time(study, model, selections)
    normalized = 0
    if normalize:
        model, normalized = normalize_layer_norms(model, study.counted_shapes)
    twin = _prove(study, model, weights, chosen, seed) if check else None
    merges: tuple[WrittenMerge, ...] = ()
    merging: MergeProof | None = None
    if ratios.tokens.merges:
        model, merges, merging = _merge(study, model, ratios, check, skip_unprunable, seed)
    progress("twin" if check else "no twin")
    source = statistics.source
    return Pruned(model, weights, widths, settings, twin, source, trained, selections, normalized, merges, merging)


def _why_none(study: Study) -> str:
    """What speaks against blocks in a graph without any, or what was looked for."""
    reasons = list(study.match.declined.values())
    more = f" ({len(reasons) - 1} more reasons: toast-onnx inspect)" if len(set(reasons)) > 1 else ""
    return f"{reasons[0]}{more}" if reasons else searched(study)


def _merge(
    study: Study, model: Model, ratios: Ratios, check: bool, skip_unprunable: bool, seed: int
) -> tuple[Model, tuple[WrittenMerge, ...], MergeProof | None]:
    """Merge the tokens of a model whose widths are done, and prove it."""
    pruned = study if model is study.source else study_model(model, study.counted_shapes)
    if len(pruned.match.blocks) != len(study.match.blocks):
        raise MatchError("the pruned graph shows other blocks, so no tokens can be merged in it; set tokens.merge to 0")
    tokens = study_tokens(pruned)
    removed = removed_counts(tokens, ratios.tokens.merge, skip_unprunable)
    merged, merges = write_merging(pruned, tokens, removed, ratios.tokens.metric, ratios.tokens.unread)
    if not check or not merges:
        return merged, merges, None
    return merged, merges, prove_merging(pruned, merged, merges, twin_shapes(pruned), seed)


def _prove(
    study: Study, model: Model, weights: dict[int, BlockWeights], chosen: tuple[Chosen, ...], seed: int
) -> TwinResult:
    shapes = twin_shapes(study)
    twin = padded_twin(study.view, study.facts, study.match.blocks, weights)
    if chosen:
        check_scores(model, chosen, shapes, seed)
        twin = masked_twin(study, twin, chosen)
    twin, decisions = follow_decisions(twin, model, study.facts)
    changed = {c.selection.block: BlockWeights() for c in chosen} | weights
    kept = [c.kept for c in chosen]
    return compare_with_twin(study.view, twin, model, study.match.blocks, changed, shapes, seed, kept, decisions)


def twin_shapes(study: Study) -> list[Shapes]:
    """Input shapes for the twin: one and three items where the batch is dynamic, else the fixed shapes."""
    if not study.dynamic_batch:
        return [study.counted_shapes]
    given = study.counted_shapes
    return [input_shapes(study.view, given, batch, fixed_batch=False) for batch in (1, 3)]
