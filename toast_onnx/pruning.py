"""Pruning a model from end to end: study, choose, rewrite, prove."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np

from toast_onnx.choosing.at_once import blocks_at_once
from toast_onnx.choosing.blocks import Widths, held_by_ties, plan_widths, solve_block
from toast_onnx.choosing.losses import predicted_errors
from toast_onnx.choosing.shared import Pooled, Sharing, agreed_widths, find_sharing, sharing_notes
from toast_onnx.choosing.synthetic import founded_widths
from toast_onnx.engines.even_heads import Evened, even_heads
from toast_onnx.errors import BackendError, ConfigError, MatchError, ModelError
from toast_onnx.finetune.local import LocalResult
from toast_onnx.importance.remembered import Remembered
from toast_onnx.importance.statistics import Statistics
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.graph import FLOATS
from toast_onnx.matching.searched import searched
from toast_onnx.matching.study import Study
from toast_onnx.matching.study import study as study_model
from toast_onnx.model import Model
from toast_onnx.planning.ratios import BlockRatios, Ratios, own_merges, resolve
from toast_onnx.proof.decisions import follow_decisions
from toast_onnx.proof.inputs import Feeds, as_proven, twin_inputs
from toast_onnx.proof.twin import TwinResult, compare_with_twin, padded_twin, together
from toast_onnx.rewriting.norms import normalize_layer_norms
from toast_onnx.rewriting.rewrite import rewritten
from toast_onnx.rewriting.sharing import share_weights
from toast_onnx.selection.plan import Selection, among_merged, plan_selections, settled_widths, static_widths
from toast_onnx.selection.rewrite import Chosen, select_at_run_time
from toast_onnx.selection.twin import check_scores, masked_twin
from toast_onnx.solving.weights import BlockWeights
from toast_onnx.threads import shared_work
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
        notes: what a person should know of the proof.
        errors: block number -> part -> predicted error, relative to what the part gives.
        unfounded: blocks of which parts were left alone, because made-up tokens do not stand for what they read.
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
    notes: tuple[str, ...] = ()
    errors: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    unfounded: tuple[int, ...] = ()


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
    samples: Sequence[Feeds] = (),
    force_synthetic: bool = True,
    split_shared: bool = False,
    threads: int | None = None,
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
        force_synthetic: with made-up tokens, also prune parts that they do not stand for, because no norm is in front.
        split_shared: give every place that shares its weights with others a copy of its own.
        samples: real inputs that the proof runs on besides made-up ones, and alone where nothing made up fits.
        threads: that solve blocks; None takes `OMP_NUM_THREADS`, or one a core.

    Raises:
        ConfigError: the ratios do not fit the model.
        MatchError: a ratio asks for a part that cannot be pruned.
        ModelError: weights of a block are NaN or infinite, or there is nothing that the proof could run on.
        TwinError: the proof failed.
    """
    blocks = study.match.blocks
    if not blocks:
        raise ModelError(f"{study.view.model.path}: no transformer block was found: {_why_none(study)}")
    settings = resolve(ratios, [b.name for b in blocks], [b.node_names for b in blocks])
    if ratios.compensation.kind == "local" and refine is None:
        raise ConfigError(
            "compensation: local trains blocks on calibration samples: give them with --data, or choose kind: ridge"
        )
    if ratios.compensation.statistics == "sequential" and not isinstance(statistics, Sequential):
        raise ConfigError(
            "compensation.statistics: sequential measures every block behind the pruned ones: give samples with "
            "--data, or use one-shot"
        )
    asked = _asked(study, settings, ratios, statistics, seed, skip_unprunable, force_synthetic, split_shared)
    feeds, notes, unproven = _proof_inputs(study, samples, seed) if check else ([], (), None)
    weights, errors = _solve_all(study, ratios, asked, statistics, threads, progress)
    if unproven is not None:
        raise unproven
    weights, trained = _refined(ratios, asked, weights, refine)
    model = rewritten(study, weights) if weights or asked.selections else study.source
    if asked.sharing and weights:
        model = share_weights(model, study.view)
    model, chosen = select_at_run_time(study, model, () if ratios.merges_tokens else asked.selections)
    model, normalized = normalize_layer_norms(model, study.counted_shapes) if normalize else (model, 0)
    twin = _prove(study, model, weights, chosen, feeds) if check else None
    selections, merging = asked.selections, None
    merges: tuple[WrittenMerge, ...] = ()
    if ratios.merges_tokens:
        model, merges, merging = _merge(study, model, ratios, feeds, skip_unprunable)
        model, selections, choosing = _select_among_merged(study, model, selections, merges, ratios, seed, feeds)
        twin = together([each for each in (twin, choosing) if each is not None])
    progress("twin" if check else "no twin")
    return Pruned(
        model,
        weights,
        asked.widths,
        asked.settings,
        twin,
        statistics.source,
        local=trained,
        selections=selections,
        normalized=normalized,
        merges=merges,
        merging=merging,
        notes=(*notes, *asked.notes),
        errors=errors,
        unfounded=asked.unfounded,
    )


