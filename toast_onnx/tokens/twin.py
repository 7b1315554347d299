"""The proof of token merging.

A merged token that stands for several is the same as several equal ones: a softmax over equal keys adds up to one key
with log(size) on its score, a mean over equal tokens is the size-weighted mean, and everything else acts on each token
alone. So the *twin* is the unmerged graph, node for node, in which every place of a merge gives each token the mean of
its group, by one product with an averaging matrix (tokens x tokens) that comes from outside. It knows no sizes, no
changed attention and no smaller shapes, and must give the merged graph's outputs and the merged graph's tokens.

The groups are the merged graph's own choices, composed here in NumPy. Each choice is held against the twin's own
metric in float64: a token goes where it is most alike, and those that go are the most alike, within rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import GraphEdit
from toast_onnx.errors import TwinError
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, scratch_folder, write_draft
from toast_onnx.proof.precision import to_float32
from toast_onnx.proof.twin import TOLERANCE, Difference, relative_difference
from toast_onnx.runtime import batch_sizes, run_model
from toast_onnx.tokens.metrics import read_features, read_weights
from toast_onnx.tokens.nodes import EQUAL, Matched, Merge
from toast_onnx.tokens.rewrite import WrittenMerge

#: How far from the best a choice may be, as a share of the spread between the best pair and the worst.
CHOICE_TOLERANCE = 1e-4
#: Rounding of a cosine in float32, which is no fault of a choice.
ROUNDING = 4e-6

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class MergeProof:
    """Outcome of the proof.

    Attributes:
        batches: numbers of items compared.
        tolerance: allowed difference, as a share of a tensor's scale.
        worst: largest difference.
        choices: number of choices checked.
        furthest: how much less alike than the best the worst choice was, beyond rounding and as a share of the spread.
        differences: of every merge and output.
    """

    batches: tuple[int, ...]
    tolerance: float
    worst: float
    choices: int
    furthest: float
    differences: tuple[Difference, ...]

    def to_document(self) -> dict[str, object]:
        """Plain data for the report."""
        return asdict(self)


def unaveraged(tensor: str) -> str:
    """The twin's name for a merged tensor before its tokens are averaged."""
    return f"{tensor}/unaveraged"


def averaging_twin(study: Study, merges: Sequence[WrittenMerge]) -> tuple[Model, dict[str, str]]:
    """The unmerged graph with an averaging matrix as an input at every merge.

    Returns:
        The twin, and merged tensor -> name of the input (batch, tokens, tokens) that averages it.
    """
    edit, given = GraphEdit(study.view), {}
    for merge in merges:
        if merge.matched is None:
            continue
        i = study.view.producer[merge.tensor]
        node = edit.copy(i)
        raw = unaveraged(merge.tensor)
        node.output[list(node.output).index(merge.tensor)] = raw
        edit.replace(i, node)
        given[merge.tensor] = edit.fresh(f"{merge.tensor}/averaging")
        edit.emit(i, "MatMul", [given[merge.tensor], raw], merge.tensor, f"{merge.tensor}/average")
    twin = edit.apply()
    twin.proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, study.facts.elem_type(tensor), [None, None, None])
        for tensor, name in given.items()
    )
    return twin, given


