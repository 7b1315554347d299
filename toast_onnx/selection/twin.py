"""The proof for networks that select while they run.

The padded twin has no smaller product to check against, so it is *masked*: dropped channels are multiplied by zero in
the original graph, at full width. Two things are proven apart. Given the channels that the pruned graph chose, both
graphs agree in every branch and output. And the channels it chose are those with the highest scores, computed anew in
float64 from the tensors that it scored. Apart, because two graphs that each choose for themselves differ by far more
than rounding wherever two scores tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.helper

from toast_onnx.edit import PlaceWriter
from toast_onnx.errors import TwinError
from toast_onnx.importance.activation import attended_magnitude, token_channel_scores
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, scratch_folder, write_draft
from toast_onnx.proof.precision import to_float32
from toast_onnx.runtime import run_model
from toast_onnx.selection.plan import Selection
from toast_onnx.selection.rewrite import Chosen, Target, move_stream, open_target
from toast_onnx.tokens.rewrite import WrittenMerge
from toast_onnx.tokens.twin import merged_numbers

#: How far the worst kept score may lie below the best dropped one, as a fraction of it: float32 sums, and ties.
SCORE_TOLERANCE = 1e-4


def masked_twin(study: Study, twin: Model, chosen: Sequence[Chosen]) -> Model:
    """A padded twin that masks what the pruned graph drops.

    Args:
        study: of the dense model.
        twin: its padded twin.
        chosen: what the pruned graph selects; the tensor `kept` of each becomes an input of the twin.
    """
    target = open_target(study, twin)
    for each in chosen:
        _mask(target, study, each)
    masked = target.edit.apply()
    for each in chosen:
        shape = [each.selection.kept]
        masked.proto.graph.input.append(onnx.helper.make_tensor_value_info(each.kept, onnx.TensorProto.INT64, shape))
    return masked


def _mask(target: Target, study: Study, each: Chosen) -> None:
    """Multiply what the selection drops by zero, where the dense graph has it."""
    edit, selection = target.edit, each.selection
    ffn = study.match.blocks[selection.block].ffn
    assert ffn is not None
    if selection.residual == "masked":
        at, raw = move_stream(target, selection)
        mask = _one_hot_mask(target, at, each, target.facts.elem_type(selection.scored))
        edit.emit(at, "Mul", [raw, mask], selection.scored, f"{selection.name}/twin/Mul")
        return
    read = ffn.fc2.input if selection.part == "fc2" else ffn.entries[0].input
    layers = [ffn.fc2] if selection.part == "fc2" else list(ffn.entries)
    positions = [target.linears[layer.output].node for layer in layers]
    at = min(positions)
    mask = _one_hot_mask(target, at, each, target.facts.elem_type(read))
    masked = edit.emit(at, "Mul", [read, mask], edit.fresh(f"{read}/masked"), f"{selection.name}/twin/Mul")
    for i in positions:
        node = edit.copy(i)
        node.input[0] = masked
        edit.replace(i, node)


def _one_hot_mask(target: Target, at: int, each: Chosen, dtype: int) -> str:
    """(channels,) ones at the kept numbers; spelled another way than in the pruned graph."""
    write = PlaceWriter(target.edit, at, f"{each.selection.name}/twin")
    depth = write.constant(each.selection.channels, "depth", np.int64)
    values = write.constant([0, 1], "values", onnx.helper.tensor_dtype_to_np_dtype(dtype))
    return write.reduce("ReduceSum", write.one("OneHot", [each.kept, depth, values]), [0])


def check_scores(pruned: Model, chosen: Sequence[Chosen], feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Prove that the channels a graph chooses are those with the highest scores.

    Args:
        pruned: the graph.
        chosen: its selections.
        feeds: inputs to run it on.

    Raises:
        TwinError: a dropped channel scores higher than a kept one.
    """
    names = {n for c in chosen for n in (c.kept, c.scored, c.selection.probabilities) if n is not None}
    choices = [c.selection.merge.matched for c in chosen if c.selection.merge is not None]
    names |= {name for each in choices if each is not None for name in each.names}
    draft = to_float32(pruned)
    with scratch_folder("toast-twin-") as folder:
        path = write_draft(draft, folder, "model.onnx")
        found = run_model(path, sorted(names), feeds)
    for tensors in found:
        for each in chosen:
            scores = selection_scores(each.selection, tensors[each.scored], _row(each.selection, tensors))
            kept = np.zeros(each.selection.channels, bool)
            kept[tensors[each.kept]] = True
            worst, best = scores[kept].min(), scores[~kept].max()
            if kept.sum() != each.selection.kept or worst < best * (1 - SCORE_TOLERANCE):
                raise TwinError(
                    f"block {each.selection.block}: the graph keeps a channel of {each.selection.part} that scores "
                    f"{worst:.3e} and drops one of {best:.3e}; nothing was written. Please report the model"
                )


def selection_scores(selection: Selection, scored: np.ndarray, probabilities: np.ndarray | None) -> np.ndarray:
    """Scores (channels,) in float64, by `toast_onnx.importance.activation`.

    Args:
        selection: what is scored.
        scored: (batch, ..., channels).
        probabilities: (batch..., tokens) attention that the class token pays, heads included; None where none count.
    """
    x = scored.astype(np.float64).reshape(scored.shape[0], -1, selection.channels)
    tokens = np.arange(x.shape[1]) if selection.tokens is None else selection.tokens
    if probabilities is None:
        return token_channel_scores(attended_magnitude(x[:, tokens]))
    rows = probabilities.astype(np.float64)[..., tokens].reshape(-1, tokens.size)
    patches = attended_magnitude(x[:, tokens], rows)
    return token_channel_scores(patches, np.abs(x[:, 0]).mean(axis=0), selection.patches)


def _row(selection: Selection, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """What the class token looks at, of the tokens that are left."""
    if selection.probabilities is None:
        return None
    row = tensors[selection.probabilities][..., 0, :]
    return row if selection.merge is None else _of_those_left(row, selection.merge, tensors)


def _of_those_left(row: np.ndarray, merge: WrittenMerge, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The attention that merged tokens got together, heads averaged where there are any, from (batch..., tokens)."""
    counts = merge.counts
    if merge.matched is None:
        special = np.r_[0 : counts.front, counts.count - counts.back : counts.count]
        return row[..., special]
    numbers = merged_numbers(merge, tensors)
    each = row.astype(np.float64).reshape(len(numbers), -1, counts.count).mean(1)
    return np.stack([np.bincount(n, p) for n, p in zip(numbers, each, strict=True)])