@dataclass(frozen=True)
class _Asked:
    """What a ratios file asks of a model, settled: see `Pruned` for most of it.

    Attributes:
        sharing: which blocks share their weights.
        notes: what a person should know of it.
    """

    settings: tuple[BlockRatios, ...]
    widths: tuple[Widths, ...]
    selections: tuple[Selection, ...]
    sharing: Sharing
    unfounded: tuple[int, ...]
    notes: tuple[str, ...]


def _asked(
    study: Study,
    settings: tuple[BlockRatios, ...],
    ratios: Ratios,
    statistics: Statistics | Sequential,
    seed: int,
    skip_unprunable: bool,
    force_synthetic: bool,
    split_shared: bool,
) -> _Asked:
    """Widths and selections of every block, with what ties, shared weights and missing norms make of them.

    Raises:
        ConfigError: two things are asked for that exclude each other.
    """
    blocks = study.match.blocks
    widths = tuple(plan_widths(b, s, ratios, skip_unprunable) for b, s in zip(blocks, settings, strict=True))
    widths, unfounded = (widths, ()) if force_synthetic else founded_widths(study, widths, settings, ratios, statistics)
    sharing = Sharing({}, {}, {}) if split_shared else find_sharing(study)
    widths, kept_whole = agreed_widths(study, widths, sharing, skip_unprunable)
    if sharing and isinstance(statistics, Sequential):
        raise ConfigError(
            "compensation.statistics: sequential measures block by block, and blocks of this model share weights; use "
            "one-shot, or --split-shared"
        )
    selections = plan_selections(study, settings, widths, ratios, seed, skip_unprunable)
    if ratios.compensation.kind == "local" and selections:
        raise ConfigError(
            "compensation: local trains weights, which mode: runtime chooses anew for every batch; use ridge"
        )
    notes = (*sharing_notes(sharing), *kept_whole, *held_by_ties(blocks, settings, ratios))
    return _Asked(settings, settled_widths(settings, widths, selections), selections, sharing, unfounded, notes)


