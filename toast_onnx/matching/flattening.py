"""Layers that work on rows: exporters and simplifiers put a Reshape before a Gemm, which takes two axes and no more."""

from __future__ import annotations

from toast_onnx.matching.facts import Facts
from toast_onnx.matching.graph import GraphView
from toast_onnx.matching.layout import Layout
from toast_onnx.matching.linear import Linear


def before_flattening(view: GraphView, facts: Facts, linear: Linear, layout: Layout) -> str | None:
    """The tensor that still has the axes which a layer's rows merge and its layout splits again.

    Rows of a dynamic batch with a dynamic number of tokens cannot be split by Reshape alone; this tensor tells them.

    Args:
        view: the graph.
        facts: its facts.
        linear: a layer that reads rows (rows, channels).
        layout: where its output goes.

    Returns:
        A tensor (..., channels) whose leading axes are the layout's, outermost first; None where there is none.
    """
    node = view.producer_of(linear.input)
    if node is None or node.op_type != "Reshape" or len(layout.sizes) != 2 or layout.channel_axis != 1:
        return None
    rows = sorted((f for factors in layout.axes for f in factors if f.source == 0), key=lambda f: -f.stride)
    shape = facts.shape(node.input[0])
    fits = shape is not None and shape[-1] == linear.in_features and shape[:-1] == tuple(f.size for f in rows)
    return node.input[0] if fits else None
