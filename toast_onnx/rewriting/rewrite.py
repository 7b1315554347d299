"""A studied graph with new weights written into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toast_onnx.edit import GraphEdit
from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study
from toast_onnx.matching.study import study as study_model
from toast_onnx.model import Model
from toast_onnx.rewriting.attention import rewrite_attention
from toast_onnx.rewriting.drop_heads import drop_heads, in_two_steps
from toast_onnx.rewriting.ffn import rewrite_ffn
from toast_onnx.rewriting.fusing import fuse_again
from toast_onnx.rewriting.learned import fold_learned, put_back
from toast_onnx.rewriting.shapes import settle_shapes
from toast_onnx.solving.weights import BlockWeights


def rewritten(study: Study, weights: Mapping[int, BlockWeights]) -> Model:
    """The graph as it was studied, with new weights.

    Heads go in a first pass. Where the heads that stay have fewer dimensions, too, the graph is looked at again and
    written a second time: one description of heads and dimensions at once would have to know how they meet.

    Args:
        study: the model.
        weights: block number -> new weights.

    Raises:
        MatchError: the weights cannot be written into this graph.
    """
    names = [block.name for block in study.match.blocks]
    model, left = _once(study, weights, names)
    if left:
        fewer = study_model(model, study.counted_shapes)
        _check_heads(study, fewer, weights)
        model, _ = _once(fewer, left, names)
    return fuse_again(model, study.spelled_out)


def _once(
    study: Study, weights: Mapping[int, BlockWeights], names: Sequence[str]
) -> tuple[Model, dict[int, BlockWeights]]:
    """The graph with new weights, and those that must wait: fewer dimensions where heads go."""
    edit = GraphEdit(study.view)
    left: dict[int, BlockWeights] = {}
    for block, name in zip(study.match.blocks, names, strict=True):
        new = weights.get(block.index)
        if new is not None and new.attention is not None and new.attention.drops_heads:
            assert block.attention is not None
            first, later = in_two_steps(study.view, study.facts, block.attention, new.attention)
            drop_heads(edit, study, block.attention, first, f"{name}/attention")
            if later is not None:
                left[block.index] = BlockWeights(later.of_all_heads())
            new = BlockWeights(None, new.ffn)
        if new is not None:
            _rewrite(edit, study, block, new, name)
    put_back(edit, study.view, study.learned)
    model = edit.apply()
    settle_shapes(model, edit, study)
    return fold_learned(model), left


def _check_heads(study: Study, fewer: Study, weights: Mapping[int, BlockWeights]) -> None:
    """Make sure that the graph without the dropped heads shows the same blocks, with the heads that are left.

    Raises:
        MatchError: it does not.
    """

    def heads(found: Study) -> list[int]:
        return [0 if b.attention is None else b.attention.num_heads for b in found.match.blocks]

    wanted = heads(study)
    for index, new in weights.items():
        if new.attention is not None and new.attention.v is not None and new.attention.v.heads is not None:
            wanted[index] = new.attention.v.heads.size
    if heads(fewer) != wanted:
        raise MatchError(
            "without the dropped heads the blocks are not found again, so that no dimensions can be removed besides; "
            "set attention.heads, or attention.qk and vo, to 0; please report the model"
        )


def _rewrite(edit: GraphEdit, study: Study, block: Block, new: BlockWeights, name: str) -> None:
    if new.attention is not None and block.attention is not None:
        rewrite_attention(edit, study, block.attention, new.attention, f"{name}/attention")
    if new.ffn is not None and block.ffn is not None:
        rewrite_ffn(edit, study, block.ffn, new.ffn, f"{name}/ffn")