def _solve_all(
    study: Study,
    ratios: Ratios,
    asked: _Asked,
    statistics: Statistics | Sequential,
    threads: int | None,
    progress: Progress,
) -> tuple[dict[int, BlockWeights], dict[int, dict[str, float]]]:
    """New weights of all blocks that change, and the predicted errors of their parts, by block number."""
    sharing, kind = asked.sharing, ratios.compensation.kind
    weights: dict[int, BlockWeights] = {}
    errors: dict[int, dict[str, float]] = {}

    def solve(block: Block) -> tuple[BlockWeights | None, dict[str, float]]:
        setting = asked.settings[block.index]
        width = static_widths(asked.widths[block.index], setting)
        if width == Widths():
            return None, {}
        found = statistics.behind(block.index, weights) if isinstance(statistics, Sequential) else statistics
        found = Remembered(Pooled(found, sharing))
        new = _solve_once(study, block, width, setting, ratios, found, sharing, weights)
        if new is None:
            return None, {}
        leaders = {sharing.leader(block.index, part) for part in ("attention", "ffn")}
        if block.index in leaders:
            return new, predicted_errors(study, block, width, setting, kind, found, new)
        known = (errors.get(index, {}) for index in sorted(leaders))  # pooled statistics of the same places once more
        return new, {part: e for each in known for part, e in each.items()}

    apart = not (sharing or isinstance(statistics, Sequential))  # else a block waits for those before it
    most = blocks_at_once(study) if apart else 1
    for block, (new, predicted) in zip(
        study.match.blocks, shared_work(solve, study.match.blocks, threads, most), strict=True
    ):
        if new is not None:
            weights[block.index], errors[block.index] = new, predicted
        progress(block.name)
    return weights, errors


def _refined(
    ratios: Ratios, asked: _Asked, weights: dict[int, BlockWeights], refine: Refine | None
) -> tuple[dict[int, BlockWeights], tuple[LocalResult, ...]]:
    """Weights corrected on samples, where the compensation asks for that, and what it did to each block.

    Means are matched in the weights' own graph, which does not select: with selections there is nothing to match.
    """
    if refine is None or not weights or asked.selections or ratios.compensation.kind not in ("local", "ridge"):
        return weights, ()
    return refine(weights)


def _solve_once(
    study: Study,
    block: Block,
    width: Widths,
    setting: BlockRatios,
    ratios: Ratios,
    statistics: Statistics,
    sharing: Sharing,
    done: Mapping[int, BlockWeights],
) -> BlockWeights | None:
    """New weights of a block; those of an earlier one that shares its weights, where there is one."""
    parts = width
    attention, ffn = sharing.leader(block.index, "attention"), sharing.leader(block.index, "ffn")
    if attention != block.index:
        parts = replace(parts, heads=None, qk=None, vo=None)
    if ffn != block.index:
        parts = replace(parts, fc1=None, fc2=None)
    new = solve_block(study, block, parts, setting, ratios, statistics) or BlockWeights()
    if attention != block.index and attention in done:
        new = replace(new, attention=done[attention].attention)
    if ffn != block.index and ffn in done:
        new = replace(new, ffn=done[ffn].ffn)
    return None if new == BlockWeights() else new


def even_out(study: Study, pruned: Pruned, *, check: bool = True, seed: int = 0) -> tuple[Pruned, Evened]:
    """Pad the attentions of a pruned model that have two widths, for kernels that have one head size.

    Args:
        study: the dense model.
        pruned: the result of `prune`.
        check: prove that every output stays as it was.
        seed: seed of the inputs it is proven on.

    Raises:
        TwinError: the proof failed.
    """
    evened = even_heads(pruned.model, study.counted_shapes)
    if evened.padded and check:
        before = Model(pruned.model.proto, pruned.model.path, dict(pruned.model.arrays))
        compare_with_twin(study.view, before, evened.model, study.match.blocks, {}, twin_inputs(study, seed))
    return replace(pruned, model=evened.model), evened


def _why_none(study: Study) -> str:
    """What speaks against blocks in a graph without any, or what was looked for."""
    reasons = list(study.match.declined.values())
    more = f" ({len(reasons) - 1} more reasons: toast-onnx inspect)" if len(set(map(str, reasons))) > 1 else ""
    return f"{reasons[0]}{more}" if reasons else searched(study)


def _merge(
    study: Study, model: Model, ratios: Ratios, feeds: Sequence[Feeds], skip_unprunable: bool
) -> tuple[Model, tuple[WrittenMerge, ...], MergeProof | None]:
    """Merge the tokens of a model whose widths are done, and prove it."""
    pruned, merged, merges = merge_tokens(study, model, ratios, skip_unprunable)
    if not feeds or not merges:
        return merged, merges, None
    return merged, merges, prove_merging(pruned, merged, merges, feeds)