def prove_merging(
    study: Study,
    merged: Model,
    merges: Sequence[WrittenMerge],
    inputs: Sequence[Arrays],
) -> MergeProof:
    """Run the merged graph and its twin on the same inputs and compare.

    Args:
        study: of the unmerged graph.
        merged: the merged graph.
        merges: what was written into it.
        inputs: what to compare on.

    Raises:
        TwinError: a tensor or a choice differs by more than rounding.
    """
    twin, given = averaging_twin(study, merges)
    twin, merged = to_float32(twin), to_float32(merged)
    outputs = [o.name for o in merged.proto.graph.output]
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in twin.proto.graph.input}
    asked = [*outputs, *(m.merged for m in merges), *(n for m in merges if m.matched for n in m.matched.names)]
    compared = [name for m in merges for name in _compared(m)]
    watched = [*(m.tensor for m in merges), *outputs]
    worst: dict[str, float] = dict.fromkeys(watched, 0.0)
    furthest, choices = 0.0, 0
    with scratch_folder("toast-merge-") as folder:
        small, wide = write_draft(merged, folder, "merged.onnx"), write_draft(twin, folder, "twin.onnx")
        for feeds in inputs:
            (made,) = run_model(small, list(dict.fromkeys(asked)), [feeds])
            groups = compose(merges, made)
            matrices = {name: averaging(groups[t].after).astype(kinds[name]) for t, name in given.items()}
            (theirs,) = run_model(wide, list(dict.fromkeys([*watched, *compared])), [{**feeds, **matrices}])
            for merge in merges:
                if merge.features is not None:
                    furthest = _larger(furthest, _furthest(merge, made, theirs, groups[merge.tensor].before))
                    choices += int(made[merge.matched.gone].size) if merge.matched else 0
                want = _one_of_each(merge, theirs[merge.tensor], groups)
                worst[merge.tensor] = _larger(worst[merge.tensor], relative_difference(want, made[merge.merged]))
            for name in outputs:
                worst[name] = _larger(worst[name], relative_difference(theirs[name], made[name]))
    blocks = {m.tensor: m.block for m in merges}
    differences = tuple(Difference(name, blocks.get(name), value) for name, value in worst.items())
    _check(differences, furthest)
    return MergeProof(batch_sizes(inputs), TOLERANCE, max(worst.values(), default=0.0), choices, furthest, differences)


def _larger(one: float, other: float) -> float:
    """The larger of two numbers; NaN, which proves nothing, where one is that."""
    return float(np.max([one, other]))


def _check(differences: Sequence[Difference], furthest: float) -> None:
    for d in differences:
        if np.isnan(d.relative):
            raise TwinError(
                f"the tensor '{d.tensor}' holds no finite number on any input, so nothing is proven of "
                "the merged tokens; give shapes that fit with --shape, or skip the proof with --no-check"
            )
        if not d.relative <= TOLERANCE:
            where = f"the output '{d.tensor}'" if d.block is None else f"the tokens of block {d.block}"
            raise TwinError(
                f"the graph with merged tokens differs from its twin at {where}: {d.relative:.1e} of its scale "
                f"(allowed {TOLERANCE:.0e}); nothing was written; leave the tokens alone (tokens: {{merge: 0}}) and "
                "please report the model"
            )
    if not furthest <= CHOICE_TOLERANCE:
        raise TwinError(
            f"the graph merges tokens that are not the most alike: {furthest:.1e} below the best (allowed "
            f"{CHOICE_TOLERANCE:.0e}); nothing was written; please report the model"
        )


def _compared(merge: WrittenMerge) -> list[str]:
    """The twin's names for what a merge compares: of the stream itself, what it is before it is averaged."""
    if merge.features is None:
        return []
    own = merge.features.tensor == merge.tensor
    weighed = [] if merge.features.attended is None else [merge.features.attended]
    return [unaveraged(merge.tensor) if own else merge.features.tensor, *weighed]


@dataclass(frozen=True)
class Groups:
    """Which merged token each original one belongs to.

    Attributes:
        before, after: (batch, original tokens) its number in front of and behind a merge.
    """

    before: np.ndarray
    after: np.ndarray


def compose(merges: Sequence[WrittenMerge], made: Arrays) -> dict[str, Groups]:
    """The groups behind every merge, from the merged graph's choices.

    Args:
        merges: the merges, those of one sequence in turn.
        made: the choices by tensor name.

    Raises:
        TwinError: a choice is no choice: a token goes twice, or neither goes nor stays.
    """
    present: dict[str, np.ndarray] = {}
    found: dict[str, Groups] = {}
    for merge in merges:
        if merge.matched is None:
            continue
        step = merged_numbers(merge, made)
        start = merge.sequence.start
        first = np.broadcast_to(np.arange(merge.sequence.count), (len(step), merge.sequence.count))
        before = present.get(start, first)
        present[start] = np.take_along_axis(step, before, 1)
        found[merge.tensor] = Groups(before, present[start])
    return found


