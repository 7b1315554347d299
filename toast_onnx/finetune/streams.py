"""The residual stream at block ends: tensors that the dense and the pruned graph have in common."""

from __future__ import annotations

from toast_onnx.matching.blocks import Block
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.operators import MOVEMENT, NORMS, PASSING
from toast_onnx.matching.study import Study

#: Between a branch's last linear layer and the residual sum only these occur (layer scale, windows, casts).
_BETWEEN = PASSING | MOVEMENT | NORMS | {"Mul"}


def block_ends(study: Study) -> dict[str, int]:
    """Tensor at the end of every block -> width of its last axis.

    It is the residual sum behind a block's last branch; where none is found, that branch's own output.
    """
    ends = {}
    for block in study.match.blocks:
        name = _end(study.view, study.facts, block)
        shape = None if name is None else study.facts.shape(name)
        if name is not None and shape:
            ends[name] = shape[-1]
    return ends


def common_ends(pruned: Study, dense: Study) -> tuple[str, ...]:
    """Block ends that both graphs have under one name and with one shape, in graph order."""
    theirs = block_ends(dense)
    return tuple(
        name
        for name in block_ends(pruned)
        if name in theirs and pruned.counted.shape(name) == dense.counted.shape(name)
    )


def _end(view: GraphView, facts: Facts, block: Block) -> str | None:
    if block.ffn is not None:
        tensor = block.ffn.fc2.output
    elif block.attention is not None and block.attention.proj is not None:
        tensor = block.attention.proj.linear.output
    else:
        return None
    branch = tensor
    for _ in range(16):
        readers = view.consumers.get(tensor, [])
        if len(readers) != 1:
            return branch
        node = view.nodes[readers[0]]
        if node.op_type == "Add" and not any(facts.is_constant(name) for name in node.input):
            return node.output[0]
        if node.op_type == "SkipLayerNormalization" and len(node.output) > 3 and node.output[3]:
            return node.output[3]
        if node.op_type not in _BETWEEN and node.op_type != "Add":
            return branch
        tensor = node.output[0]
    return branch
