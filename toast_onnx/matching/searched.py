"""What the search for blocks looked for, for graphs in which it found none."""

from __future__ import annotations

from collections import Counter

from toast_onnx.matching.operators import ATTENTIONS
from toast_onnx.matching.study import Study


def searched(study: Study) -> str:
    """What was looked for in a graph, and what there is of it: for graphs in which nothing was found."""
    ops = Counter(node.op_type for node in study.view.nodes)
    attention = sum(ops[op] for op in ("Softmax", *ATTENTIONS))
    most = ", ".join(f"{count} {op}" for op, count in ops.most_common(4))
    kind = " (a convolutional network, which has neither)" if ops["Conv"] and not attention else ""
    return (
        "looked for attention (a Softmax between two products of activations, or one Attention operator) and for "
        f"feed-forward networks (two linear layers with an activation between); the graph has {attention} Softmax or "
        f"Attention and {ops['MatMul'] + ops['Gemm']} MatMul or Gemm, most of its nodes are {most}{kind}"
    )