def _choices(made: Mapping[str, np.ndarray], matched: Matched) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(batch, ...) which sources go, which stay (none where all go), and what each goes into."""
    gone, into = made[matched.gone], made[matched.into]
    stays = np.zeros((len(gone), 0), np.int64) if matched.stays is None else made[matched.stays]
    return gone, stays, into


def merged_numbers(merge: WrittenMerge, made: Arrays) -> np.ndarray:
    """(batch, tokens) the number behind a merge of every token in front of it, by the graph's choices `made`."""
    assert merge.matched is not None
    return np.stack([_step(merge.counts, *each) for each in zip(*_choices(made, merge.matched), strict=True)])


def _step(counts: Merge, gone: np.ndarray, stays: np.ndarray, into: np.ndarray) -> np.ndarray:
    """(tokens,) where one item's tokens go in one merge: front, sources that stay, targets, back."""
    if not np.array_equal(np.sort(np.concatenate([gone, stays])), np.arange(counts.sources)):
        raise TwinError("a merge takes a token twice, or loses one; nothing was written; please report the model")
    new = np.full(counts.count, -1)
    middle = np.arange(counts.front, counts.count - counts.back)
    targets, sources = middle[0::2], middle[1::2]
    new[: counts.front] = np.arange(counts.front)
    new[sources[stays]] = counts.front + np.arange(stays.size)
    new[targets] = counts.front + stays.size + np.arange(targets.size)
    new[sources[gone]] = new[targets[into]]
    if counts.back:
        new[-counts.back :] = counts.count - gone.size - counts.back + np.arange(counts.back)
    return new


def averaging(groups: np.ndarray) -> np.ndarray:
    """(batch, tokens, tokens) matrix that gives every token the mean of its group (batch, tokens)."""
    same = groups[:, :, None] == groups[:, None, :]
    shares: np.ndarray = same / same.sum(-1, keepdims=True)
    return shares


def _one_of_each(merge: WrittenMerge, tokens: np.ndarray, groups: Mapping[str, Groups]) -> np.ndarray:
    """The twin's tokens, one of each group; the special ones alone where the others are dropped."""
    if merge.matched is None:
        keep = np.r_[0 : merge.counts.front, tokens.shape[1] - merge.counts.back : tokens.shape[1]]
        return tokens[:, keep]
    return np.stack([x[_first_of(g)] for x, g in zip(tokens, groups[merge.tensor].after, strict=True)])


def _first_of(groups: np.ndarray) -> np.ndarray:
    """Position of the first member of every group."""
    return np.unique(groups, return_index=True)[1]


def _furthest(merge: WrittenMerge, made: Arrays, theirs: Arrays, before: np.ndarray) -> float:
    """How far the worst choice of a merge lies behind the best."""
    assert merge.matched is not None
    assert merge.features is not None
    compared, *weighed = (theirs[name] for name in _compared(merge))
    features = read_features(merge.features, compared)
    by_size = merge.features.metric.weight == "sizes"
    given = read_weights(merge.features, weighed[0], before) if weighed else [None] * len(before)
    worst = 0.0
    stop = merge.counts.count - merge.counts.back
    choices = zip(*_choices(made, merge.matched), strict=True)
    for x, groups, attended, (gone, stays, into) in zip(features, before, given, choices, strict=True):
        _, first, sizes = np.unique(groups, return_index=True, return_counts=True)
        unit = x[first]
        unit = unit / np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
        sources, targets = slice(merge.counts.front + 1, stop, 2), slice(merge.counts.front, stop, 2)
        alike = unit[sources] @ unit[targets].T
        scale = 1.0
        weights = sizes.astype(np.float64) if by_size else attended
        if weights is not None:
            a, b = weights[sources, None], weights[None, targets]
            shares = a * b / (a + b)
            alike, scale = (alike - EQUAL) * shares, float(shares.max())
        best = alike.max(1)
        gap = float((best[gone] - alike[gone, into]).max(initial=0.0))
        if stays.size:
            gap = _larger(gap, float(best[stays].max() - best[gone].min()))
        spread = max(float(alike.max() - alike.min()), np.finfo(np.float64).tiny)
        worst = _larger(worst, max(gap - ROUNDING * scale, 0.0) / spread if gap == gap else gap)
    return worst