def _select_among_merged(
    study: Study,
    model: Model,
    selections: Sequence[Selection],
    merges: Sequence[WrittenMerge],
    ratios: Ratios,
    seed: int,
    feeds: Sequence[Feeds],
) -> tuple[Model, tuple[Selection, ...], TwinResult | None]:
    """Let the networks of a merged model select while they run, and prove that against the merged model, masked."""
    if not selections:
        return model, (), None
    merged = study_model(model, study.counted_shapes)
    selections = among_merged(merged, selections, merges, ratios, seed)
    selecting, chosen = select_at_run_time(merged, model, selections)
    return selecting, selections, _prove(merged, selecting, {}, chosen, feeds) if feeds else None


def merge_tokens(
    study: Study, model: Model, ratios: Ratios, skip_unprunable: bool = False
) -> tuple[Study, Model, tuple[WrittenMerge, ...]]:
    """Merge the tokens of a model whose widths are done; nothing is proven here.

    Args:
        study: the dense model.
        model: the same with its new widths.
        ratios: which tokens to merge.
        skip_unprunable: leave blocks alone that are named but cannot merge.

    Returns:
        The study of `model`, the merged model, and what was written.

    Raises:
        MatchError: a block is asked to merge and cannot.
    """
    pruned = study if model is study.source else study_model(model, study.counted_shapes)
    if len(pruned.match.blocks) != len(study.match.blocks):
        raise MatchError("the pruned graph shows other blocks, so no tokens can be merged in it; set tokens.merge to 0")
    tokens = study_tokens(pruned)
    blocks = study.match.blocks
    own = own_merges(ratios, [b.name for b in blocks], [b.node_names for b in blocks])
    removed = removed_counts(tokens, ratios.tokens.merge, own, skip_unprunable)
    merged, merges = write_merging(pruned, tokens, removed, ratios.tokens.metric, ratios.tokens.unread)
    return pruned, merged, merges


def _proof_inputs(
    study: Study, samples: Sequence[Feeds], seed: int
) -> tuple[list[Feeds], tuple[str, ...], ModelError | None]:
    """What the proof runs on, what to say of it, and why it cannot run; found before the work, which would be in vain.

    Weights that are no numbers are a reason that the block which holds them says better: it is not raised here.
    """
    real = as_proven(study, samples)
    try:
        return [*twin_inputs(study, seed), *real], (), None
    except ModelError as e:
        if real:
            return real, (f"proven on samples of the data alone: {e}",), None
        unproven = e
    except BackendError as e:
        unproven = ModelError(f"{study.view.model.path}: {e}")
        unproven.__cause__ = e
    if not _spoiled(study):
        raise unproven
    return [], (), unproven


def _spoiled(study: Study) -> bool:
    """Whether a stored weight is NaN or infinite."""
    view, facts = study.view, study.facts
    floats = [name for name, tensor in view.initializers.items() if tensor.data_type in FLOATS]
    return not all(np.isfinite(facts.array(name)).all() for name in floats)


def _prove(
    study: Study, model: Model, weights: dict[int, BlockWeights], chosen: tuple[Chosen, ...], feeds: Sequence[Feeds]
) -> TwinResult:
    twin = padded_twin(study.view, study.facts, study.match.blocks, weights)
    if chosen:
        check_scores(model, chosen, feeds)
        twin = masked_twin(study, twin, chosen)
    twin, decisions = follow_decisions(twin, model, study.facts)
    changed = {c.selection.block: BlockWeights() for c in chosen} | weights
    kept = [c.kept for c in chosen]
    return compare_with_twin(study.view, twin, model, study.match.blocks, changed, feeds, kept, decisions)
